"""Encoding and a step of every stage with the tensors of a pretended GPU: no device is mixed up."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.pretended_gpu import USED, pretended_gpu
from transformers import Trainer

from unmasked import LLM2Vec
from unmasked.recipe.schema import Recipe
from unmasked.train import fitting
from unmasked.train.stages import fit

TEXTS = [f"The {n}th river is {'very ' * (n % 4)}long." for n in range(40)]
SHORT = {"steps": 2, "batch_size": 4, "held_out": 4, "log_steps": 1, "eval_steps": 2}
STAGES = {
    "mntp": {"block_length": 16},
    "mntp apart": {"block_length": 16, "documents": "apart"},
    "mntp checkpointed": {"block_length": 16, "gradient_checkpointing": True},
    "simcse": {},
    "simcse checkpointed": {"gradient_checkpointing": True},
    "supervised": {"matryoshka": [16], "false_negative_margin": 0.1},
    "supervised cached": {"mini_batch_tokens": 200},
}
WAITS = {
    "mntp": 1,
    "mntp apart": 3,
    "mntp checkpointed": 1,
    "simcse": 2,
    "simcse checkpointed": 2,
    "supervised": 4,
    "supervised cached": 100,
}
"""How often, at most, the host waits for the GPU in a forward and backward pass."""


@pytest.fixture
def waits(monkeypatch):
    with pretended_gpu(monkeypatch) as found:
        yield found


@pytest.mark.parametrize("mode", ["weighted_mean", "last_token"])
def test_encoding_does_not_wait_for_the_gpu(monkeypatch, tiny_decoder, mode):
    given = {"pooling_mode": mode, "dtype": "bfloat16"}
    expected = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", **given).encode(TEXTS)
    with pretended_gpu(monkeypatch) as waits:
        model = LLM2Vec.from_pretrained(tiny_decoder, device="cuda", **given)
        assert model.backbone.unpackable is None
        waits.clear()
        found = model.encode(TEXTS)
        assert not waits
        assert model.encode(TEXTS, convert_to_tensor=True).is_cuda
        assert len(model.encode_words([text.split() for text in TEXTS[:2]])) == 2
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((found * expected).sum(axis=1) / lengths).min() > 0.999


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_trains_on_a_gpu(monkeypatch, tmp_path, tiny_decoder, waits, name):
    kind = name.split()[0]
    data = tmp_path / "data.jsonl"
    rows = [{"text": t, "query": t[:9], "positive": t, "negative": t[::-1]} for t in TEXTS]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = {"data": [str(data)], "warmup_steps": 0, "trainer": {"save_strategy": "no"}}
    recipe = Recipe.model_validate(
        {"name": "x", "model": {"base": str(tiny_decoder)}, kind: SHORT | given | STAGES[name]}
    )
    monkeypatch.setattr(fitting, "_save_result", lambda *_: None)
    steps, real = [], Trainer.training_step

    def training_step(self, *args, **kwargs):
        waits.clear()
        loss = real(self, *args, **kwargs)
        steps.append(list(waits))
        waits.clear()
        return loss

    monkeypatch.setattr(Trainer, "training_step", training_step)
    ((_, stage),) = recipe.stages()
    encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cuda")
    folder = tmp_path / kind
    folder.mkdir()
    fit(fitting.StageSetup(folder, encoder, recipe, lambda *_: None), stage)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert ({"varlen", "dropout"} if kind == "simcse" else {"varlen"}) == USED
    assert len(steps) == 2
    assert len(steps[1]) <= WAITS[name], steps[1]
    # Neither copies of batches nor a check of the loss make the host wait.
    assert not [wait for wait in waits if "send_to_device" in wait or "_run_epoch" in wait]
