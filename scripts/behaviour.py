"""Record what the package does, and compare two recordings.

    python scripts/behaviour.py record FOLDER [--only PART ...]
    python scripts/behaviour.py compare A B

A change that only moves code must change nothing that anybody can see. This writes down what can be
seen: vectors of every family of models, saved folders, training, what commands write and print, and
what is said of mistakes. It uses public names, commands and files alone, so it runs on every tree
whose `src` stands first in PYTHONPATH. A recording takes about ten minutes of one core and 15 MB,
and downloads nothing. Two can be compared, to the last bit, if one machine made them with the same
packages. Speeds, times and events for TensorBoard are left out.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

import unmasked

PACKAGE = Path(unmasked.__file__).resolve().parent
ENVIRONMENT = """COLUMNS=100 CUDA_VISIBLE_DEVICES= HF_HOME=.hub HF_HUB_OFFLINE=1 LC_ALL=C.UTF-8
MKL_NUM_THREADS=1 NO_COLOR=1 OMP_NUM_THREADS=1 PYTHONHASHSEED=0 TOKENIZERS_PARALLELISM=false
TQDM_DISABLE=1"""
READABLE = {".html", ".jinja", ".json", ".jsonl", ".md", ".svg", ".txt", ".yaml"}
TEXTS = ["Hi", "a", "", "To the right as to the left. " * 90, "한국어 문장도 벡터가 됩니다."]
TEXTS += ["Hi", "The cat sat on the mat.", "  spaced out  ", "line\nbreak\ttab", "🙂 é (...)?!"]
PAIRS = [["Find what is alike:", text] for text in TEXTS] + [["", "no instruction"], ["q: ", "x"]]
WORDS = """river cat engine letter garden market window bridge song winter old quiet blue small
early warm foreign narrow famous empty crosses opens follows remembers paints repairs carries"""
FILES = """texts.txt||%(a)s
rows.jsonl||{"id": %(i)s, "text": "%(a)s", "year": %(n)s, "url": "u%(i)s"}
pairs.jsonl||{"query": "%(q)s", "positive": "%(a)s"}
sts.tsv|score\tsentence1\tsentence2|%(n)s\t%(a)s\t%(b)s
twins.tsv|label\tsentence1\tsentence2|%(m)s\t%(a)s\t%(b)s
topics.tsv|label\ttext|%(w)s\t%(a)s
split/train.tsv|label\ttext|%(w)s\t%(a)s
split/test.tsv|label\ttext|%(w)s\t%(b)s
ranked.jsonl||{"query": "%(q)s", "positive": "%(a)s", "negative": ["%(c)s", "another"]}
beir/corpus.jsonl||{"_id": "%(i)s", "text": "%(a)s"}
beir/queries.jsonl||{"_id": "%(i)s", "text": "%(q)s"}
beir/qrels/test.tsv|query-id\tcorpus-id\tscore|%(i)s\t%(i)s\t1
words_train.tsv||The\tDET\\n%(w)s\tNOUN\\n
words_test.tsv||%(w)s\tNOUN\\nthe\tDET\\n
faulty.yaml|name: x\\nmodle: {base: nano}\\nmntp:\\n  setps: 3|
broken.yaml|name: [x\\nmodel: }|
spoilt.jsonl|{"text": "good"}\\n{"text": ""}\\n{"text": 3}\\n{"txet": "x"}|
full/mine.txt|mine|
adapter/llm2vec_config.json|{"pooling_mode": "weighted_mean", "max_length": 64}|"""
SHAPE = """hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, ffn_dim=48,
vocab_size=336, bos_token_id=0, eos_token_id=1, pad_token_id=1, query_pre_attn_scalar=8,
attention_types=[[["global", "local"], 1]], rotary_dim=4, state_size=8, word_embed_proj_dim=32,
attn_layer_offset=1, attn_layer_period=2, mamba_dt_rank=4, num_experts=2, num_experts_per_tok=1"""
FAMILIES = """arcee biogpt bloom codegen cohere falcon gpt2 gpt_bigcode gpt_neo gpt_neox gptj \
granite jamba llama mamba modernbert-decoder mpt nemotron olmo olmo2 opt persimmon phi phi3 qwen2 \
smollm3 stablelm starcoder2 xglm:|gemma glm glm4 helium qwen3 qwen3_moe seed_oss: head_dim=8
cohere2 exaone4 gemma2 gemma3_text ministral olmo3: head_dim=8, sliding_window=8, \
layer_types=["sliding_attention", "full_attention"]|lfm2: layer_types=["conv", "full_attention"]
mistral mixtral: sliding_window=4"""
BASIC = {"dtype": "float32", "max_length": 96, "allow_partial": True, "prompts": {"query": "q: "}}
LOADS = """pooling_mode="mean"|pooling_mode="weighted_mean"|pooling_mode="last_token"
pooling_mode="eos_token"|pooling_mode="bos_token"|skip_instruction=False|doc_max_length=8
compat="llm2vec-0.2"|enable_bidirectional=False|attn_implementation="eager"|max_length=512"""
NANO_LOADS = """template="llama3"|template="gemma"|dtype="bfloat16"|dtype="auto"|quantize="int8"
template="chatml", pooling_mode="last_token"|template="inst", compat="llm2vec-0.2"
template={"prefix": "<", "suffix": ">", "pool_suffix": False}"""
CALLS = """encode(TEXTS)|encode_query(TEXTS)|encode(PAIRS)|encode(TEXTS, prompt="Find:\\n")
encode("one", convert_to_tensor=True)|encode([], precision="binary")|encode(TEXTS, batch_size=2)
encode(TEXTS, normalize_embeddings=True, truncate_dim=12)|encode(TEXTS, precision="int8")
encode(TEXTS, precision="binary")|encode(PAIRS, output_value="token_embeddings")
encode(PAIRS, output_value=None)|preprocess(PAIRS)|encode_words([["catalogue", "of"], ["한국어"]])
encode_words([["catalogue", "of"]], previous=True)"""
API = """unmasked.__all__|unmasked.LLM2Vek|Recipe.model_json_schema()
{n: [*getattr(getattr(LLM2Vec, n), "__annotations__", ())] for n in dir(LLM2Vec) if n[0] != "_"}
Recipe(name="x", model={"base": "nano"}, simcse={"data": "a.txt"}).model_dump()
Recipe(name="x y", model={"base": ""}, mntp={"steps": True, "mask_token": "blink"})
nano := load("nano", dtype="float32")|made := LLM2Vec(bare("llama"), tokenizer("llama"))
opened := LLM2Vec(bare("llama"), tokenizer("llama"), enable_bidirectional=True, max_length=64)
made.encode(TEXTS)|opened.encode(TEXTS)|LLM2Vec("llama").encode(PAIRS)|nano.save("saved/nano")
load("saved/nano").encode(TEXTS)|stock("saved/nano").encode(TEXTS)
load("qwen3", template="llama3", prompts={"query": "Q:\\n", "bad": "q: "}).save("saved/template")
load("saved/template").encode_query(TEXTS)|stock("saved/template").encode_query(TEXTS)
load("mistral", pooling_mode="eos_token", doc_max_length=20).save("saved/eos")
load("saved/eos").encode(TEXTS)|stock("saved/eos").encode(TEXTS)|load("saved/eos").settings
load("gpt_neo", pooling_mode="weighted_mean").save("saved/eager")|load("saved/eager").encode(TEXTS)
load("llama", ["adapter", "adapter"]).save("saved/adapter")|load("saved/adapter").encode(TEXTS)
load("llama", "adapter", compat="llm2vec-0.2").encode(PAIRS)|load("adapter").encode(PAIRS)
load("nano", pooling_mode="maen")|load("nano", dtype="float8")|load("nano", quantize="int4")
load("nano", template="lama3")|load("nano", revison="main")|load("nano", device_map="balanced")
load("jamba")|load("bare")|load("no/such-model")
load("llama", pooling_mode="bos_token", template="inst")|LLM2Vec(bare("llama"))
nano.encode([["a", "b", "c"]])|nano.encode(["a", ["b", "c"]])|nano.encode("a", output_value="x")
nano.encode("a", prompt_name="x")|nano.encode_words([["a", ""]])
int8 := load("nano", quantize="int8")|int8.train()|int8.save("out")
nano.similarity(nano.encode(TEXTS), int8.encode(TEXTS))"""
RECIPES = """e5-public gemma-3-1b llama-2-7b llama-3-8b llama-3.1-8b llama-3.2-1b mistral-7b nano
nano-supervised qwen3-0.6b qwen3-4b qwen3-8b sheared-llama-1.3b smollm2-135m"""
COMMANDS = {
    "recipes": "|recipes show ".join(("recipes list", *RECIPES.split()))
    + """|recipes copy nano mine.yaml|plan mine.yaml|plan nano-supervised mntp.data=texts.txt \
