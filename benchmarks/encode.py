"""Encoding speed: this package against stock sentence-transformers on the same saved folder.

Absolute numbers of two days or two machines cannot be compared, so everything is a ratio inside one
process: the systems take turns (A B A B), every round gives one ratio, and the median round counts.
CPU time stands beside wall time, because another process distorts it less. Vectors are compared
before anything is timed: a fast wrong answer is no result.

`share of peak` is useful work (2 FLOPs per weight outside the embeddings and real token, and
4·s·d·L for the attention of a text of s tokens; padding counts as nothing) over what the machine
does in a 2048³ matrix product of the dtype, timed in the same rounds (8-bit weights may exceed it).

    python -m benchmarks                                  # quick: five minutes on two cores
    python -m benchmarks.encode --dtype float32 --json results/encode.json
    python -m benchmarks.encode --quantize int8           # ours alone; the rivals have no such way
    python -m benchmarks.encode --upstream-python llm2vec-venv/bin/python
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean, median
from subprocess import PIPE
from typing import Any

import numpy as np
import sentence_transformers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import get_device_name
from transformers import AutoConfig, AutoModel, AutoTokenizer, LlamaConfig

from benchmarks.texts import build_mixes, read_sentences
from unmasked import LLM2Vec, __version__
from unmasked.checkpoint.location import bundled_path
from unmasked.forward import precision
from unmasked.forward.quantization import KINDS

SMOLLM_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
}
QUICK = {"short": 64, "passages": 20, "mixed": 80, "korean": 40}
FULL = {"short": 512, "passages": 128, "mixed": 640, "korean": 256}
"""Texts a mix. In a small `mixed`, batches of 32 that hold both kinds of text weigh more."""

OURS, STOCK, DEFAULT = "unmasked", "sentence-transformers", "sentence-transformers, default"
UPSTREAM = "llm2vec 0.2.3"
LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.99, "int8": 0.98}

Encode = Callable[[list[str]], np.ndarray]
Timed = Callable[[list[str]], tuple[float, float]]
"""Encodes texts; wall and CPU seconds."""


def save_model(folder: Path, model: str | None, tokenizer: str) -> None:
    """Write the encoder to compare: a given one, or SmolLM-135M's shape with random weights."""
    if model is not None:
        LLM2Vec.from_pretrained(model, dtype="float32", device="cpu").save(folder)
        return
    torch.manual_seed(0)
    config = LlamaConfig(**SMOLLM_135M, is_causal=False)
    decoder = AutoModel.from_config(config, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(tokenizer)
    LLM2Vec(decoder, words, doc_max_length=None, device="cpu").save(folder)


def load_systems(
    folder: Path, dtype: str, device: str | None, quantize: str | None = None
) -> tuple[LLM2Vec, dict[str, Encode]]:
    """Ours, the rival at the same dtype, and the rival as it comes where that is another dtype."""
    ours = LLM2Vec.from_pretrained(folder, dtype=dtype, device=device, quantize=quantize)
    rivals = {STOCK: {"dtype": getattr(torch, dtype)}}
    if dtype != "float32":
        rivals[DEFAULT] = {"dtype": torch.float32}  # the dtype of the saved folder
    systems: dict[str, Encode] = {OURS: ours.encode}
    for name, options in rivals.items():
        stock = SentenceTransformer(str(folder), device=device, model_kwargs=options)
        systems[name] = stock.encode
    return ours, systems


def useful_flops(model: LLM2Vec, lengths: Sequence[int]) -> float:
    """FLOPs of a forward over texts of these token counts, without padding."""
    decoder: Any = model.backbone.auto_model
    embeddings = decoder.get_input_embeddings().weight
    weights = sum(w.numel() for w in decoder.state_dict().values()) - embeddings.numel()
    config = decoder.config
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 4 * heads * head * config.num_hidden_layers
    return float(sum(2 * weights * s + attention * s * s for s in lengths))


def gemm_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best of five square matrix products (2048³; 8192³ on an accelerator)."""
    side = 2048 if device.type == "cpu" else 8192
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        corner = (left @ right)[0, 0]
        corner.item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def check_vectors(vectors: dict[str, np.ndarray], weights: str) -> float:
    """The least cosine between ours and the rival's vectors; stops where they disagree."""
    ours, stock = (
        v / np.linalg.norm(v, axis=1, keepdims=True)
        for v in (vectors[OURS].astype(np.float64), vectors[STOCK].astype(np.float64))
    )
    least = float((ours * stock).sum(axis=1).min())
    if not least >= LEAST_COSINE[weights]:
        raise SystemExit(f"vectors differ (least cosine {least:.6f}): nothing is timed")
    return least


def timed(encode: Encode) -> Timed:
    """A system of this process."""

    def run(texts: list[str]) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        encode(texts)
        return time.perf_counter() - wall, time.process_time() - cpu

    return run


def _for_older_libraries(folder: Path) -> None:
    """Rewrite a folder's tokenizer and settings as llm2vec 0.2.3's libraries read them."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    merges = tokenizer["model"].get("merges", [])
    tokenizer["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    path.write_text(json.dumps(tokenizer), "utf-8")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(settings), "utf-8")
    (folder / "llm2vec_config.json").unlink()


@contextmanager
def upstream(python: str | None, folder: Path, dtype: str) -> Iterator[dict[str, Timed]]:
    """The original package in its own process, which takes its turns; nothing without `python`."""
    if python is None:
        yield {}
        return
    script = str(Path(__file__).parent / "upstream.py")
    _for_older_libraries(folder)
    command = [python, script, str(folder), dtype, str(torch.get_num_threads())]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin and process.stdout

        def ask(texts: list[str]) -> tuple[float, float]:
            process.stdin.write(json.dumps(texts) + "\n")
            process.stdin.flush()
            wall, cpu = json.loads(process.stdout.readline())
            return wall, cpu

        if not process.stdout.readline():
            raise SystemExit(f"{python} cannot run llm2vec; what it said stands above")
        yield {UPSTREAM: ask}
        process.stdin.close()


def time_rounds(
    systems: dict[str, Timed], texts: list[str], rounds: int, peak: Callable[[], float]
) -> tuple[dict[str, list[tuple[float, float]]], list[float]]:
    """(wall, CPU) seconds of every system and the machine's peak, in turns."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    peaks = []
    for _ in range(rounds):
        peaks.append(peak())
        for name, run in systems.items():
            seconds[name].append(run(texts))
    return seconds, peaks


def measure(
    model: LLM2Vec,
    systems: dict[str, Encode],
    others: dict[str, Timed],
    texts: list[str],
    dtype: str,
    rounds: int,
) -> dict[str, Any]:
    """One mix: check the vectors (which warms up as well), then time it."""
    lengths = [len(row.ids) for row in model.backbone.tokenize_inputs(texts)]
    sample = texts[:32]
    weights = model.quantization.name if model.quantization else dtype
    least = check_vectors({name: encode(sample) for name, encode in systems.items()}, weights)
    turns = {name: timed(encode) for name, encode in systems.items()} | others
    for run in others.values():
        run(sample)
    seconds, peaks = time_rounds(
        turns, texts, rounds, lambda: gemm_peak(getattr(torch, dtype), model.device)
    )
    wall = {name: median(w for w, _ in pairs) for name, pairs in seconds.items()}

    def ratio(rival: str, which: int) -> float:
        pairs = zip(seconds[rival], seconds[OURS], strict=True)
        return median(theirs[which] / ours[which] for theirs, ours in pairs)

    default = DEFAULT if DEFAULT in systems else STOCK
    original = {"vs_llm2vec": ratio(UPSTREAM, 0)} if UPSTREAM in others else {}
    return {
        **original,
        "texts": len(texts),
        "mean_tokens": mean(lengths),
        "longest": max(lengths),
        "least_cosine": least,
        "seconds": wall,
        "cpu_seconds": {name: median(c for _, c in pairs) for name, pairs in seconds.items()},
        "texts_per_second": len(texts) / wall[OURS],
        "tokens_per_second": sum(lengths) / wall[OURS],
        "vs_sentence_transformers": ratio(STOCK, 0),
        "vs_sentence_transformers_cpu_time": ratio(STOCK, 1),
        "vs_sentence_transformers_default": ratio(default, 0),
        "vs_sentence_transformers_default_cpu_time": ratio(default, 1),
        "share_of_peak": useful_flops(model, lengths) / wall[OURS] / median(peaks),
        "peak_gflops": median(peaks) / 1e9,
    }


def environment(model: LLM2Vec, name: str, dtype: str, source: str) -> dict[str, Any]:
    """What the numbers depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    on_gpu = model.device.type == "cuda"
    return {
        "model": name,
        "dtype": dtype,
        "quantize": str(model.quantization or "no"),
        "device": torch.cuda.get_device_name(model.device) if on_gpu else model.device.type,
        "cpu": cpu or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "texts": source,
        "unmasked": __version__,
        "sentence-transformers": sentence_transformers.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


HEADER = (
    "| mix | texts | tokens, mean / longest | texts/s | vs ST, wall / CPU time "
    "| vs ST default, wall / CPU time | vs llm2vec 0.2.3 | share of peak | least cosine |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def markdown_row(name: str, mix: dict[str, Any]) -> str:
    """A mix as a row below `HEADER`."""
    rival = "vs_sentence_transformers"
    return (
        f"| {name} | {mix['texts']} | {mix['mean_tokens']:.0f} / {mix['longest']} "
        f"| {mix['texts_per_second']:.1f} "
        f"| **{mix[rival]:.2f}×** / {mix[f'{rival}_cpu_time']:.2f}× "
        f"| {mix[f'{rival}_default']:.2f}× / {mix[f'{rival}_default_cpu_time']:.2f}× "
        f"| {f'{original:.2f}×' if (original := mix.get('vs_llm2vec')) else '-'} "
        f"| {mix['share_of_peak']:.0%} of {mix['peak_gflops']:.0f} GFLOP/s "
        f"| {mix['least_cosine']:.5f} |"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Encoding speed against sentence-transformers.")
    parser.add_argument("--model", help="folder or hub name; default: SmolLM-135M's shape, random")
    parser.add_argument(
        "--small", action="store_const", dest="model", const="nano", help="the bundled decoder"
    )
    parser.add_argument(
        "--tokenizer", default=str(bundled_path()), help="for the random model; default: nano's"
    )
    parser.add_argument("--data", type=Path, help="folder with text/*wiki_sentences.txt.gz")
    parser.add_argument("--dtype", choices=["auto", *LEAST_COSINE], default="auto")
    parser.add_argument("--quantize", choices=KINDS, help="8-bit weights in ours")
    parser.add_argument("--upstream-python", metavar="PYTHON", help="one that has llm2vec 0.2.3")
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--mixes", nargs="+", choices=FULL, default=list(FULL))
    parser.add_argument("--quick", action="store_true", help="few texts, three rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    options = parse(arguments)
    transformers.utils.logging.disable_progress_bar()
    sentences = read_sentences(options.data)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "encoder"
        save_model(folder, options.model, options.tokenizer)
        device = torch.device(options.device or get_device_name())
        config = AutoConfig.from_pretrained(folder)
        dtype = str(precision.pick(options.dtype, device, config).dtype).removeprefix("torch.")
        model, systems = load_systems(folder, dtype, options.device, options.quantize)
        others = stack.enter_context(upstream(options.upstream_python, folder, dtype))
        sizes = {name: (QUICK if options.quick else FULL)[name] for name in options.mixes}
        mixes = build_mixes(sentences, sizes, lambda text: len(model.tokenizer.tokenize(text)))
        name = options.model or "SmolLM-135M's shape, random weights"
        report: dict[str, Any] = {
            "environment": environment(model, name, dtype, sentences.source),
            "mixes": {},
        }
        for key, value in report["environment"].items():
            print(f"- {key}: {value}")
        print(f"\n{HEADER}", flush=True)
        for mix, texts in mixes.items():
            found = measure(model, systems, others, texts, dtype, 3 if options.quick else 5)
            report["mixes"][mix] = found
            print(markdown_row(mix, found), flush=True)
    for mix in sizes.keys() - mixes.keys():
        print(f"\n{mix}: left out, it needs a data folder with Korean sentences (--data).")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
