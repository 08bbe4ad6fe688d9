"""What the trainers of all stages share: small checkpoints, one metrics file, a clean Ctrl-C.

The training loops are those of transformers and sentence-transformers. A checkpoint holds the
adapter (a few MB) beside optimiser, scheduler and random state, instead of the whole model.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unmasked import adapters

Report = Callable[[int, int, dict[str, float]], None]
"""Called at each log with the step, the number of steps, and what was measured."""


class AdapterCheckpoints:
    """Mixin for a `Trainer`: saves and restores only the adapter of its model."""

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        adapters.save_adapter(attached(self.model), output_dir or self.args.output_dir)

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        adapters.load_adapter(attached(self.model), resume_from_checkpoint)


def attached(model: nn.Module) -> PeftModel:
    """The adapter-carrying trunk inside a model."""
    return next(m for m in model.modules() if isinstance(m, PeftModel))


class RunCallback(TrainerCallback):
    """Metrics to a file, progress to the caller, and Ctrl-C into a checkpoint.

    Args:
        steps: stop after this many.
        metrics: JSON-lines file; lines of steps that are trained again are dropped first.
        tokens_per_step: real tokens of one optimiser step, for the speed; None if it varies.
        report: told about each log.
    """

    def __init__(
        self, steps: int, metrics: Path, tokens_per_step: int | None, report: Report | None
    ) -> None:
        self.steps = steps
        self.metrics = metrics
        self.tokens_per_step = tokens_per_step
        self.report = report
        self.interrupted = False
        self._started = (0.0, 0)
        self._previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._started = (time.perf_counter(), state.global_step)
        self.metrics.parent.mkdir(parents=True, exist_ok=True)
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= state.global_step]
            self.metrics.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        try:
            self._previous = signal.signal(signal.SIGINT, self._interrupt)
        except ValueError:  # not the main thread: the caller's handler stays
            self._previous = None

    def _interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True
        if state.global_step >= self.steps:
            control.should_training_stop = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        begun, first = self._started
        measured = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        seconds = time.perf_counter() - begun
        steps = state.global_step - first
        if "loss" in measured and self.tokens_per_step and seconds > 0:
            measured["tokens_per_second"] = round(steps * self.tokens_per_step / seconds, 1)
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **measured}) + "\n")
        if self.report is not None:
            self.report(state.global_step, self.steps, measured)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # half a line of a killed run


class Checkpoint(NamedTuple):
    """A saved state of a stage, and the step it was saved after."""

    step: int
    path: Path


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of an interrupted stage."""
    found = [
        Checkpoint(int(path.name.rsplit("-", 1)[1]), path)
        for path in folder.glob("checkpoint-*")
        if (path / "trainer_state.json").is_file()  # written last
    ]
    return max(found, default=None)


def stage_arguments(settings: Any, folder: Path, seed: int) -> dict[str, Any]:
    """Arguments of `TrainingArguments` that every stage takes from its settings."""
    schedules = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
    return {
        "output_dir": str(folder),
        # the learning rate may be scheduled over more steps than are run; RunCallback stops in time
        "max_steps": settings.schedule_steps or settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": schedules[settings.schedule],
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "logging_steps": settings.log_steps,
        "save_steps": settings.save_steps,
        "save_total_limit": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
    }
