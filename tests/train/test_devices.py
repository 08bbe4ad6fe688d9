"""Two processes take the steps of one, and only the first of them speaks and writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.processes import (
    environment,
    free_port,
    pairs,
    record,
    refused_on_cpus,
    run_once,
    run_twice,
    together,
)

from unmasked.errors import RecipeError
from unmasked.train import checkpoints, devices

LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
"""What `accelerate launch --use_fsdp --fsdp_version 2` tells its processes."""
ON_CPUS = {"ACCELERATE_TORCH_DEVICE": "cpu"}


def start(count: int, *command: str) -> list[subprocess.CompletedProcess[str]]:
    """The same command in several processes, told of each other as torchrun does."""
    port = free_port()
    threads = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **environment(rank, count, port), **threads},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    done = []
    for process in processes:
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err[-3000:]
        done.append(subprocess.CompletedProcess(command, 0, out, err))
    return done


@pytest.mark.parametrize("kind", ["mntp", "simcse", "supervised"])
def test_b37_two_processes_have_the_gradient_of_one(kind, tiny_decoder, tmp_path):
    """Two processes have the gradient of one with the whole batch: tokens, negatives are shared.

    Both where each has all weights (DDP) and where they share them, layer by layer (FSDP2).
    """
    given = (kind, str(tiny_decoder), tmp_path)
    together(1, record, *given, "one")
    together(2, record, *given, "whole")
    together(2, record, *given, "shared", **ON_CPUS, **LAUNCHED)
    one = torch.load(tmp_path / "one-0.pt")["gradients"]
    assert len(one) == 2
    for name in ("whole", "shared"):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        assert first["cut"] == (3 if name == "shared" else 0)  # two layers, and what is left
        for step in range(2):
            assert torch.equal(first["gradients"][step], second["gradients"][step])
            apart = (first["gradients"][step] - one[step]).norm() / one[step].norm()
            assert apart < 1e-5, f"{name}, step {step + 1}: {apart:.1e}"
        rows = [
            [json.loads(line) for line in (tmp_path / f"{n}.jsonl").open()] for n in ("one", name)
        ]
        for a, b in zip(*rows, strict=True):
            assert a.keys() == b.keys()
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def run_recipe(tiny_decoder, folder, stages: list, lora: dict, dtype: str, **stage) -> dict:
    """Stages with checkpoints and logs at steps that are no multiples of each other."""
    lines = [" ".join(row[key] for key in ("query", "positive")) for row in pairs(100)]
    (folder / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    rows = "\n".join(
        json.dumps({k: v for k, v in row.items() if k != "source"}) for row in pairs(60)
    )
    (folder / "pairs.jsonl").write_text(rows, encoding="utf-8")
    shared = {"steps": 5, "batch_size": 4, "log_steps": 1, "save_steps": 2, "held_out": 8,
              "eval_steps": 4, "learning_rate": 1e-3, "warmup_steps": 0, "lora": lora,
              "gradient_checkpointing": True, **stage}  # fmt: skip
    texts = {**shared, "data": str(folder / "texts.txt")}
    sections = {
        "mntp": {**texts, "block_length": 16, "gradient_accumulation": 2},
        "simcse": {**texts, "max_length": 16},
        "supervised": {
            **shared, "data": [str(folder / "pairs.jsonl")], "mini_batch_tokens": 40,
        },
    }  # fmt: skip
    model = {"base": str(tiny_decoder), "max_length": 32, "dtype": dtype}
    return {"name": "test", "model": model, **{name: sections[name] for name in stages}}


@pytest.mark.parametrize(
    ("asked", "stages", "lora", "dtype"),
    [
        ("launched", ["supervised"], {"rank": 3, "method": "dora"}, "bfloat16"),
        ("in_recipe", ["mntp", "simcse"], {"method": "full"}, "float32"),
    ],
    ids=["launched", "in_recipe"],
)
def test_shared_weights_are_saved_whole_and_a_run_continues(
    asked, stages, lora, dtype, tiny_decoder, tmp_path
):
    """FSDP2, asked for on the command line and in the recipe: stopped and not, to the bit."""
    settings = {"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}}
    shared = {"trainer": settings} if asked == "in_recipe" else {}
    recipe = run_recipe(tiny_decoder, tmp_path, stages, lora, dtype, **shared)
    more = LAUNCHED if asked == "launched" else {}
    together(2, run_twice, recipe, tmp_path, **ON_CPUS, **more)
    left_alone, stopped = (outcome(tmp_path / name) for name in ("left_alone", "stopped"))
    assert len(left_alone) == 2 * len(stages) + 1
    for key, value in left_alone.items():
        assert stopped[key] == value, f"{key} differ"
    assert not list(tmp_path.glob("*/*/checkpoint*")) and not list(tmp_path.glob("*/*/*.tmp"))
    together(2, run_once, run_recipe(tiny_decoder, tmp_path, stages, lora, dtype), tmp_path)
    for file in (tmp_path / "unshared").glob("*/*.safetensors"):
        expected = load_file(file)
        found = load_file(tmp_path / "stopped" / file.relative_to(tmp_path / "unshared"))
        assert found.keys() == expected.keys()
        one, other = (
            torch.cat([v.float().flatten() for v in w.values()]) for w in (expected, found)
        )
        assert (one - other).norm() / one.norm() < 1e-5


def outcome(run: Path) -> dict[str, object]:
    """Weights byte for byte, and the lines of metrics without what depends on the machine."""
    found: dict[str, object] = {
        str(file.relative_to(run)): file.read_bytes() for file in run.glob("*/*.safetensors")
    }
    for file in run.glob("*/metrics.jsonl"):
        rows = [json.loads(line) for line in file.open()]
        found[str(file.relative_to(run))] = [
            {key: value for key, value in row.items() if key != "machine"} for row in rows
        ]
    return found


def test_weights_are_shared_among_accelerators_only():
    devices.check_sharding(False, "mntp.trainer.fsdp")
    with pytest.raises(RecipeError, match=r"one process here\. Fix: leave out mntp\.trainer\.fsdp"):
        devices.check_sharding(True, "mntp.trainer.fsdp")
    together(2, refused_on_cpus)
    together(2, refused_on_cpus, **LAUNCHED)


@pytest.mark.parametrize(
    ("asked", "dtype", "message"),
    [
        ({"fsdp_version": 1}, torch.float32, r"FSDP1 .*Fix: .*--use_fsdp --fsdp_version 2"),
        ({"activation_checkpointing": True}, torch.float32, r"mntp\.gradient_checkpointing=true"),
        ({}, torch.uint8, r"mntp\.lora\.method qlora: .*Fix: .*lora\.method=lora"),
    ],
)
def test_what_cannot_be_shared_is_refused(asked, dtype, message):
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **asked})
    trainer = Mock(is_fsdp_enabled=True, **{"accelerator.state.fsdp_plugin": plugin})
    weight = torch.nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False)
    with pytest.raises(RecipeError, match=message):
        devices.prepare_sharding(trainer, torch.nn.ParameterDict({"weight": weight}), "mntp")


@pytest.mark.parametrize("shared", [True, False])
def test_a_checkpoint_of_shared_weights_continues_with_shared_weights(shared, tmp_path):
    (tmp_path / ("optimizer.pt" if shared else "optimizer.bin")).touch()
    given = "without" if shared else "with"
    with pytest.raises(RecipeError, match=f"made {given} weights sharded"):
        checkpoints.check_optimizer(Mock(is_fsdp_enabled=shared), tmp_path)


def test_what_a_stage_asks_of_accelerate_is_not_asked_by_the_next(monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    with devices.own_environment():
        os.environ |= {"FSDP_VERSION": "1", "ACCELERATE_USE_FSDP": "true"}
    assert os.environ["FSDP_VERSION"] == "2" and "ACCELERATE_USE_FSDP" not in os.environ


def test_b38_a_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert devices.rows_per_device(12, "mntp.batch_size") == 4
    with pytest.raises(RecipeError, match=r"3 devices\. Fix: mntp\.batch_size=30 or 33"):
        devices.rows_per_device(32, "mntp.batch_size")


@pytest.mark.parametrize(("rows", "most", "part"), [(32, 4, 4), (32, 5, 4), (7, 4, 1), (3, 9, 3)])
def test_a_batch_is_cut_into_equal_parts(rows, most, part):
    assert devices.micro_batch(rows, most) == part


@pytest.fixture
def two_yaml(tiny_decoder, tmp_path, monkeypatch) -> Path:
    """A recipe of one stage and one task, in the working folder."""
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
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_process_alone_speaks_and_writes(two_yaml):
    first, second = start(2, "-m", "unmasked", "run", "two.yaml", "-o", "run")
    assert "bidirectional" in first.stdout and "saved" in first.stdout
    assert second.stdout == ""
    assert "mntp" not in second.stderr
    lines = Path("run/mntp/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert len(list(Path("run/mntp").glob("events.out.tfevents*"))) == 1
    stages = json.loads(Path("run/results.json").read_text())["stages"]
    assert len({s["name"] for s in stages}) == len(stages) == 5
    assert Path("run/model/config.json").is_file()


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves_once_and_the_same_command_continues(two_yaml):
    def launch(folder: str, stop_after: int | None = None) -> str:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
        command = ["unmasked", "run", "two.yaml", "mntp.steps=60", "evaluate.tasks=[]"]
        running = subprocess.Popen(
            [sys.executable, *launcher, *command, "-o", folder],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        metrics = Path(folder, "mntp/metrics.jsonl")
        while stop_after is not None and running.poll() is None:
            if metrics.exists() and f'"step": {stop_after},' in metrics.read_text():
                os.killpg(running.pid, signal.SIGINT)  # as a terminal does
                break
            time.sleep(0.01)
        _, told = running.communicate(timeout=300)
        assert (running.returncode == 0) == (stop_after is None), told[-3000:]
        return told

    launch("whole")
    told = launch("stopped", stop_after=5)
    assert "interrupted: stopped: saved: mntp at step " in told
    assert "of 60; run the same command to continue" in told
    assert len(list(Path("stopped/mntp").glob("checkpoint-*"))) == 1
    assert not Path("stopped/mntp/checkpoint.tmp").exists()
    launch("stopped")
    assert outcome(Path("stopped")) == outcome(Path("whole"))
