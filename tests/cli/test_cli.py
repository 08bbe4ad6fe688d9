"""The commands as a user meets them: what they print, where, and how they end.

Most run in this process, through the same entry as the installed script; what hangs on the process
itself (imports, signals, pipes) runs in one of its own.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from unmasked.cli import main

COMMAND = [sys.executable, "-m", "unmasked"]


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Runs a command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unmasked", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out, err

    return run


@pytest.fixture
def texts(tmp_path, sentences) -> Path:
    path = tmp_path / "texts.txt"
    lines = [f"{number} {text}" for number in range(12) for text in sentences]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tasks(tmp_path, sentences) -> list[str]:
    pairs = [(i, j) for i in range(8) for j in range(i)]
    rows = [f"{(3 * i + j) % 5}\t{sentences[i]}\t{sentences[j]}" for i, j in pairs]
    (tmp_path / "sts.tsv").write_text("score\tsentence1\tsentence2\n" + "\n".join(rows) + "\n")
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "text": text} for i, text in enumerate(sentences)]
    queries = [{"_id": f"q{i}", "text": text[:12]} for i, text in enumerate(sentences)]
    for name, records in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    judged = [f"q{i}\td{i}\t1" for i in range(8)]
    table = "query-id\tcorpus-id\tscore\n" + "\n".join(judged) + "\n"
    (folder / "qrels" / "test.tsv").write_text(table)
    return ["sts.tsv", "beir"]


@pytest.fixture
def recipe(tmp_path, tiny_decoder, texts, tasks) -> Path:
    common = {"data": texts.name, "batch_size": 2, "log_steps": 1}
    path = tmp_path / "recipe.yaml"
    content = {
        "name": "tiny",
        "model": {"base": str(tiny_decoder), "max_length": 64},
        "mntp": {**common, "steps": 3, "block_length": 16, "held_out": 4, "eval_steps": 2},
        "simcse": {**common, "steps": 2, "max_length": 16, "held_out": 0},
        "evaluate": {"tasks": tasks, "bootstrap": 50},
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def listing(folder: Path) -> dict[str, int]:
    """Every file below a folder, and when it was written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


# --- the surface --------------------------------------------------------------------------------


def test_help_is_quick():
    before = os.times()
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    after = os.times()  # processor time, for others may be using this machine too
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 0.5
    for verb in ("demo", "convert", "run", "train", "encode", "evaluate", "doctor", "recipes"):
        assert re.search(rf"\b{verb}\b", done.stdout)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "-h"], ["recipes", "list"]])
