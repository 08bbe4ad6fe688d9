"""Killed at any moment and started again, a run ends as one that was left alone.

The runs are processes of their own, from a fork server that has the libraries loaded.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from unmasked.errors import OutputError
from unmasked.recipe.schema import Recipe

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["unmasked.train.run"])


def go(recipe: dict, path: str, largest_file: int | None = None) -> None:
    """A run, in a process that is killed; exit code 3 for what the user can mend."""
    import torch

    from unmasked.train.run import Run

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest in the background ignores it
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    try:
        Run(Recipe.model_validate(recipe), path).run()
    except OutputError as error:
        Path(path, "error.txt").write_text(str(error)[:200])
        os._exit(3)


def start(recipe: dict, path: Path, largest_file: int | None = None):
    process = PROCESSES.Process(target=go, args=(recipe, str(path), largest_file))
    process.start()
    return process


def finish(recipe: dict, path: Path) -> None:
    process = start(recipe, path)
    process.join(300)
    assert process.exitcode == 0


def steps_done(path: Path) -> int:
    """Steps logged so far, of all stages together; fewer where a line is half written."""
    done = 0
    for metrics in path.glob("*/metrics.jsonl"):
        lines = metrics.read_text(errors="replace").splitlines()
        done += max((json.loads(li)["step"] for li in lines if li.endswith("}")), default=0)
    return done


def kill_at(recipe: dict, path: Path, step: int, delay: float) -> bool:
    """Run until a step is logged and a little longer, then SIGKILL; whether it still ran."""
    process = start(recipe, path)
    while process.is_alive() and steps_done(path) < step:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def outcome(path: Path) -> dict[str, object]:
    """Weights byte for byte, and every line of metrics without what depends on the machine."""
    found: dict[str, object] = {}
    for folder in sorted(p.parent for p in path.glob("*/adapter_config.json")):
        found[f"{folder.name} weights"] = (folder / "adapter_model.safetensors").read_bytes()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert any("machine" in row for row in rows)
        found[f"{folder.name} metrics"] = [
            {key: value for key, value in row.items() if key != "machine"} for row in rows
        ]
    return found


def recipe_of(tiny_decoder: Path, folder: Path, mntp: int, simcse: int) -> dict:
    """Logs and checkpoints at steps that are no multiples of each other."""
    words = ["cat", "sat", "mat", "looked", "another", "dog", "near", "tree", "while", "rain"]
    draw = np.random.default_rng(0)
    lines = [" ".join(draw.choice(words, 9)) + f" {i}" for i in range(200)]
    (folder / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    stage = {
        "data": str(folder / "texts.txt"), "held_out": 10, "learning_rate": 1e-3,
        "log_steps": 4, "save_steps": 3, "eval_steps": 20, "lora": {"rank": 4},
    }  # fmt: skip
    return {
        "name": "test",
        "model": {"base": str(tiny_decoder), "max_length": 64},
        "mntp": {**stage, "steps": mntp, "batch_size": 4, "block_length": 16,
                 "gradient_accumulation": 2},
        "simcse": {**stage, "steps": simcse, "batch_size": 8, "max_length": 16},
    }  # fmt: skip


def killed_equals_whole(recipe: dict, folder: Path, moments: list[int], seed: int) -> None:
    finish(recipe, folder / "whole")
    expected = outcome(folder / "whole")
    draw = random.Random(seed)
    landed = [kill_at(recipe, folder / "killed", step, draw.uniform(0, 0.1)) for step in moments]
    assert all(landed)
    finish(recipe, folder / "killed")
    found = outcome(folder / "killed")
    assert found.keys() == expected.keys() and len(found) == 4
    for key, value in expected.items():
        assert found[key] == value, f"{key} differ after kills at {moments}"
    left = [p.name for p in (folder / "killed" / "mntp").iterdir() if p.suffix == ".tmp"]
    assert not left and not list((folder / "killed").glob("*/checkpoint-*"))


def test_b29_killed_twice_ends_the_same(tiny_decoder, tmp_path):
    """Killed in MNTP's second epoch, which has new masks, and in SimCSE, a run ends the same."""
    recipe = recipe_of(tiny_decoder, tmp_path, 40, 20)
    killed_equals_whole(recipe, tmp_path, [32, 50], seed=0)


@pytest.mark.slow
def test_b29_three_hundred_steps_killed_ten_times(tiny_decoder, tmp_path):
    moments = sorted(random.Random(1).sample(range(290), 10))
    killed_equals_whole(recipe_of(tiny_decoder, tmp_path, 200, 100), tmp_path, moments, seed=1)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tiny_decoder, tmp_path):
    """A limit on the size of a file stands for the full disk: optimizer.pt no longer fits."""
    recipe = recipe_of(tiny_decoder, tmp_path, 12, 4)
    finish(recipe, tmp_path / "whole")
    path = tmp_path / "full"
    assert kill_at(recipe, path, 4, 0.0)
    before = sorted((path / "mntp").glob("checkpoint-*"))
    largest = max(f.stat().st_size for f in before[-1].iterdir())
    process = start(recipe, path, largest - 1)
    process.join(120)
    assert process.exitcode == 3
    message = (path / "error.txt").read_text()
    assert "could not be written" in message and "is whole" in message
    assert sorted((path / "mntp").glob("checkpoint-*")) == before
    assert not (path / "mntp" / "checkpoint.tmp").exists()
    finish(recipe, path)
    assert outcome(path) == outcome(tmp_path / "whole")


def test_half_a_line_of_metrics_is_dropped(tmp_path):
    from unmasked.train.callback import _keep_lines

    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    _keep_lines(metrics, 4)
    assert [json.loads(line)["step"] for line in metrics.open()] == [2, 4]
    _keep_lines(metrics, 0)
    assert metrics.read_text() == ""
