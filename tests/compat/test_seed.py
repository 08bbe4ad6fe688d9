"""The seed system's two commands on nano, and its README's code on the result."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

from unmasked import LLM2Vec
from unmasked.cli.seed_scripts import run_script
from unmasked.compat.seed import parser, trainer_options
from unmasked.errors import DataError, RecipeError
from unmasked.recipe.schema import MNTP

ROOT = Path(__file__).parents[2]
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query:"
SMALL = ["--max_steps", "3", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps",
         "2", "--learning_rate", "1e-3", "--torch_dtype", "torch.float32", "--max_seq_length", "32",
         "--logging_steps", "1", "--do_eval", "--eval_steps", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    import argparse

    file = tmp_path_factory.mktemp("data") / "texts.txt"
    sentences = {
        line.strip() for m in (argparse, json, logging) for line in (m.__doc__ or "").split(".")
    }
    functions = [f for m in (np, json, logging) for f in vars(m).values() if callable(f)]
    sentences |= {" ".join((f.__doc__ or "").split()[:12]) for f in functions}
    file.write_text(
        "\n".join(sorted(" ".join(s.split()) for s in sentences)[:240]), encoding="utf-8"
    )
    return file


@pytest.fixture(scope="module")
def results(texts, tmp_path_factory):
    """A folder in which both commands were run, one after the other."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small = [word for word in SMALL if word != "--do_eval"]
        at = small.index("--eval_steps")
        evaluated = [*small[:at], "--do_eval", "True", *small[at:]]
        further = ["--eval_accumulation_steps", "1", "--mlm_probability", "0.3"]
        run_script(
            "mntp", ["--model_name", "nano/", "--data_path", str(texts), *evaluated, *further]
        )
        peft = ["--peft_model_name_or_path", "results/nano-mntp", "--simcse_dropout", "0.2"]
        run_script("simcse", ["--model_name", "nano", *peft, "--data_path", str(texts), *evaluated])
    return folder / "results"


def test_b50_b52_results_and_logs_are_where_they_were(results):
    """Results and logs are in the same folders; a trailing slash of the model is ignored."""
    for stage in ("mntp", "simcse"):
        folder = results / f"nano-{stage}"
        for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
            assert (folder / name).is_file(), name
        events = list((results.parent / "logs" / f"nano-{stage}").glob("events.out.tfevents*"))
        assert events
        assert (folder / "model" / "config.json").is_file()


def test_logs_can_be_moved_together_with_the_results(results, tmp_path):
    moved = shutil.copytree(results.parent, tmp_path / "moved", symlinks=True)
    link = moved / "logs" / "nano-mntp"
    assert link.is_symlink() and not link.readlink().is_absolute()
    assert (moved / "results").resolve() in link.resolve().parents
    assert list(link.glob("events.out.tfevents*"))


def test_every_flag_has_a_help_text_and_shows_its_default():
    for stage in ("mntp", "simcse"):
        made = parser(stage)
        assert [a.dest for a in made._actions if not a.help] == []
        shown = " ".join(made.format_help().split())
        assert "highest learning rate (default: 1e-05)" in shown


