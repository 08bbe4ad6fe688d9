"""What `unmasked plan` says, against what a real step then does."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel, LlamaConfig
from typer.testing import CliRunner

from unmasked.checkpoint import adapters
from unmasked.checkpoint.loading import load_config
from unmasked.errors import ModelError
from unmasked.mask.opening import decoder_of
from unmasked.recipe.schema import Recipe
from unmasked.train.plan.cost import make_plan
from unmasked.train.plan.shapes import PARTITION, saved_activations

SHAPE = {
    "vocab_size": 8000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True,
}  # fmt: skip


def plan_of(base, data, probe=False, choice="auto", **stages):
    sections = {name: {"data": str(data)} | stage for name, stage in stages.items()}
    model = {"base": str(base), "compile": choice}
    recipe = Recipe.model_validate({"name": "t", "model": model, **sections})
    return recipe, make_plan(recipe, probe)


@pytest.fixture
def texts(tmp_path):
    lines = [f"the cat sat on the mat and looked at dog {i}" for i in range(400)]
    (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "texts.txt"


def test_steps_tokens_and_parameters(tiny_decoder, texts):
    _, plan = plan_of(
        tiny_decoder, texts,
        mntp={"steps": 7, "batch_size": 6, "block_length": 16, "lora": {"rank": 4},
              "gradient_accumulation": 2, "micro_batch_tokens": 32},
        simcse={"steps": 3, "batch_size": 8, "max_length": 16},
    )  # fmt: skip
    mntp, simcse = plan.stages
    assert (mntp.steps, mntp.tokens_per_step) == (7, 6 * 16 * 2)
    assert (mntp.rows, mntp.forwards) == (2, 6)
    assert simcse.rows == 16 and not simcse.assumed
    assert 10 <= simcse.length <= 16
    trunk = real_trunk(tiny_decoder)
    assert plan.parameters == sum(p.numel() for p in trunk.parameters())
    model = adapters.attach(trunk, rank=4)
    assert mntp.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert mntp.memory.optimiser == 2 * mntp.memory.gradients == 8 * mntp.trainable
    assert simcse.memory.logits == 0


def real_trunk(folder):
    """Built without the plan: the same config, with memory for its weights."""
    return AutoModel.from_config(load_config(folder))


@pytest.mark.parametrize("length", [16, 48])
def test_activations_are_what_autograd_keeps_of_a_real_forward(tiny_decoder, texts, length):
    _, plan = plan_of(tiny_decoder, texts, mntp={"lora": {"rank": 4}})
    counted = saved_activations(plan.stages[0].model, 3, length)
    model = adapters.attach(real_trunk(tiny_decoder), rank=4).train()
    assert counted == pytest.approx(kept_by(model, 3, length), rel=0.05)


def kept_by(model, rows, length):
    """Bytes that autograd keeps of a real forward."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=torch.zeros(rows, length, dtype=torch.int64), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    "backend",
    [PARTITION, pytest.param("inductor", marks=pytest.mark.slow)],
)
def test_compiled_layers_keep_what_is_counted(tiny_decoder, texts, backend):
    """The compiler computes again what is cheap, so less is kept than of plain layers."""
    stage = {"lora": {"rank": 4}, "block_length": 128, "batch_size": 8}
    plain, compiled = (
        plan_of(tiny_decoder, texts, choice=choice, mntp=stage)[1].stages[0]
        for choice in ("never", "always")
    )
    assert compiled.memory.activations < 0.8 * plain.memory.activations
    model = adapters.attach(real_trunk(tiny_decoder), rank=4).train()
    trunk = decoder_of(model)
    trunk.enable_input_require_grads()
    for layer in trunk.layers:
        layer.compile(dynamic=True, backend=backend)
    real = kept_by(model, 8, 128)
    assert compiled.memory.activations == pytest.approx(real, rel=0.15)


def test_layers_that_cannot_be_compiled_are_counted_as_they_are(
    tiny_decoder, texts, monkeypatch, caplog
):
    def fail(*_):
        raise RuntimeError("no such graph")

    monkeypatch.setattr("unmasked.train.plan.cost.saved_by_a_layer", fail)
    never, always = (
        plan_of(tiny_decoder, texts, choice=choice, mntp={})[1].stages[0].memory
        for choice in ("never", "always")
    )
    assert never == always
    assert "no such graph" in caplog.text


def test_gradient_checkpointing_and_full_training_are_counted(tiny_decoder, texts):
    stage = {"batch_size": 4, "block_length": 64, "lora": {"rank": 1}}
    plain, checkpointed, full = (
        plan_of(tiny_decoder, texts, mntp={**stage, **change})[1].stages[0]
        for change in ({}, {"gradient_checkpointing": True}, {"lora": {"method": "full"}})
    )
    assert checkpointed.memory.activations < plain.memory.activations
    assert checkpointed.flops > 1.3 * plain.flops
    assert full.trainable > plain.trainable and full.flops > plain.flops