simcse.data=texts.txt supervised.data=pairs.jsonl --recipe""",
    "stages": """run nano-supervised MNTP SIMCSE SUPERVISED mntp.data=texts.txt \
simcse.data=texts.txt supervised.data=pairs.jsonl evaluate.tasks=[sts.tsv,beir] -o run
run nano MNTP simcse=null mntp.data=texts.txt -o run|report run -o page/report.html
push run/model owner/name --dry-run|encode run/supervised texts.txt -o adapter.npy
encode run/model texts.txt -o model.npy|train mntp --base llama --data texts.txt -o one MNTP \
mntp.lora.method=dora mntp.mask_token=mask mntp.documents=apart mntp.block_length=24 \
mntp.micro_batch_tokens=48|train simcse --base llama --data rows.jsonl -o two SIMCSE \
simcse.embedding_dropout=0.1 simcse.lora.method=full simcse.gradient_checkpointing=true \
simcse.schedule=cosine|train supervised --base one/mntp --data pairs.jsonl -o three SUPERVISED \
supervised.matryoshka=[8,16] supervised.mini_batch_tokens=64 supervised.false_negative_margin=0.1
train_mntp.py --model_name llama SEED
train_simcse.py --model_name llama --peft_model_name_or_path results/llama-mntp SEED""",
    "encode": """encode nano rows.jsonl -o shards --keep url,year --shard-rows 32
