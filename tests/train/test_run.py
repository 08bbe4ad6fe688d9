"""A run: how often it loads a model, and which prompts an encoder is scored with."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unmasked.compat.llm2vec import LLM2Vec
from unmasked.errors import RecipeError
from unmasked.forward import backbone, compiling
from unmasked.recipe.schema import BEFORE, Recipe, SimCSE
from unmasked.train.callback import Listener
from unmasked.train.fitting import tokens_of
from unmasked.train.run import Run
from unmasked.train.trainer import stage_arguments

INSTRUCTION = "Find the answer"


class Result:
    name, items = "probe", {}

    def __init__(self, model):
        self.scores = {"first": float(model.encode(["a text"])[0, 0])}


@pytest.fixture
def recipe(tiny_decoder, tmp_path) -> dict:
    texts = [f"the cat sat on the mat and looked at dog {i}" for i in range(40)]
    rows = [{"query": f"question {i}", "positive": f"answer {i}"} for i in range(40)]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    stage = {"steps": 1, "batch_size": 4, "held_out": 0, "warmup_steps": 0, "lora": {"rank": 2}}
    pairs = {"path": str(tmp_path / "pairs.jsonl"), "instruction": INSTRUCTION}
    return {
        "name": "test",
        "model": {"base": str(tiny_decoder), "max_length": 32},
        "mntp": {**stage, "data": str(tmp_path / "texts.txt"), "block_length": 16},
        "simcse": {**stage, "data": str(tmp_path / "texts.txt"), "max_length": 16},
        "supervised": {**stage, "data": [pairs], "max_length": 16},
    }


@pytest.fixture
def loaded(monkeypatch) -> list[tuple[int, bool]]:
    """The number of adapters of every model that is loaded, and whether its mask is open."""
    seen = []
    load = LLM2Vec.from_pretrained.__func__

    def counted(cls, base, merged=None, **options):
        seen.append((len(merged or ()), options.get("enable_bidirectional", True)))
        return load(cls, base, merged, **options)

    monkeypatch.setattr(LLM2Vec, "from_pretrained", classmethod(counted))
    return seen


def test_a_model_is_loaded_once_before_training_and_once_after_each_stage(recipe, loaded, tmp_path):
    Run(Recipe.model_validate(recipe), tmp_path / "run").run()
    assert loaded == [(0, True), (1, True), (2, True), (3, True)]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_a_compiled_run_that_is_interrupted_ends_as_a_plain_one(
    recipe, tmp_path, monkeypatch, checkpointing
):
    """Its layers are compiled anew when it continues, and plain again behind every stage."""
    calls, plain = [], recipe["model"]
    stage = {"steps": 4, "save_steps": 1, "log_steps": 1, "gradient_checkpointing": checkpointing}
    recipe = {"name": "test", "model": plain, "mntp": {**recipe["mntp"], **stage}}

    def backend(graph, _):
        def run(*given):
            calls.append(len(given))
            return graph.forward(*given)

        return run

    torch.compiler.reset()
    compiled_by = partial(compiling.compile_layers, backend=backend)
    monkeypatch.setattr(backbone, "compile_layers", compiled_by)
    Run(Recipe.model_validate(recipe), tmp_path / "plain").run()
    assert not calls  # auto, and no GPU
    recipe["model"] = {**plain, "compile": "always"}
    seen = []

    def interrupt(step, steps, measured):
        seen.append(len(calls))
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    whole = Recipe.model_validate(recipe)
    with pytest.raises(KeyboardInterrupt):
        Run(whole, tmp_path / "run", None, Listener(step=interrupt)).run()
    assert seen[1] > seen[0] > 0  # steps run what was compiled, not the comparison alone
    before = len(calls)
    Run(whole, tmp_path / "run").run()
    assert len(calls) > before
    torch.compiler.reset()
    ends = [load_file(tmp_path / n / "mntp/adapter_model.safetensors") for n in ("plain", "run")]
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, atol=1e-6, rtol=1e-5)


def test_a_stage_pays_for_compiling_by_its_settings_alone(recipe):
    given = Recipe.model_validate(recipe)
    tokens = {name: tokens_of(stage) for name, stage in given.stages()}
    assert tokens == {"mntp": 4 * 16, "simcse": 4 * 2 * 16 // 4, "supervised": 4 * 3 * 16 // 4}


def test_scores_take_two_more_loads_for_the_closed_mask_of_all_baselines(recipe, loaded, tmp_path):
    Run(Recipe.model_validate(recipe), tmp_path / "run", lambda model: [Result(model)]).run()
    before = [(0, True), (0, False), (0, True)]
    assert loaded == [*before, (1, True), (2, True), (3, True)]
    stages = json.loads((tmp_path / "run" / "results.json").read_text())["stages"]
    scores = {stage["name"]: stage["scores"]["probe.first"] for stage in stages}
    for mode in ("mean", "weighted_mean", "last_token"):
        alone = LLM2Vec.from_pretrained(
            recipe["model"]["base"], enable_bidirectional=False, pooling_mode=mode, max_length=32
        )
        assert scores[f"causal_{mode}"] == Result(alone).scores["first"]


def test_a_base_called_supervised_has_the_prompts_of_the_data_only_once_it_is_trained(
    recipe, tiny_decoder, tmp_path
):
    base = shutil.copytree(tiny_decoder, tmp_path / "before" / "supervised")
    content = {**recipe, "model": {"base": str(base)}, "mntp": None, "simcse": None}
    asked = []

    def score(model):
        asked.append(model.prompts.get("query") or "")
        return [Result(model)]

    encoder = Run(Recipe.model_validate(content), tmp_path / "run", score).run()
    assert [INSTRUCTION in prompt for prompt in asked] == [False] * 4 + [True]
    assert INSTRUCTION in encoder.prompts["query"]


def test_vectors_too_short_for_a_late_stage_are_refused_at_once(recipe, tmp_path):
    recipe["supervised"]["matryoshka"] = [64]
    with pytest.raises(RecipeError, match=r"supervised\.matryoshka: 64 given, but vectors have 32"):
        Run(Recipe.model_validate(recipe), tmp_path / "run").run()
    assert not Path(tmp_path / "run").exists()


def stages_of(folder: Path) -> dict[str, float]:
    stages = json.loads((folder / "results.json").read_text())["stages"]
    return {stage["name"]: stage["scores"]["probe.first"] for stage in stages}


def alone(name, **options) -> float:
    return Result(LLM2Vec.from_pretrained(name, max_length=32, **options)).scores["first"]


CAUSAL = {"causal_mean", "causal_weighted_mean", "causal_last_token"}


def test_a_run_that_begins_with_an_open_encoder_is_compared_with_the_decoder_behind_it(
    recipe, tiny_decoder, tmp_path
):
    first = {**recipe, "simcse": None, "supervised": None}
    Run(Recipe.model_validate(first), tmp_path / "first").run()
    base = tmp_path / "first" / "model"
    second = {**recipe, "model": {"base": str(base), "max_length": 32}, "mntp": None}
    run = Run(Recipe.model_validate(second), tmp_path / "second", lambda model: [Result(model)])
    run.run()
    scores = stages_of(tmp_path / "second")
    assert list(scores) == [*sorted(CAUSAL, key=list(scores).index), BEFORE, "simcse", "supervised"]
    closed = {"enable_bidirectional": False}
    assert scores["causal_mean"] == alone(tiny_decoder, **closed)
    assert scores[BEFORE] == alone(base) != scores["causal_mean"]
    card = (tmp_path / "second" / "model" / "README.md").read_text(encoding="utf-8")
    assert f"| {BEFORE} |" in card


@pytest.mark.parametrize("gone", [True, False], ids=["decoder gone", "decoder unknown"])
def test_nothing_is_called_causal_whose_mask_is_open(recipe, tiny_decoder, tmp_path, caplog, gone):
    """The decoder has been moved away, or the folder does not say which one it was."""
    decoder = shutil.copytree(tiny_decoder, tmp_path / "decoder")
    base = tmp_path / "before" / "model"
    LLM2Vec.from_pretrained(decoder).save(base)
    if gone:
        text = f"name: before\nmodel: {{base: {decoder}}}\n"
        (tmp_path / "before" / "recipe.yaml").write_text(text)
        shutil.rmtree(decoder)
    content = {**recipe, "model": {"base": str(base)}, "mntp": None, "simcse": None}
    run = Recipe.model_validate(content)
    Run(run, tmp_path / "run", lambda model: [Result(model)]).run()
    assert list(stages_of(tmp_path / "run")) == [BEFORE, "supervised"]
    assert ("no causal baseline" in caplog.text) == gone
    (tmp_path / "run" / "scores").joinpath("supervised.npz").unlink()
    again = Run(run, tmp_path / "run", lambda model: pytest.fail("scored twice"))
    again.run()


@pytest.mark.parametrize("how", ["as the base", "beside the base"])
def test_an_adapter_is_no_part_of_the_causal_decoder(recipe, tiny_decoder, tmp_path, how):
    first = {**recipe, "simcse": None, "supervised": None}
    Run(Recipe.model_validate(first), tmp_path / "first").run()
    adapter = str(tmp_path / "first" / "mntp")
    beside = {"base": str(tiny_decoder), "adapters": [adapter], "max_length": 32}
    model = {"base": adapter, "max_length": 32} if how == "as the base" else beside
    content = Recipe.model_validate({"name": "x", "model": model})
    Run(content, tmp_path / "run", lambda model: [Result(model)]).run()
    scores = stages_of(tmp_path / "run")
    assert set(scores) == {*CAUSAL, BEFORE}
    assert scores["causal_mean"] == alone(tiny_decoder, enable_bidirectional=False)
    assert scores[BEFORE] == alone(adapter)


def test_a_mask_that_the_recipe_leaves_closed_is_not_called_bidirectional(
    recipe, tiny_decoder, tmp_path
):
    model = {"base": str(tiny_decoder), "bidirectional": False}
    content = Recipe.model_validate({"name": "x", "model": model})
    Run(content, tmp_path / "run", lambda model: [Result(model)]).run()
    scores = stages_of(tmp_path / "run")
    assert set(scores) == {*CAUSAL, BEFORE} and scores[BEFORE] == scores["causal_mean"]


@pytest.mark.parametrize(
    ("given", "bf16"), [({}, True), ({"fp16": True}, False), ({"bf16": False}, False)]
)
def test_products_are_in_bfloat16_on_a_gpu_unless_asked_otherwise(
    monkeypatch, tmp_path, given, bf16
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    stage = SimCSE(data=["a.txt"], trainer=given)
    assert stage_arguments(stage, tmp_path / "simcse", 0)["bf16"] is bf16


@pytest.mark.parametrize(("horizon", "last"), [(None, 5), (3, 5), (9, 9)])
def test_no_schedule_ends_a_stage_before_its_steps(tmp_path, horizon, last):
    """With a constant rate, `schedule_steps` may be less than the steps."""
    stage = SimCSE(data=["a.txt"], steps=5, schedule="constant", schedule_steps=horizon)
    assert stage_arguments(stage, tmp_path / "simcse", 0)["max_steps"] == last