@pytest.fixture
def pairs(tmp_path):
    rows = [{"query": f"cat {i % 10}", "positive": f"the dog {i}"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pairs.jsonl"


def supervised_plan(base, pairs, probe=False, **stage):
    stage = {"batch_size": 4, "max_length": 16, "steps": 5, "warmup_steps": 0, **stage}
    return plan_of(base, pairs, probe, supervised=stage)[1]


def test_first_layers_that_are_trained_as_well_are_counted(tiny_decoder, pairs):
    (plain,) = supervised_plan(tiny_decoder, pairs).stages
    (deep,) = supervised_plan(tiny_decoder, pairs, matryoshka_layers=[1]).stages
    assert deep.flops == pytest.approx(1.5 * plain.flops)  # one of two layers
    assert 1.4 < deep.memory.activations / plain.memory.activations < 1.7
    assert deep.memory[:3] == plain.memory[:3]
    checkpointed = supervised_plan(
        tiny_decoder, pairs, matryoshka_layers=[1], gradient_checkpointing=True
    )
    assert checkpointed.stages[0].memory.activations < deep.memory.activations


def test_a_teacher_that_encodes_is_counted(tiny_decoder, pairs):
    plain, taught = (
        supervised_plan(tiny_decoder, pairs, **change)
        for change in ({}, {"teacher": str(tiny_decoder)})
    )
    (without,), (stage,) = plain.stages, taught.stages
    teacher = stage.teacher
    assert without.teacher is None and without.memory.teaching == 0
    assert teacher.texts == 50  # ten queries, each four times, and forty documents
    assert stage.disk == without.disk + 50 * (4 * 32 + 8)
    weights = sum(p.nbytes for p in real_trunk(tiny_decoder).parameters())
    assert teacher.sizes.parameters * teacher.sizes.dtype.itemsize <= weights
    assert stage.memory.teaching > without.memory.weights + weights / 2
    assert stage.memory[:5] == without.memory[:5]
    layers = teacher.sizes.parameters - teacher.sizes.embedding
    least = 2 * layers * teacher.texts * teacher.length
    assert least < stage.flops - without.flops < 2 * least


def test_scores_of_the_rows_need_no_teacher(tiny_decoder, pairs):
    rows = [{"query": "cat", "positive": f"dog {i}", "score": 0.5} for i in range(9)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = {"loss": "cosent", "contrastive": 0}
    (stage,) = supervised_plan(tiny_decoder, pairs, teacher=teacher).stages
    assert stage.teacher is None and not stage.assumed


def test_a_teacher_that_is_not_there_is_an_error(tiny_decoder, pairs, tmp_path):
    with pytest.raises(ModelError, match=r"nowhere.*Fix"):
        supervised_plan(tiny_decoder, pairs, teacher=str(tmp_path / "nowhere"))


def test_the_time_of_depths_and_teacher_is_measured(tiny_decoder, pairs):
    teacher = {"teacher": str(tiny_decoder), "matryoshka_layers": [1]}
    (planned,) = supervised_plan(tiny_decoder, pairs, probe=True, **teacher).stages
    assert 0 < planned.taught_seconds < planned.seconds


def test_the_command_says_what_a_teacher_takes(tiny_decoder, pairs, tmp_path):
    from unmasked.cli import app

    section = {"data": str(pairs), "batch_size": 4, "steps": 5, "teacher": str(tiny_decoder)}
    section["warmup_steps"] = 0
    recipe = {"name": "t", "model": {"base": str(tiny_decoder)}, "supervised": section}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(recipe))
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / "t.yaml")])
    assert shown.exit_code == 0, shown.output
    for word in ("teacher's texts", "while it encodes", "memory per device"):
        assert word in shown.output


def test_the_command(tiny_decoder, tmp_path, texts):
    from unmasked.cli import app

    recipe = {
        "name": "t",
        "model": {"base": str(tiny_decoder)},
        "mntp": {"data": str(texts), "steps": 5, "batch_size": 2, "block_length": 16},
        "simcse": {"data": str(tmp_path / "missing.txt"), "steps": 5},
    }
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(recipe))
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / "t.yaml"), "mntp.steps=6", "--recipe"])
    assert shown.exit_code == 0, shown.output
    for word in ("memory per device", "tokens a step", "steps: 6", "is assumed"):
        assert word in shown.output
    assert "time" not in shown.stdout.splitlines()[-1]
    assert f"~ simcse: half of max_length is assumed for a text, as {tmp_path}/missing.txt is " in (
        " ".join(shown.output.split())
    )


