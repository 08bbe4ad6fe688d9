"""demo, run, train, mine, plan, and the shipped recipes, as a user meets them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess

import yaml
from support.commands import COMMAND, hear_interrupts, listing

from unmasked.evaluate.compare import compare_stages
from unmasked.recipe.files import load_recipe


def test_recipes(cli, tmp_path):
    code, out, _ = cli("recipes", "list")
    assert code == 0
    assert re.search(
        r"^mistral-7b +mistralai/Mistral-7B-Instruct-v0.2, apache-2.0$", out, re.MULTILINE
    )
    shown = cli("recipes", "show", "nano")[1]
    assert yaml.safe_load(shown)["name"] == "nano"
    code, out, _ = cli("recipes", "copy", "nano", "mine.yaml")
    assert code == 0
    assert (tmp_path / "mine.yaml").read_text(encoding="utf-8") == shown
    assert "next   unmasked run ./mine.yaml" in out
    code, _, err = cli("recipes", "copy", "nano", "mine.yaml")
    assert (code, err) == (2, "error: mine.yaml exists. Fix: give another name.\n")
    assert "did you mean 'nano'?" in cli("recipes", "show", "nan")[2]


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
    (gain,) = compare_stages(tmp_path / "out", "sts.spearman", samples=50).gains.values()
    verdict = "worse, clear of zero" if gain.high < 0 else "clear of zero"
    if gain.low <= 0 <= gain.high:
        verdict = "not clear: may be chance"
    gained, low, high = (100 * value for value in (gain.difference, gain.low, gain.high))
    expected = f"simcse {gained:+.2f} over {best}, 95 % interval [{low:.2f}, {high:.2f}]: {verdict}"
    assert f"sts.spearman: {expected}" in out.splitlines()
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
    # Not even the command that is kept; a lock is written to by some releases of filelock.
    assert changed <= {"recipe.yaml", ".lock"}
    assert "nothing to do" in again and "done   out/model" in again
    told = [line for line in again.splitlines() if not line.startswith("nothing to do")]
    assert told == out.replace("saved  out", "done   out").splitlines()

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
    assert "sts.tvs is not a file" in err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_saves_and_the_same_command_continues(recipe, tmp_path, cli):
    overrides = ["simcse=null", "evaluate.tasks=[]", "mntp.steps=100000", "mntp.eval_steps=100000"]
    command = [*COMMAND, "run", str(recipe), *overrides, "-o", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
        preexec_fn=hear_interrupts,
    )  # fmt: skip
    try:
        for line in running.stderr:
            if line.startswith("mntp ") and "/100,000" in line:
                break
        running.send_signal(signal.SIGINT)
        last = running.communicate(timeout=300)[1].splitlines()[-1]
    finally:
        running.kill()
    assert running.returncode == 130
    (checkpoint,) = (tmp_path / "out/mntp").glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    saved = f"mntp at step {step:,} of 100,000"
    assert last == f"interrupted: out: saved: {saved}; run the same command to continue"
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


def test_ctrl_c_before_the_first_checkpoint_says_that_nothing_is_saved(
    cli, recipe, tmp_path, monkeypatch
):
    from unmasked.train import run

    def interrupted(*_):
        raise KeyboardInterrupt  # the second Ctrl-C, or one while a model is loaded

    with monkeypatch.context() as patch:
        patch.setattr(run, "fit", interrupted)
        code, _, err = cli("run", recipe, "evaluate.tasks=[]", "-o", "out")
    assert code == 130
    how = "no step is saved yet; run the same command to begin anew"
    assert err.splitlines()[-1] == f"interrupted: out: {how}"
    with monkeypatch.context() as patch:
        patch.setattr(run, "fit", interrupted)
        code, _, err = cli("run", recipe, "-o", "scored")
    how = "saved: 4 encoders scored; run the same command to continue"
    assert err.splitlines()[-1] == f"interrupted: scored: {how}"


def test_settings_are_explained(cli, tmp_path):
    code, out, _ = cli("recipes", "explain", "mntp.learning_rate")
    assert (code, out.splitlines()[0]) == (
        0, "mntp.learning_rate: a number more than 0; default 5.0e-05",
    )  # fmt: skip
    assert "Highest learning rate" in out
    code, _, err = cli("recipes", "explain", "learning_rate")  # without its section
    assert code == 2 and "did you mean 'mntp.learning_rate'? Allowed: mntp.learning_rate, " in err
    code, _, err = cli("recipes", "explain", "mntp.learning_rat")
    assert (code, "did you mean 'mntp.learning_rate'?" in err) == (2, True)
    code, out, _ = cli("recipes", "copy", "nano", "mine.yaml", "--explain")
    assert code == 0
    text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    assert (
        "  # Highest learning rate, which is reached after warm-up. (a number more than 0" in text
    )
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe("nano")
    code, out, _ = cli("train", "simcse", "--help")
    assert "simcse.temperature: a number more than 0; default 0.05" in out
    assert "mntp." not in out.partition("Settings, as NAME=VALUE")[2]


def test_mine_and_train_supervised(cli, tiny_decoder, tmp_path):
    rows = [{"query": f"question {i}", "positive": f"answer {i} {i * 7}"} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mining = ["mine", tiny_decoder, "pairs.jsonl", "-o", "mined.jsonl", "--margin", "0"]
    code, out, err = cli(*mining, "--negatives", "2", "--instruction", "Find:")
    assert code == 0, err
    assert re.search(r"^24 rows, \d+ negatives, \d+ rows without any$", out, re.M)
    assert "most rows have none" not in err
    mined = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert {row["instruction"] for row in mined} == {"Find:"}
    (tmp_path / "more.txt").write_text("a document\n\nanother\n")
    (tmp_path / "more.jsonl").write_text('{"body": "a document"}\n{"body": "another"}\n')
    for number, corpus in enumerate(("more.txt", "more.jsonl:text=body")):
        code, _, err = cli(*mining[:4], f"{number}.jsonl", *mining[5:], "--corpus", corpus)
        assert code == 0, err
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()
    code, _, err = cli(*mining[:3], "-o", "shallow.jsonl", "--depth", "4")
    assert "most rows have none" in err and "Fix: --depth 1000" in err
    assert "unmasked train supervised --base" in out
    code, _, err = cli(*mining)
    assert code == 2
    assert "mined.jsonl exists" in err
    for output, says in (("mined.txt", "should end in .jsonl"), ("a/b.jsonl", "a is not a folder")):
        code, _, err = cli(*mining[:4], output)
        assert (code, says in err) == (2, True)
    code, _, err = cli(*mining[:4], "other.jsonl", "--depth", "2", "--skip", "2")
    assert code == 2
    assert "so none is left. Fix: a larger --depth" in err
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
    assert resolved["name"] == "second" and resolved["model"]["max_length"] == 512
    code, _, err = cli("convert", tiny_decoder, "-o", "short", "--max-length", 40)
    assert code == 0, err
    code, _, err = cli("train", "simcse", "--base", "short", "-o", "third", *options)
    assert code == 0, err  # it is scored, and saved, with the longest input that it had
    settings = json.loads((tmp_path / "third/model/llm2vec_config.json").read_text())
    assert settings["max_length"] == 40
    code, _, err = cli("train", "mntp", "--base", tiny_decoder, "--data", texts, "-o", "x", "a=1")
    assert code == 2
    assert "a: unknown key" in err
