"""The callback of every stage: it measures, reports, stops at Ctrl-C and completes checkpoints.

``metrics.jsonl`` resumes exactly, too: a run that was killed, at any step and in any way, ends with
the same lines as a run that was not. So whatever differs between two runs of one recipe (speed,
memory, run times) is under ``machine`` in a line; everything else is reproducible. Cost: one small
all-reduce per step on several devices, and none on one.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from unmasked.errors import RecipeError
from unmasked.files.writing import write_text
from unmasked.train import checkpoints, devices

OnLog = Callable[[int, int, dict[str, float]], None]
"""Called at each log with the step, the number of steps, and the measurements."""
MACHINE = ("_runtime", "_per_second", "memory_gb")
"""How the names of measurements end that depend on the machine."""


class StageCallback(TrainerCallback, ExportableState):
    """Everything that a `StageTrainer` does besides training.

    The trainer saves this callback's state in a checkpoint and restores it when training begins:
    the sums of all forwards since the last log. JSON keeps them bit by bit, since a Python float
    represents every float32 and float64 exactly.

    Args:
        steps: number of steps after which training stops.
        metrics: JSON-lines file. Lines of steps that are trained again are removed first.
        notify: called at each log, if given.
        data: its `set_epoch` is called in each epoch, if it has one; accelerate does not call it
            when it skips batches.

    Attributes:
        interrupted: whether Ctrl-C was pressed, in any process.
    """

    def __init__(
        self, steps: int, metrics: Path, notify: OnLog | None = None, data: Any = None
    ) -> None:
        self.steps = steps
        self.metrics = metrics
        self.notify = notify
        self.data = data
        self.interrupted = False
        self._since = 0  # step of the last log
        self._sums: dict[str, Any] = {}  # of all forwards since then, averaged over the devices
        self._forwards: list[Mapping[str, Tensor]] = []  # measurements of the current step
        self._tokens_before: float = 0  # tokens in the restored sums: not trained in this process
        self._seconds = self._begun = 0.0

    def add(self, **measured: Tensor) -> None:
        """Note what one forward of training measured; scalars stay on their device."""
        self._forwards.append({name: value.detach() for name, value in measured.items()})

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain numbers."""
        return {"args": {}, "attributes": {"since": self._since, "sums": _as_numbers(self._sums)}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if devices.world() > 1:  # each device has its own dropout; a checkpoint restores its state
            torch.manual_seed(args.seed + devices.rank())
        saved = state.stateful_callbacks[type(self).__name__]["attributes"]
        self._since, self._sums = saved["since"], saved["sums"]
        self._tokens_before = self._sums.get("tokens", 0)
        if state.is_world_process_zero and self.metrics.exists():
            _keep_lines(self.metrics, state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seconds += time.perf_counter() - self._begun
        forwards, self._forwards = self._forwards, []
        if devices.world() > 1:
            step: dict[str, Any] = {"interrupted": torch.tensor(float(self.interrupted))}
            for forward in forwards:
                _add(step, forward)
            forwards = [step := devices.mean(step, args.device)]
            self.interrupted = bool(step.pop("interrupted") > 0)
        for forward in forwards:  # always in this order, on which the rounding of a sum depends
            _add(self._sums, forward)
        is_last = state.global_step >= self.steps
        control.should_save |= self.interrupted
        control.should_training_stop |= self.interrupted or is_last
        # fp16 skips a step whose loss is not finite; otherwise the weights are NaN from here on.
        told = (control.should_log or control.should_save or is_last) and not args.fp16
        if told and not math.isfinite(loss := float(self._sums["loss"])):
            stage = self.metrics.parent.name
            raise RecipeError(  # before a checkpoint replaces the last sound one
                f"the loss of {stage} is {loss} after step {self._since}, up to step "
                f"{state.global_step}: training has diverged. Fix: another output folder, with a "
                f"lower {stage}.learning_rate or a longer {stage}.warmup_steps."
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the measurements to the trainer's logs, where later callbacks find them as well."""
        if logs is None or "train_runtime" in logs:
            return  # the trainer's summary, which covers only the time since the last start
        if "loss" in logs:
            self._measure(logs, args, state.global_step)
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

    def _measure(self, logs: dict[str, Any], args: Any, step: int) -> None:
        """Add the metrics of the steps since the last log, and reset the sums."""
        sums, epoch = _as_numbers(self._sums), logs.pop("epoch")
        tokens, forwards = sums.pop("tokens"), sums.pop("forwards")
        logs["loss"] = sums.pop("loss") / (step - self._since)
        logs["padding"] = 1 - tokens / sums.pop("places")
        logs |= {name: value / forwards for name, value in sums.items()}
        logs["epoch"] = epoch  # stays the last of the reproducible ones
        trained = (tokens - self._tokens_before) * args.world_size
        logs["tokens_per_second"] = round(trained / max(self._seconds, 1e-9), 1)
        logs["steps_runtime"] = round(self._seconds, 3)
        logs["memory_gb"] = round(devices.peak_memory(args.device) / 1e9, 3)
        self._since, self._sums, self._tokens_before, self._seconds = step, {}, 0, 0.0

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint as complete, once every process has written its part."""
        devices.wait()
        if state.is_world_process_zero:
            checkpoints.complete(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    @contextmanager
    def catching_interrupts(self) -> Iterator[None]:
        """Within the block, the first Ctrl-C ends training after the step; the second raises."""

        def interrupt(*_: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        try:
            previous = signal.signal(signal.SIGINT, interrupt)
        except ValueError:  # only the main thread may set a signal handler
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def _add(sums: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value


def _as_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.item() if isinstance(v, Tensor) else v for k, v in values.items()}


def _keep_lines(metrics: Path, step: int) -> None:
    """Keep the lines up to a step (none for step 0); a line that a kill cut short is removed."""

    def step_of(line: str) -> float:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            return float("inf")  # the run was killed while it wrote this line

    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    write_text(metrics, "".join(line + "\n" for line in lines if step and step_of(line) <= step))


@dataclass
class Listener:
    """Functions that a run calls as it proceeds; each of them may be left out."""

    stage: Callable[[str], None] = lambda name: None
    step: OnLog = lambda step, steps, measured: None
    scored: Callable[[str, dict[str, float]], None] = lambda stage, scores: None