encode nano rows.jsonl -o shards --keep url,year --shard-rows 32
encode nano rows.jsonl -o shards --keep url --shard-rows 32
encode nano rows.jsonl -o int8 --precision int8 --normalize --shard-rows 40 --format npy
encode nano rows.jsonl -o half --shard 2/2 --shard-rows 16 --format safetensors --precision float16
encode nano spoilt.jsonl -o skipped --on-error skip --precision binary
encode nano texts.txt -o one.npy --quantize int8 --dtype float32
encode nano rows.jsonl -o one.parquet --keep year --truncate-dim 16 --prompt query:
encode nano - -o one.safetensors --batch-size 2""",
    "judge": """convert mistral -o small --pooling weighted_mean --max-length 64
convert jamba -o hybrid --allow-partial|evaluate nano --tasks sts.tsv --tasks twins.tsv --tasks \
topics.tsv --tasks split --tasks beir --tasks ranked.jsonl --tasks words:words_test.tsv --all \
--json all.json
evaluate small nano --tasks sts.tsv --against causal --base mistral --json several.json
analyse nano --task twins.tsv --json inside.json -o figures
mine nano pairs.jsonl -o mined.jsonl --margin 0 --negatives 2
mine mistral pairs.jsonl -o more.jsonl --corpus texts.txt --skip 1 --depth 9 --instruction Find:
doctor|doctor nano|doctor small|doctor jamba|doctor mamba""",
    "demo": "demo --quick -o demo",
    "help": """--help|convert -h|demo -h|run -h|train -h|mine -h|plan -h|encode -h|evaluate -h