def test_a_path_that_is_not_there_is_told_of_every_stage(tiny_decoder, tmp_path, texts):
    """Also where the plan does not need the texts, and behind a path that is there."""
    from unmasked.cli import app

    both = [str(texts), str(tmp_path / "gone.txt")]
    recipe = {"name": "t", "model": {"base": str(tiny_decoder)},
              "mntp": {"data": both, "block_length": 16}, "simcse": {"data": both}}  # fmt: skip
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(recipe))
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / "t.yaml")])
    assert shown.exit_code == 0, shown.output
    for stage in ("mntp", "simcse"):
        assert f"~ {stage}: {tmp_path}/gone.txt is not a file or folder" in shown.output
    assert "is assumed" not in shown.output


def use(folder, recipe):
    """A stage in a process of its own: (bytes that torch held at most, seconds of a step).

    What Python's own libraries take is no part of the plan, so the allocator is asked.
    """
    torch.set_num_threads(1)
    from unmasked.train.callback import Listener
    from unmasked.train.run import Run

    times = []
    listener = Listener(step=lambda *_: times.append(time.perf_counter()))
    Run(Recipe.model_validate(recipe), folder / "timed", None, listener).run()
    gaps = sorted(b - a for a, b in itertools.pairwise(times))
    (name,) = {"mntp", "simcse", "supervised"} & {k for k, section in recipe.items() if section}
    short = Recipe.model_validate({**recipe, name: {**recipe[name], "steps": 2}})
    gc.collect()  # what the first run held would be freed in the second one's count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        Run(short, folder / "measured").run()
    events = measured.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = itertools.accumulate(size for _, size in sorted(sizes, key=lambda pair: pair[0]))
    return max(held), gaps[len(gaps) // 2]


SECTIONS = {
    "mntp": {"batch_size": 8, "block_length": 256, "micro_batch_tokens": 2048},
    "simcse": {"batch_size": 64, "max_length": 64},
    "depths": {"batch_size": 16, "max_length": 64, "matryoshka_layers": [2, 4, 6]},
    "checkpointed depths": {
        "batch_size": 16, "max_length": 64, "matryoshka_layers": [4], "gradient_checkpointing": True
    },
    "a teacher at work": {"batch_size": 2, "max_length": 64, "teacher": {"loss": "kl"}},
    "a small teacher": {"batch_size": 16, "max_length": 64, "teacher": {"loss": "kl"}},
}  # fmt: skip
LARGER = {"hidden_size": 576, "intermediate_size": 2048}


def data_of(name, texts, folder):
    """The settings of a stage of that name, and the stage."""
    section = {"steps": 8, "log_steps": 1, "held_out": 0, "save_steps": 100, **SECTIONS[name]}
    section["warmup_steps"] = 0
    if name in ("mntp", "simcse"):
        return name, {**section, "data": str(texts)}
    lines = texts.read_text(encoding="utf-8").splitlines()
    file = folder / "pairs.jsonl"
    rows = ({"query": f"what is it? {line}", "positive": line} for line in lines)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return "supervised", {**section, "data": str(file)}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SECTIONS))
def test_memory_and_time_are_within_a_quarter_of_what_a_run_uses(
    name, tiny_tokenizer, tmp_path, texts, record_property
):
    """At 20 M parameters, where what Python and the allocator keep is small beside it."""
    from support.tiny import save_random

    base = save_random(tmp_path / "base", LlamaConfig(**SHAPE), tiny_tokenizer)
    stage, section = data_of(name, texts, tmp_path)
    if "teacher" in section:
        larger = LARGER if name == "a teacher at work" else {}
        teacher = save_random(tmp_path / "teacher", LlamaConfig(**SHAPE | larger), tiny_tokenizer)
        section["teacher"] = {**section["teacher"], "model": str(teacher)}
    torch.set_num_threads(1)
    recipe, plan = plan_of(base, texts, probe=True, **{stage: section})
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        memory, seconds = pool.submit(use, tmp_path / "run", recipe.model_dump()).result()
    (planned,) = plan.stages
    step = (planned.seconds - planned.taught_seconds) / planned.steps
    figures = (planned.memory.total, memory, step, seconds)
    record_property("planned and used, bytes and seconds of a step", figures)
    assert (name == "a teacher at work") == (planned.memory.total == planned.memory.teaching)
    assert memory == pytest.approx(planned.memory.total, rel=0.25), figures
    assert seconds == pytest.approx(step, rel=0.25), figures
