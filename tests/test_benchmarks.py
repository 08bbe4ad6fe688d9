"""The benchmark of a GPU tells what failed and goes on; its parts compare before they time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from benchmarks import gpu, gpu_parts
from benchmarks.gpu_parts import Setting

TINY = Setting(torch.device("cpu"), tiny=True)


@pytest.fixture
def few_texts(monkeypatch):
    monkeypatch.setattr(Setting, "texts", lambda self, mix, count: [f"text {i}" for i in range(9)])
    monkeypatch.setattr(gpu_parts, "peak", lambda setting: 1e9)


def test_the_smallest_part_runs_with_a_tiny_model(few_texts):
    found = gpu_parts.encode(TINY, "Llama-3-8B")
    assert set(found) == {"short", "mixed"}
    assert found["short"]["least_cosine"] > 0.9999
    assert found["short"]["stock_best_batch"] in gpu_parts.RIVAL_BATCHES
    assert 0 <= found["short"]["waited"] <= 1


def test_nothing_is_timed_where_vectors_differ(few_texts, monkeypatch):
    monkeypatch.setattr(gpu_parts, "cosine", lambda first, second: 0.9)
    monkeypatch.setattr(gpu_parts, "speed", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(RuntimeError, match="vectors differ from stock's"):
        gpu_parts.encode(TINY, "Llama-3-8B")


def test_a_part_that_fails_is_reported_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    def broken():
        raise ValueError("no such kernel")

    def parts(setting, devices):
        return {"broken": broken, "whole": lambda: {"a": 1.5, "inner": {"b": np.float32(2)}}}

    monkeypatch.setattr(gpu, "parts", parts)
    with pytest.raises(SystemExit, match="failed: broken"):
        gpu.main(["--device", "cpu", "--tiny", "--json", str(tmp_path / "gpu.json")])
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["broken"]["failed"] == "ValueError: no such kernel"
    assert written["whole"]["a"] == 1.5
    printed = capsys.readouterr().out
    assert "| broken |  | failed ValueError: no such kernel" in printed
    assert "| whole | inner | b 2.0 |" in printed


def test_what_would_begin_too_late_is_left_out_and_says_so():
    report = gpu.run({"late": lambda: pytest.fail("it ran")}, TINY, minutes=-1)
    assert report == {"late": {"left_out": "-1 minutes were over"}}