analyse -h|doctor -h|report -h|push -h|recipes -h|recipes list -h|recipes show -h|recipes copy -h
train_mntp.py -h|train_simcse.py -h""",
    "mistakes": """|--version|evaluat|recipes show nan|run nano|run nano mntp.stepz=3
run nano mntp.steps=many mntp.data=5 simcse.batch_size=1|run faulty.yaml|run broken.yaml
run nano mntp.data=txets.txt -o out|run nano simcse=null mntp.data=texts.txt mntp.warmup_steps=500
run nano simcse=null mntp.data=texts.txt evaluate.tasks=[sts.tvs] -o out
run nano simcse=null mntp.data=latin.txt -o out|train sipmle --base nano --data texts.txt -o out
train supervised --base nano --data rows.jsonl -o out|convert mamba -o out|convert bare -o out
convert nano -o full|encode nano rows.jsonl -o v.npy --text-column txet
encode nano rows.jsonl -o v.npy --keep yaer|encode nano absent.txt -o v.npy
encode nano texts.txt -o v.xyz|encode nano texts.txt -o v.npy --shard 1/2
encode nano spoilt.jsonl -o v|encode nano latin.txt -o v
encode nano texts.txt -o v.npy --prompt-name nothing|evaluate nano --tasks absent.tsv
evaluate nano --tasks sts.tsv --json nowhere/a.json|analyse nano --task topics.tsv
mine nano rows.jsonl -o out.jsonl|push full owner/name --dry-run|doctor absent
train_mntp.py --model_name x""",
}
STEPS = """{0}.steps=20 {0}.batch_size=8 {0}.log_steps=5 {0}.eval_steps=10 {0}.save_steps=10
{0}.warmup_steps=4 {0}.held_out=20"""
SHORT = {stage.upper(): STEPS.format(stage) for stage in ("mntp", "simcse", "supervised")}
SHORT["SEED"] = "--data_path texts.txt --max_steps 3 --logging_steps 1 --max_seq_length 32"


def items(text: str) -> list[str]:
    """What stands on the lines of a text, or between bars."""
    return text.replace("\n", "|").split("|")


def write_inputs() -> list[str]:
    """Write texts, tasks of every kind, and files with faults; returns the texts."""
    drawn = np.random.default_rng(0).choice(WORDS.split(), (200, 6))
    texts = [f"The {' '.join(row)}." for row in drawn]
    for line in FILES.replace("\\n", "\f").split("\n"):
        name, first, form = line.split("|")
        rows = [first] if first else []
        for i, text in enumerate(texts if form else []):
            own = {"i": i, "n": 5 - i % 5, "m": int(i % 5 < 2), "w": drawn[i, 0], "q": text[4:20]}
            rows.append(form % {**own, "a": text, "b": texts[i - i % 5], "c": texts[i - 7]})
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("\n".join(rows).replace("\f", "\n") + "\n", encoding="utf-8")
    Path("latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    return texts


def write_models(texts: list[str]) -> None:
    """Write a random decoder of each family, an adapter, and a folder without a tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    raw, special = ByteLevelBPETokenizer(), {"bos_token": "<s>", "eos_token": "</s>"}
    raw.train_from_iterator(texts, 320, special_tokens=[*special.values()], show_progress=False)
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw._tokenizer, **special)
    for names, _, fields in (line.partition(":") for line in items(FAMILIES)):
        for family in names.split():
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **eval(f"dict({SHAPE}) | dict({fields})"))
            model = AutoModelForCausalLM.from_config(config)
            model.save_pretrained(family)
            tokenizer.save_pretrained(family)
            if family == "llama":
                lora = LoraConfig(init_lora_weights=False, target_modules=["q_proj", "up_proj"])
                model.model.name_or_path = family
                get_peft_model(model.model, lora).save_pretrained("adapter")
    tokenizer.chat_template = "[INST] {{ messages }} [/INST]"
    tokenizer.save_pretrained("adapter")
    shutil.copytree("llama", "bare", ignore=shutil.ignore_patterns("tokenizer*"))