def test_light_verbs_load_nothing_heavy(arguments):
    code = f"""
import sys
sys.argv = ["unmasked", *{arguments}]
from unmasked.cli import main
try:
    main()
finally:
    heavy = {{"torch", "transformers", "sentence_transformers", "peft"}} & set(sys.modules)
    print("heavy:", *sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "heavy:", done


def test_version(cli):
    assert cli("--version") == (0, "unmasked 0.1.0\n", "")


def test_recipes(cli, tmp_path):
    code, out, _ = cli("recipes", "list")
    assert code == 0
    assert re.search(r"^mistral-7b +mistralai/Mistral-7B-Instruct-v0.2$", out, re.MULTILINE)
    shown = cli("recipes", "show", "nano")[1]
    assert yaml.safe_load(shown)["name"] == "nano"
    code, out, _ = cli("recipes", "copy", "nano", "mine.yaml")
    assert code == 0
    assert (tmp_path / "mine.yaml").read_text(encoding="utf-8") == shown
    assert "next   unmasked run ./mine.yaml" in out
    code, _, err = cli("recipes", "copy", "nano", "mine.yaml")
    assert (code, err) == (2, "error: mine.yaml exists. Fix: another name.\n")
    assert "did you mean 'nano'?" in cli("recipes", "show", "nan")[2]


def test_a_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    for arguments in (["recipes", "list"], ["recipes", "show", "nano"], ["--help"]):
        done = subprocess.run([*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE)
        assert done.stderr == b"", arguments
        assert done.returncode in (0, 1), arguments
    os.close(writer)


def test_errors_of_the_user_show_no_traceback_unless_asked(cli, monkeypatch, tmp_path):
    code, out, err = cli("run", "nano", "mntp.stepz=3")
    assert (code, out) == (2, "")
    assert (
        err == "error: mntp.stepz: unknown key, did you mean 'steps'? (override 'mntp.stepz=3')\n"
    )
    for arguments in (["--debug", "run", "nano"], ["run", "nano", "--debug"]):
        monkeypatch.setattr(sys, "argv", ["unmasked", *arguments, "mntp.stepz=3"])
        with pytest.raises(ValueError, match=r"mntp\.stepz"):
            main()
    code, _, err = cli("run", "nanoo")
    assert code == 2
    assert "did you mean 'nano'?" in err
    assert not listing(tmp_path)


def test_a_full_disk_is_told_without_a_traceback(cli, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("unmasked.cli.running.run_recipe", write)
    code, _, err = cli("run", "nano")
    assert code == 2
    assert err == "error: No space left on device. Fix: make room and run the same command.\n"


# --- convert ------------------------------------------------------------------------------------


def test_convert_makes_what_stock_sentence_transformers_loads(cli, tiny_decoder, sentences):
    from sentence_transformers import SentenceTransformer

    from unmasked import LLM2Vec

    code, out, err = cli("convert", tiny_decoder, "-o", "model", "--max-length", 64)
    assert code == 0
    assert out.startswith("bidirectional: full (llama, sdpa)")
    assert "saved  model\nnext   unmasked encode model texts.txt -o vectors.npy\n" in out
    assert "Loading weights" not in err
    assert "Writing model shards" not in err
    stock = SentenceTransformer("model", device="cpu").encode(sentences, show_progress_bar=False)
    ours = LLM2Vec.from_pretrained("model", device="cpu").encode(sentences)
    np.testing.assert_allclose(stock, ours, atol=1e-5)


def test_convert_passes_on_no_notes_of_the_libraries(tmp_path, tiny_tokenizer):
    from support import tiny
    from support.tiny import save_random

    # Most decoders have a head of their own, which transformers reports as unexpected.
    save_random(tmp_path / "decoder", tiny.config("llama"), tiny_tokenizer)
    words = [*COMMAND, "convert", "decoder", "-o", "new"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["loading decoder", "saving"]


def test_convert_refuses_an_output_before_it_loads_anything(cli, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    before = listing(tmp_path)
    for output in ("full", "full/mine.txt"):
        code, out, err = cli("convert", "no/such-model", "-o", output)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {output} ")
        assert "Fix: name a new folder." in err
    assert listing(tmp_path) == before


def test_convert_refuses_a_model_without_attention(cli, tiny_mamba, tmp_path):
    code, _, err = cli("convert", tiny_mamba, "-o", "model")
    assert code == 2
    assert "'mamba' with eager attention is not bidirectional" in err
    assert "Traceback" not in err
    assert not listing(tmp_path)


def test_convert_names_what_a_folder_lacks(cli, tiny_decoder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny_decoder / name).read_bytes())
    code, _, err = cli("convert", bare, "-o", "model")
    assert code == 2
    assert "has a model but no tokenizer" in err
    code, _, err = cli("convert", tmp_path / "none", "-o", "model")
    assert code == 2
    assert "it is no folder here" in err


def test_convert_tells_weights_that_were_cut_off(cli, tiny_decoder, tmp_path):
    cut = shutil.copytree(tiny_decoder, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = cli("convert", cut, "-o", "model")
    assert code == 2
    assert f"{cut}: a .safetensors file is broken" in err
    assert not (tmp_path / "model").exists()


# --- run and train ------------------------------------------------------------------------------


def test_run_from_end_to_end_and_again(cli, recipe, tmp_path):
    code, out, err = cli("run", recipe, "mntp.learning_rate=1e-3", "-o", "out")
    assert code == 0, err
    stages = json.loads((tmp_path / "out/results.json").read_text())["stages"]
    names = [stage["name"] for stage in stages]
    causal = ["causal_mean", "causal_weighted_mean", "causal_last_token"]
    assert names == [*causal, "bidirectional", "mntp", "simcse"]
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows if row and row[0] in names] == names
    best = max(causal, key=lambda name: stages[names.index(name)]["scores"]["sts.spearman"])
    assert any(row[0] == best and row[2] == "*" for row in rows if row)
    assert re.search(
        r"sts\.spearman: simcse [+-][\d.]+ over causal_\w+, 95 % interval \[.*\]: ", out
    )
    assert "clear of zero" in out or "not clear" in out
    assert "saved  out/model" in out
    assert re.search(r"^stages +mntp 3 steps of 2, simcse 2 steps of 2$", err, re.M)
    assert re.search(r"^dtype +float32 \(auto", err, re.M)
    assert re.search(r"^mntp 3/3  loss [\d.]+  held-out [\d.]+  [\d,]+ tokens/s", err, re.M)
    assert re.search(r"^simcse 2/2  loss [\d.]+", err, re.M)

    before = listing(tmp_path / "out")
    code, again, err = cli("run", recipe, "mntp.learning_rate=1e-3", "-o", "out")
    assert code == 0
    assert "mntp 3/3" not in err
    changed = {name for name, when in listing(tmp_path / "out").items() if before.get(name) != when}
    assert changed <= {"recipe.yaml"}  # not even the command that is kept
    assert again == out

    code, _, err = cli("run", recipe, "-o", "out")
    assert code == 2
    assert "mntp.learning_rate: 0.001 -> 5e-05" in err


def test_run_names_the_line_that_is_not_utf8(cli, recipe, texts, tmp_path):
    texts.write_bytes(b"fine\ncaf\xe9\n")
    code, _, err = cli("run", recipe, "-o", "out", "evaluate.tasks=[]")
    assert code == 2
    assert "texts.txt, line 2: not UTF-8" in err
    assert not (tmp_path / "out").exists()


def test_run_refuses_an_empty_corpus_and_a_missing_task(cli, recipe, texts, tmp_path):
    texts.write_text("\n\n")
    code, _, err = cli("run", recipe, "-o", "out", "evaluate.tasks=[]")
    assert code == 2
    assert "texts.txt: there is no text in it" in err
    code, _, err = cli("run", recipe, "-o", "out", "evaluate.tasks=[sts.tvs]")
    assert code == 2
    assert "sts.tvs: no such file" in err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_saves_and_the_same_command_continues(recipe, tmp_path, cli):
    overrides = ["simcse=null", "evaluate.tasks=[]", "mntp.steps=100000", "mntp.eval_steps=100000"]
    command = [*COMMAND, "run", str(recipe), *overrides, "-o", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        for line in running.stderr:
            if line.startswith("mntp ") and "/100,000" in line:
                break
        running.send_signal(signal.SIGINT)
        last = running.communicate(timeout=300)[1].splitlines()[-1]
    finally:
        running.kill()
    assert running.returncode == 130
    assert last == "interrupted: saved; run the same command to continue"
    (checkpoint,) = (tmp_path / "out/mntp").glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    # The same command, but that it ends: the recipe in the folder is told to, too.
    kept = tmp_path / "out/recipe.yaml"
    kept.write_text(kept.read_text().replace("steps: 100000", f"steps: {step + 2}"))
    overrides[2:] = [f"mntp.steps={step + 2}", f"mntp.eval_steps={step + 2}"]
    code, out, err = cli("run", recipe, *overrides, "-o", "out")
    assert code == 0, err
    lines = (tmp_path / "out/mntp/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"loss"' in line]
    assert steps == list(range(1, step + 3))
    assert "saved  out/model" in out


def test_mine_and_train_supervised(cli, tiny_decoder, tmp_path):
    rows = [{"query": f"question {i}", "positive": f"answer {i} {i * 7}"} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mining = ["mine", tiny_decoder, "pairs.jsonl", "-o", "mined.jsonl", "--margin", "0"]
    code, out, err = cli(*mining, "--negatives", "2", "--instruction", "Find:")
    assert code == 0, err
    assert re.search(r"^24 rows, \d+ negatives, \d+ rows without any$", out, re.M)
    assert "unmasked train supervised --base" in out
    code, _, err = cli(*mining)
    assert code == 2
    assert "mined.jsonl exists" in err
    for output, says in (("mined.txt", "should end in .jsonl"), ("a/b.jsonl", "a is no folder")):
        code, _, err = cli(*mining[:4], output)
        assert (code, says in err) == (2, True)
    code, _, err = cli(*mining[:4], "other.jsonl", "--depth", "2", "--skip", "2")
    assert code == 2
    assert "so that none is left. Fix: a larger --depth" in err
    assert not (tmp_path / "other.jsonl").exists()
    few = ["supervised.steps=2", "supervised.warmup_steps=1", "supervised.batch_size=4"]
    training = ["train", "supervised", "--base", tiny_decoder, "-o", "out", *few]
    code, out, err = cli(*training, "--data", "mined.jsonl")
    assert code == 0, err
    assert "saved  out/model" in out
    code, _, err = cli(*training[:5], "other", "--data", "minde.jsonl", *few)
    assert code == 2
    assert "did you mean 'mined.jsonl'?" in err


def test_train_one_stage_on_the_adapter_of_another(cli, tiny_decoder, texts, tmp_path):
    options = ["--data", texts, "mntp.steps=2", "mntp.batch_size=2", "mntp.block_length=16"]
    code, out, err = cli("train", "mntp", "--base", tiny_decoder, "-o", "first", *options)
    assert code == 0, err
    assert "saved  first/model" in out
    options = ["--data", texts, "simcse.steps=2", "simcse.batch_size=2"]
    code, out, err = cli("train", "simcse", "--base", "first/mntp", "-o", "second", *options)
    assert code == 0, err
    resolved = yaml.safe_load((tmp_path / "second/recipe.yaml").read_text())
    assert resolved["mntp"] is None
    assert resolved["name"] == "second"
    code, _, err = cli("train", "mntp", "--base", tiny_decoder, "--data", texts, "-o", "x", "a=1")
    assert code == 2
    assert "a: unknown key" in err


# --- encode, evaluate, doctor -------------------------------------------------------------------


def test_encode_files_and_standard_input(cli, tiny_decoder, tmp_path, sentences, monkeypatch):
    import io

    import pyarrow.parquet as pq

    from unmasked import LLM2Vec

    expected = LLM2Vec.from_pretrained(tiny_decoder, device="cpu").encode(sentences)
    lines = "\n".join(sentences) + "\n"
    (tmp_path / "a.txt").write_text(lines, encoding="utf-8")
    rows = [json.dumps({"id": i, "body": text}) for i, text in enumerate(sentences)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    code, out, err = cli("encode", tiny_decoder, "a.txt", "-o", "v.npy")
    assert (code, out) == (0, "8 vectors of 32 numbers in v.npy\n")
    assert "encoding 8/8" in err
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)

    options = ["-o", "v.parquet", "--text-column", "body", "--normalize"]
    assert cli("encode", tiny_decoder, "a.jsonl", *options)[0] == 0
    table = pq.read_table(tmp_path / "v.parquet")
    assert table["id"].to_pylist() == [str(i) for i in range(8)]
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(np.array(table["vector"].to_pylist()), unit, atol=1e-5)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert cli("encode", tiny_decoder, "-", "-o", "w.npy")[0] == 0
    np.testing.assert_allclose(np.load(tmp_path / "w.npy"), expected, atol=1e-5)

    before = listing(tmp_path)
    code, _, err = cli("encode", "no/such-model", "a.txt", "-o", "v.npy")
    assert (code, err) == (2, "error: v.npy exists. Fix: another name, or --overwrite.\n")
    code, _, err = cli("encode", "no/such-model", "a.jsonl", "-o", "u.npy")
    assert code == 2
    assert "a.jsonl, line 1: no column 'text' among id, body" in err
    assert listing(tmp_path) == before


def test_evaluate_against_the_causal_decoder(cli, tiny_decoder, tasks, tmp_path):
    options = [word for task in tasks for word in ("--tasks", task)]
    code, out, err = cli("convert", tiny_decoder, "-o", "model")
    assert code == 0, err
    code, out, _ = cli("evaluate", "model", *options)
    assert code == 0
    assert re.search(r"^sts +spearman +-?[\d.]+ +\[.+\]$", out, re.M)
    code, out, err = cli(
        "evaluate", "model", *options, "--against", "causal", "--base", tiny_decoder,
        "--json", "scores.json",
    )  # fmt: skip
    assert code == 0, err
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert {row["encoder"] for row in rows} == {
        "model", "causal_mean", "causal_weighted_mean", "causal_last_token",
    }  # fmt: skip
    ours, theirs = rows[:2]
    assert ours["gain"] is None
    assert theirs["gain"]["difference"] == pytest.approx(ours["score"] - theirs["score"])
    assert theirs["gain"]["low"] <= theirs["gain"]["difference"] <= theirs["gain"]["high"]
    assert out.count("causal_weighted_mean") == 2
    code, _, err = cli("evaluate", "model", *options, "--against", "causal")
    assert code == 2
    assert "has no causal mask any more" in err
    assert "--base" in err


def test_evaluate_several_models(cli, tiny_decoder, tasks, tmp_path):
    options = [word for task in tasks for word in ("--tasks", task)]
    words = "The\tDET\ncat\tNOUN\n\nA\tDET\ndog\tNOUN\n"
    for split in ("train", "dev"):
        (tmp_path / f"w_{split}.tsv").write_text(words)
    code, _, err = cli("convert", tiny_decoder, "-o", "model")
    assert code == 0, err
    options += ["--tasks", "words:w_dev.tsv"]
    code, out, err = cli("evaluate", "model", tiny_decoder, *options)
    assert code == 0, err
    assert re.search(r"^sts\.spearman +model ", out, re.M)
    same = (
        rf"^sts\.spearman +{re.escape(str(tiny_decoder))} .*\+0\.00 +\S+ +not clear: may be chance"
    )
    assert re.search(same, out.replace("[0.00, 0.00]", "-"), re.M), out
    assert "w_dev.upos accuracy" in out and "upos before" not in out
    code, out, _ = cli("evaluate", "model", tiny_decoder, *options, "--all")
    assert "w_dev.upos before accuracy" in out and "sts.pearson" in out
    code, _, err = cli("evaluate", "model", "--tasks", "words:absent.tsv")
    assert (code, "absent.tsv: no such file" in err) == (2, True)


def test_evaluate_refuses_a_json_file_in_no_folder_before_it_scores(cli, tasks):
    code, out, err = cli("evaluate", "nano", "--tasks", tasks[0], "--json", "nowhere/a.json")
    assert (code, out) == (2, "")
    assert err == "error: --json nowhere/a.json: there is no such folder. Fix: make it first.\n"


def test_doctor_knows_this_machine(cli):
    import torch

    code, out, _ = cli("doctor", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["torch"] == torch.__version__
    assert any(device.startswith("cpu ") for device in found["devices"])
    for extra in ("eval", "serve", "export", "corpus"):
        assert found[f"extra_{extra}"].startswith(("installed", f"pip install 'unmasked[{extra}]'"))
    code, out, _ = cli("doctor")
    assert code == 0
    assert re.search(r"^torch +" + re.escape(torch.__version__), out, re.M)


def test_doctor_examines_a_model(cli, tiny_decoder, tmp_path):
    from unmasked import LLM2Vec

    prompts = {"query": "Find the answer:\n", "bad": "query: "}
    LLM2Vec.from_pretrained(tiny_decoder, prompts=prompts, device="cpu").save(tmp_path / "model")
    code, out, _ = cli("doctor", "model", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["verdict"] == "full"
    assert found["bidirectional"] is True
    assert found["bos_added"] == ["<s>"]
    assert found["mntp_mask"] == "_"
    assert (found["width"], found["layers"], found["max_positions"]) == (32, 2, 128)
    assert found["parameters"] == 31392
    assert found["prompt"]["query"].startswith("stable")
    assert found["prompt"]["bad"].startswith("UNSTABLE in stock loaders: 'query: ' merges with")


def test_doctor_ends_with_2_for_a_model_that_stays_causal(cli, tiny_mamba):
    code, out, _ = cli("doctor", tiny_mamba)
    assert code == 2
    assert re.search(r"^bidirectional +no$", out, re.M)
    assert re.search(r"^model type +mamba$", out, re.M)
