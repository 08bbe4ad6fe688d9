"""Trackers by name; what is always written; what is measured."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from unmasked.errors import MissingExtraError
from unmasked.recipe.schema import Recipe
from unmasked.train.run import Run


def recipe_of(tiny_decoder, tmp_path, **more):
    lines = [f"the cat sat on the mat and looked at dog {i}" for i in range(100)]
    (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    stage = {"data": str(tmp_path / "texts.txt"), "steps": 4, "batch_size": 8, "log_steps": 2}
    return Recipe.model_validate(
        {
            "name": "t",
            "model": {"base": str(tiny_decoder), "max_length": 32},
            "simcse": {**stage, "max_length": 16},
            **more,
        }
    )


def test_metrics_and_tensorboard_are_always_written(tiny_decoder, tmp_path):
    Run(recipe_of(tiny_decoder, tmp_path), tmp_path / "run").run()
    logged = [json.loads(line) for line in (tmp_path / "run/simcse/metrics.jsonl").open()]
    rows = [row for row in logged if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    told = {"loss", "learning_rate", "grad_norm", "padding", "alignment", "uniformity", "machine"}
    assert told <= rows[0].keys()
    assert rows[0]["machine"].keys() == {"tokens_per_second", "steps_runtime", "memory_gb"}
    assert rows[0]["padding"] == 0
    assert 0 < rows[0]["alignment"] < 4 and rows[0]["uniformity"] < 0
    events = EventAccumulator(str(tmp_path / "run/simcse")).Reload()
    tags = {tag.removeprefix("train/") for tag in events.Tags()["scalars"]}
    assert {"loss", "tokens_per_second", "memory_gb", "alignment", "uniformity"} <= tags


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything(
    name, tiny_decoder, tmp_path, monkeypatch
):
    monkeypatch.setattr("unmasked.train.run.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=rf"pip install .*\[{name}\]"):
        Run(recipe_of(tiny_decoder, tmp_path, trackers=[name]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tracker_is_told_what_the_metrics_say_and_is_ended(tiny_decoder, tmp_path, monkeypatch):
    told, ended = [], []

    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            told.append((args.run_name, args.project))

        def on_log(self, args, state, control, logs, **_):
            told.append({"step": state.global_step, **logs})

    def found(names):
        assert names == ["wandb"]
        return [Tracker]

    monkeypatch.setattr("unmasked.train.run.find_spec", lambda _: True)
    monkeypatch.setattr("unmasked.train.fitting.get_reporting_integration_callbacks", found)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda: ended.append(True)))
    Run(recipe_of(tiny_decoder, tmp_path, trackers=["wandb"]), tmp_path / "run").run()
    assert told[0] == ("run-simcse", "unmasked")
    losses = [logs for logs in told[1:] if "loss" in logs]
    rows = [json.loads(line) for line in (tmp_path / "run/simcse/metrics.jsonl").open()]
    rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == [2, 4]
    for logs, row in zip(losses, rows, strict=True):
        assert logs == {k: v for k, v in row.items() if k != "machine"} | row["machine"]
    assert ended == [True]