def clean(text: str) -> str:
    """Without what differs from run to run: places, speeds, times of files, how far it is."""
    for path, name in ((Path.cwd(), "WORK"), (PACKAGE, "PACKAGE"), (PACKAGE.parents[1], "TREE")):
        text = text.replace(str(path), name)
    text = re.sub(r"(?m)^\w+ (?!([\d,]+)/\1\b)[\d,]+/.*\n|^encoding \d+(  .*)?\n", "", text)
    text = re.sub(r', "machine": \{.*?\}|(?<="source": ")[0-9a-f]{16}(?=")', "", text)
    return re.sub(r"[\d,]+ (texts|tokens)/s", r"N \1/s", text)


def write(path: Path, text: str) -> None:
    """Write a text, cleaned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(clean(text), encoding="utf-8")


def calls(path: Path, lines: list[str]) -> None:
    """What Python expressions give: arrays; as text other values, and what is logged or raised."""
    from sentence_transformers import SentenceTransformer
    from torch.utils._pytree import tree_leaves
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import set_verbosity_error

    from unmasked import LLM2Vec, Recipe

    set_verbosity_error()
    names = {**globals(), "load": LLM2Vec.from_pretrained, "LLM2Vec": LLM2Vec, "Recipe": Recipe}
    names |= {"bare": AutoModel.from_pretrained, "tokenizer": AutoTokenizer.from_pretrained}
    told, found, names["stock"] = io.StringIO(), {}, SentenceTransformer
    logging.basicConfig(stream=told, format="%(levelname)s: %(message)s", force=True)
    for number, line in enumerate(lines):
        print(f">>> {line}", file=told)
        try:
            value = eval(f"({line})", names)
        except Exception as error:
            kinds = " < ".join(kind.__name__ for kind in type(error).__mro__[:-3])
            value = f"{kinds}: {error}"
        leaves = [np.asarray(leaf) for leaf in tree_leaves(value) if hasattr(leaf, "shape")]
        found |= {f"{number} {line} {i}": leaf for i, leaf in enumerate(leaves)}
        if not leaves and not hasattr(value, "encode_query"):
            shown = json.dumps(value, indent=1) if isinstance(value, dict) else value
            print(shown, file=told)
    write(path.with_suffix(".txt"), told.getvalue())
    np.savez_compressed(path.with_suffix(".npz"), **found)


def vectors(out: Path) -> None:
    """Every family, and nano, loaded and called in many ways; the later loads are called less."""
    families = [name for line in items(FAMILIES) for name in line.partition(":")[0].split()]
    for family in ("nano", *families):
        lines = []
        for load in items(LOADS) + items(NANO_LOADS) * (family == "nano"):
            lines += ["model := None", f"model := load({family!r}, **BASIC | dict({load}))"]
            lines += ["(model.report.summary(), model.precision)"]
            lines += [f"model.{call}" for call in items(CALLS)[: 4 if len(lines) > 3 else None]]
        calls(out / family, lines)


def commands(out: Path, lines: list[str]) -> None:
    """What commands print, and how they end."""
    for number, line in enumerate(lines):
        words = [part for word in line.split() for part in SHORT.get(word, word).split()]
        script = [str(PACKAGE.parents[1] / words.pop(0))] if line.startswith("train_") else []
        command = [sys.executable, *(script or ["-m", "unmasked"]), *words]
        done = subprocess.run(command, capture_output=True, text=True, input="one\ntwo\n한국어\n")
        told = f"$ {line}\nexit {done.returncode}\n{done.stdout}--- stderr\n{done.stderr}"
        write(out / f"{number:02} {re.sub('[^a-z0-9]+', ' ', line)[:50].strip()}.txt", told)


def part(name: str, place: Path, out: Path) -> None:
    """Record a part: what is seen, and digests of the files that it leaves; the readable whole."""
    given, told = Path(place, "inputs"), []
    os.chdir(given if name == "inputs" else shutil.copytree(given, place / name))
    if name == "inputs":
        write_models(write_inputs())
    elif name == "vectors":
        vectors(out)
    elif name == "api":
        calls(out / "calls", items(API))
    else:
        commands(out, items(COMMANDS[name]))
    for path in sorted(path for path in Path().rglob("*") if path.is_file()):
        old = name != "inputs" and (given / path).exists()
        if old or path.parts[0] == ".hub" or "tfevents" in path.name:
            continue
        content = path.read_bytes()
        if path.suffix in READABLE:
            content = clean(content.decode(errors="backslashreplace")).encode()
            if len(content) < 30_000:
                write(out / "files" / path, content.decode())
        told.append(f"{hashlib.sha256(content).hexdigest()}  {len(content):>9}  {path}\n")
    write(out / "digests.txt", "".join(told))


def record(folder: Path, names: list[str]) -> None:
    """Each part in a process and a folder of its own, all in one environment."""
    os.environ.update(word.split("=") for word in ENVIRONMENT.split())
    os.environ["PYTHONPATH"] = str(PACKAGE.parent)
    one = ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1)
    with tempfile.TemporaryDirectory() as place, one as pool:
        Path(place, "inputs").mkdir()
        for name in ("inputs", *names):
            shutil.rmtree(folder / name, ignore_errors=True)
            pool.submit(part, name, Path(place).resolve(), (folder / name).resolve()).result()
            print(f"{name} is recorded", flush=True)


def differences(a: Path, b: Path) -> list[str]:
    """How a recorded file differs from another."""
    if not (a.is_file() and b.is_file()):
        return [f"only in {a.parent if a.is_file() else b.parent}"]
    if a.suffix != ".npz":
        before, after = (path.read_text(encoding="utf-8").splitlines() for path in (a, b))
        return list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    x, y = ({f"{k} {v.dtype} {v.shape}": v for k, v in np.load(path).items()} for path in (a, b))
    told = [f"{'-' if name in x else '+'}{name}" for name in sorted(x.keys() ^ y.keys())]
    for name in sorted(x.keys() & y.keys()):
        if x[name].tobytes() != y[name].tobytes():
            most = np.abs(x[name].astype(float) - y[name].astype(float)).max()
            told.append(f"{name}: up to {most:.1e} apart")
    return told


def compare(a: Path, b: Path) -> int:
    """Print every difference of two recordings; the exit code."""
    names = {path.relative_to(top) for top in (a, b) for path in top.rglob("*") if path.is_file()}
    found = {name: told for name in sorted(names) if (told := differences(a / name, b / name))}
    for name, told in found.items():
        print(f"{name}:", *told[:20], *(["..."] if told[20:] else []), sep="\n    ")
    print(f"{len(found)} of {len(names)} files differ" if found else "no difference")
    return 1 if found or not names else 0


if __name__ == "__main__":
    PARTS = ["vectors", "api", *COMMANDS]
    match sys.argv[1:]:
        case ["record", folder]:
            record(Path(folder), PARTS)
        case ["record", folder, "--only", *names] if names and {*names} <= {*PARTS}:
            record(Path(folder), names)
        case ["compare", a, b]:
            sys.exit(compare(Path(a), Path(b)))
        case _:
            sys.exit(f"{__doc__}\nThe parts: {', '.join(PARTS)}.")
