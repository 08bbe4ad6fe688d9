"""The one callback of every stage: it measures, reports, stops at Ctrl-C and completes checkpoints.

``metrics.jsonl`` is part of what resumes exactly: a run that was killed, at any step and in any
way, ends with the lines of a run that was not. What depends on the machine and the hour (speed,
memory, run times) therefore stands under ``machine`` in a line; everything else is the same each
time. The sums of a logging interval that is still open are saved by the trainer with the state of
the callback. Cost: one small all-reduce per step on several devices, and none on one.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from unmasked.files.writing import write_text
from unmasked.train import checkpoints, devices

OnLog = Callable[[int, int, dict[str, float]], None]
"""Called at each log with the step, the number of steps, and what was measured."""

MACHINE = ("_runtime", "_per_second", "memory_gb")
"""Endings of the names of what depends on the machine."""


class Tally:
    """Sums of what the forwards of a logging interval measured, as means over the devices.

    On one device the values are added in the order and the precision in which they come. Numbers
    that were saved as JSON continue to the same bits, as Python's floats hold a float32 exactly.

    Attributes:
        since: the step of the last log.
        sums: name → number or scalar tensor.
    """

    def __init__(self) -> None:
        self.since = 0
        self.sums: dict[str, Any] = {}
        self._forwards: list[Mapping[str, Tensor]] = []

    def add(self, **measured: Tensor) -> None:
        """Note what one forward of the step measured; scalars stay on their device."""
        self._forwards.append({name: value.detach() for name, value in measured.items()})

    def end_step(self, interrupted: bool, device: torch.device) -> bool:
        """Add the step to the sums; tells whether any process was interrupted.

        Every process must call this.
        """
        forwards, self._forwards = self._forwards, []
        if devices.world() > 1:
            step: dict[str, Any] = {"interrupted": torch.tensor(float(interrupted))}
            for forward in forwards:
                _add(step, forward)
            step = devices.mean(step, device)
            interrupted = bool(step.pop("interrupted") > 0)
            forwards = [step]
        for forward in forwards:
            _add(self.sums, forward)
        return interrupted

    def state(self) -> dict[str, Any]:
        """What `load` reads back, as plain numbers."""
        return {"since": self.since, "sums": {k: _number(v) for k, v in self.sums.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue with what `state` told."""
        self.since, self.sums = int(state["since"]), dict(state["sums"])

    def end_interval(self, step: int) -> dict[str, float]:
        """The metrics of the steps since the last log; begins anew."""
        sums = {name: _number(value) for name, value in self.sums.items()}
        steps, forwards = step - self.since, sums.pop("forwards")
        self.since, self.sums = step, {}
        loss, tokens, places = (sums.pop(name) for name in ("loss", "tokens", "places"))
        means = {name: value / forwards for name, value in sums.items()}
        return {"loss": loss / steps, "padding": 1 - tokens / places, **means}


def _add(sums: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value


def _number(value: Any) -> float:
    number: float = value.item() if isinstance(value, Tensor) else value
    return number


class StageCallback(TrainerCallback, ExportableState):
    """What a `StageTrainer` does besides training.

    Args:
        steps: stop after this many.
        metrics: JSON-lines file; lines of steps that are trained again are dropped first.
        notify: called at each log; None for nobody.

    Attributes:
        tally: what the trainer adds to.
        interrupted: whether Ctrl-C was pressed, in any process.
    """

    def __init__(self, steps: int, metrics: Path, notify: OnLog | None = None) -> None:
        self.steps = steps
        self.metrics = metrics
        self.notify = notify
        self.tally = Tally()
        self.interrupted = False
        self._seconds = 0.0  # spent in the steps since the last log, or since the start
        self._begun = 0.0
        self._tokens_before: float = 0  # of the interval, counted before the start

    def state(self) -> dict[str, Any]:
        """What the trainer saves in a checkpoint and hands back when training begins."""
        return {"args": {}, "attributes": self.tally.state()}

    @contextmanager
    def catching_interrupts(self) -> Iterator[None]:
        """In the block, the first Ctrl-C ends training after the step; the second raises."""
        try:
            previous = signal.signal(signal.SIGINT, self._interrupt)
        except ValueError:  # not the main thread, which alone may do this
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if devices.world() > 1:  # each has its own dropout; a checkpoint brings its own state
            torch.manual_seed(args.seed + devices.rank())
        self.tally.load(state.stateful_callbacks[type(self).__name__]["attributes"])
        self._tokens_before = _number(self.tally.sums.get("tokens", 0))
        if state.is_world_process_zero and self.metrics.exists():
            _keep_lines(self.metrics, state.global_step)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Tell data and samplers the epoch: accelerate forgets the data when it skips batches."""
        loader = given["train_dataloader"]
        told = [loader.dataset]
        sampler = loader.batch_sampler
        while sampler is not None:
            told.append(sampler)
            sampler = getattr(sampler, "batch_sampler", None)
        for listener in told:
            if hasattr(listener, "set_epoch"):
                listener.set_epoch(int(state.epoch or 0))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._begun = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self._seconds += time.perf_counter() - self._begun
        self.interrupted = self.tally.end_step(self.interrupted, args.device)
        if self.interrupted:
            control.should_save = True
        if self.interrupted or state.global_step >= self.steps:
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
        """Put what was tallied into the trainer's logs, before the callbacks after this one."""
        if logs is None or "train_runtime" in logs:
            return  # the trainer's last word, about the part of the stage since the last start
        if "loss" in logs:
            tokens = _number(self.tally.sums["tokens"]) - self._tokens_before
            speed = tokens * args.world_size / max(self._seconds, 1e-9)
            logs |= self.tally.end_interval(state.global_step) | {"epoch": logs.pop("epoch")}
            logs["tokens_per_second"] = round(speed, 1)
            logs["memory_gb"] = round(devices.peak_memory(args.device) / 1e9, 3)
            self._tokens_before, self._seconds = 0, 0.0
        if not state.is_world_process_zero:
            return
        measured = {k: float(v) for k, v in logs.items() if isinstance(v, int | float)}
        line: dict[str, Any] = {"step": state.global_step}
        line |= {k: v for k, v in measured.items() if not k.endswith(MACHINE)}
        if machine := {k: v for k, v in measured.items() if k.endswith(MACHINE)}:
            line["machine"] = machine
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.notify is not None:
            self.notify(state.global_step, self.steps, measured)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Complete the checkpoint that the trainer has written, once every process has."""
        devices.wait()
        if state.is_world_process_zero:
            checkpoints.complete(checkpoints.place(args.output_dir, state.global_step))


def _keep_lines(metrics: Path, step: int) -> None:
    """Drop what is trained again: every line after a step, half a line, all of them at step 0."""
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    write_text(metrics, "".join(line + "\n" for line in lines if step and _step_of(line) <= step))


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # half a line of a killed run