def test_b48_flags_the_seed_ignored_act(results):
    import yaml

    def settings(stage):
        return yaml.safe_load((results / f"nano-{stage}" / "recipe.yaml").read_text())[stage]

    mntp, simcse = settings("mntp"), settings("simcse")
    assert mntp["mask_probability"] == 0.3
    assert mntp["trainer"] == {"eval_accumulation_steps": 1}
    assert mntp["block_length"] == simcse["max_length"] == 32
    assert mntp["held_out"] == simcse["held_out"] > 0
    assert (simcse["attention_dropout"], simcse["temperature"]) == (0.2, 0.05)
    rows = [json.loads(line) for line in (results / "nano-mntp/mntp/metrics.jsonl").open()]
    assert [row["step"] for row in rows if "eval_perplexity" in row][:2] == [0, 2]
    adapter = json.loads((results / "nano-mntp" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (16, 32)


def test_b25_the_readme_of_the_seed_system_runs_on_the_result(results, caplog):
    """The code in the seed system's README runs; its model is causal, and a warning has the fix."""
    mntp, simcse = str(results / "nano-mntp"), str(results / "nano-simcse")
    tokenizer = AutoTokenizer.from_pretrained(mntp)
    tokenizer.padding_side = "left"

    def build(**more):
        model = AutoModel.from_pretrained(mntp, torch_dtype=torch.float32)
        model = PeftModel.from_pretrained(model, mntp)
        model = model.merge_and_unload()
        model = PeftModel.from_pretrained(model, simcse)
        return LLM2Vec(model, tokenizer, device="cpu", compat="llm2vec-0.2", **more)

    with caplog.at_level(logging.WARNING):
        causal = build()
    assert "enable_bidirectional=True" in caplog.text
    queries = [[INSTRUCTION, "medicine to take when you have a cold"], [INSTRUCTION, "a cure"]]
    q_reps = torch.nn.functional.normalize(causal.encode(queries), p=2, dim=1)
    d_reps = torch.nn.functional.normalize(causal.encode(["Rest.", "Surgery."]), p=2, dim=1)
    assert torch.mm(q_reps, d_reps.transpose(0, 1)).shape == (2, 2)
    mended = build(enable_bidirectional=True)
    given = {"device": "cpu", "dtype": "float32", "compat": "llm2vec-0.2"}
    own = LLM2Vec.from_pretrained("nano", [mntp, simcse], **given)
    torch.testing.assert_close(mended.encode(queries), own.encode(queries), atol=1e-4, rtol=0)
    assert (causal.encode(queries) - own.encode(queries)).abs().max() > 1e-2


def test_b25_each_result_loads_by_itself(results):
    first = LLM2Vec.from_pretrained(results / "nano-mntp", device="cpu")
    second = LLM2Vec.from_pretrained(
        "nano", [results / "nano-mntp", results / "nano-simcse"], device="cpu"
    )
    merged = LLM2Vec.from_pretrained(results / "nano-simcse" / "model", device="cpu")
    assert first.report.verdict == "full"
    np.testing.assert_allclose(second.encode(["a text"]), merged.encode(["a text"]), atol=1e-4)
    assert np.abs(first.encode(["a text"]) - second.encode(["a text"])).max() > 1e-4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trust_remote_code", "True"], "never run"),
        (["--merge_peft", "False"], "always merged"),
        (["--do_train", "False"], "nothing to do"),
        (["--pooling_mode", "max"], "pooling"),
        (["--lerning_rate", "1"], "did you mean 'learning_rate'"),
        (["--fp16"], "has no value"),
    ],
)
def test_b48_what_cannot_be_done_is_refused_with_a_reason(
    flags, said, texts, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    common = ["--model_name", "nano", "--peft_model_name_or_path", "x", "--data_path", str(texts)]
    with pytest.raises(RecipeError, match=said):
        run_script("simcse", [*common, *flags])
    assert not (tmp_path / "results").exists()


def test_a_value_that_no_recipe_takes_is_told(texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = r"mntp\.warmup_steps: -3 should be .* \(from the command line\)"
    with pytest.raises(RecipeError, match=told):
        given = ["--model_name", "nano", "--data_path", str(texts), "--warmup_steps", "-3"]
        run_script("mntp", given)


def test_b50_missing_data_says_which_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"data/wiki1m_for_simcse\.txt.*--data_path"):
        run_script("mntp", ["--model_name", "nano"])


def test_b49_masking_does_not_depend_on_the_name():
    for name in ("mistralai/Mistral-7B-v0.3", "meta-llama/Llama-2-7b", "anything"):
        flags = parser("mntp").parse_args(["--model_name", name])
        assert (flags.mask_style, flags.mlm_probability) == ("bert", 0.2)


def test_b53_flags_are_those_of_the_installed_transformers():
    assert trainer_options(["--adam_beta1", "0.8", "--fp16", "True"]) == {
        "adam_beta1": 0.8,
        "fp16": True,
    }
    with pytest.raises(RecipeError, match="no_such_flag"):
        trainer_options(["--no_such_flag", "1"])


@pytest.mark.parametrize("value", ["1e-8", "1E-8", "1.0e-8", "0.00000001", "+1e-08"])
def test_a_number_is_a_number_as_python_writes_it(value):
    """YAML reads 1e-8 as a text, which the optimiser cannot use; the recipe converts it."""
    given = trainer_options(["--adam_epsilon", value, f"--optim_args={value}x"])
    stage = MNTP(trainer=given | trainer_options(["--run_name", "lr=1e-8"]))
    assert stage.trainer == {"adam_epsilon": 1e-8, "optim_args": f"{value}x", "run_name": "lr=1e-8"}


def test_a_value_that_is_no_yaml_is_refused_with_a_fix_that_works():
    with pytest.raises(RecipeError, match=r"^--optim_args \{: .*Fix: .*--optim_args \"'\{'\""):
        trainer_options(["--optim_args", "{"])
    assert trainer_options(["--optim_args", "'{'"]) == {"optim_args": "{"}


def test_b48_further_arguments_reach_the_trainer(tmp_path):
    from unmasked.recipe.schema import MNTP
    from unmasked.train.trainer import stage_arguments

    stage = MNTP(trainer={"adam_beta1": 0.5, "eval_accumulation_steps": 2})
    arguments = stage_arguments(stage, tmp_path / "mntp", seed=1)
    assert (arguments["adam_beta1"], arguments["eval_accumulation_steps"]) == (0.5, 2)
    with pytest.raises(RecipeError, match=r"mntp\.trainer.*'adam_bta1', did you mean 'adam_beta1'"):
        stage_arguments(MNTP(trainer={"adam_bta1": 0.5}), tmp_path / "mntp", seed=1)


def test_b12_the_cache_folder_is_the_one_that_libraries_use(tmp_path):
    code = f"""
from unmasked.compat.seed import parser, prepare_environment
flags = ["--model_name", "x", "--cache_dir", {str(tmp_path)!r}]
prepare_environment(parser("mntp").parse_args(flags))
from huggingface_hub.constants import HF_HUB_CACHE
print(HF_HUB_CACHE)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path)


def test_the_env_file_is_read_and_overrides_nothing(tmp_path, monkeypatch):
    import os

    from unmasked.compat.seed import read_environment

    monkeypatch.setenv("UNMASKED_KEPT", "mine")
    monkeypatch.setenv("UNMASKED_READ", "")
    monkeypatch.delenv("UNMASKED_READ")
    for name in ("UNMASKED_FIRST", "UNMASKED_BARE", "UNMASKED_HASH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    text = "\ufeffUNMASKED_FIRST=1\n# a comment\nexport UNMASKED_READ='a=b'\nUNMASKED_KEPT=other\n"
    text += 'no value\nUNMASKED_BARE=word # why\nUNMASKED_HASH="a # b" # why\n'
    (tmp_path / ".env").write_text(text, encoding="utf-8")
    read_environment(tmp_path / ".env")
    assert os.environ["UNMASKED_FIRST"] == "1"
    assert os.environ["UNMASKED_READ"] == "a=b"
    assert os.environ["UNMASKED_BARE"] == "word"
    assert os.environ["UNMASKED_HASH"] == "a # b"
    assert os.environ["UNMASKED_KEPT"] == "mine"


@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_the_scripts_are_thin_and_speak(stage, tmp_path):
    script = ROOT / f"train_{stage}.py"
    assert len(script.read_text().splitlines()) < 15
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0
    assert "--mask_token_type" in done.stdout
