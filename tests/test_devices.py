"""Two processes take the steps of one, and only the first of them speaks and writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from unmasked.errors import RecipeError
from unmasked.train import devices

SCRIPT = Path(__file__).parent / "processes.py"


def start(count: int, *command: str) -> list[subprocess.CompletedProcess[str]]:
    """The same command in several processes, told of each other as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(count):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(count)}
        threads = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                env={**os.environ, **(ranks | meeting if count > 1 else {}), **threads},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    done = []
    for process in processes:
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err[-3000:]
        done.append(subprocess.CompletedProcess(command, 0, out, err))
    return done


@pytest.mark.parametrize("kind", ["mntp", "simcse"])
def test_b37_two_processes_have_the_gradient_of_one(kind, tiny_decoder, tmp_path):
    """Of the whole batch: scored tokens are counted, and negatives taken, across processes."""
    for count in (1, 2):
        start(count, str(SCRIPT), kind, str(tiny_decoder), str(tmp_path))
    one = torch.load(tmp_path / f"{kind}-1-0.pt")
    first, second = (torch.load(tmp_path / f"{kind}-2-{rank}.pt") for rank in range(2))
    assert len(one) == 2
    for step in range(2):
        assert torch.equal(first[step], second[step])
        apart = (first[step] - one[step]).norm() / one[step].norm()
        assert apart < 1e-5, f"step {step + 1}: {apart:.1e}"
    rows = [
        [json.loads(line) for line in (tmp_path / f"metrics-{kind}-{n}.jsonl").open()]
        for n in (1, 2)
    ]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_b38_a_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert devices.rows_per_device(12, "mntp.batch_size") == 4
    with pytest.raises(RecipeError, match=r"3 devices\. Fix: mntp\.batch_size=30 or 33"):
        devices.rows_per_device(32, "mntp.batch_size")


@pytest.mark.parametrize(("rows", "most", "part"), [(32, 4, 4), (32, 5, 4), (7, 4, 1), (3, 9, 3)])
def test_a_batch_is_cut_into_equal_parts(rows, most, part):
    assert devices.micro_batch(rows, most) == part


def test_the_first_process_alone_speaks_and_writes(tiny_decoder, tmp_path):
    words = ["cat sat mat", "another dog", "near the tree", "while it rains"]
    (tmp_path / "texts.txt").write_text("\n".join(f"{w} {i}" for w in words for i in range(50)))
    (tmp_path / "sts.tsv").write_text(
        "score\tsentence1\tsentence2\n5\ta cat\tcat\n1\ta dog\train\n3\ttree\ttrees\n"
    )
    stage = {"data": "texts.txt", "steps": 2, "batch_size": 4, "log_steps": 1, "held_out": 8}
    recipe = {
        "name": "two",
        "model": {"base": str(tiny_decoder), "max_length": 32},
        "mntp": {**stage, "block_length": 16, "eval_steps": 2},
        "evaluate": {"tasks": ["sts.tsv"], "bootstrap": 10},
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(recipe))
    before = Path.cwd()
    try:
        os.chdir(tmp_path)
        first, second = start(2, "-m", "unmasked", "run", "two.yaml", "-o", "run")
    finally:
        os.chdir(before)
    assert "bidirectional" in first.stdout and "saved" in first.stdout
    assert second.stdout == ""
    assert "mntp" not in second.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/mntp/metrics.jsonl").open()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert len(list((tmp_path / "run/mntp").glob("events.out.tfevents*"))) == 1
    stages = json.loads((tmp_path / "run/results.json").read_text())["stages"]
    assert len({s["name"] for s in stages}) == len(stages) == 5
    assert (tmp_path / "run/model/config.json").is_file()
