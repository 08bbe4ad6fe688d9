"""What the trainers of all stages share: small atomic checkpoints, exact metrics, a clean Ctrl-C.

The training loops are those of transformers and sentence-transformers. A checkpoint holds the
adapter (a few MB) beside optimiser, scheduler and random state, instead of the whole model. It is
written aside, flushed and renamed, so that a kill or a full disk never leaves half of one behind.

``metrics.jsonl`` is part of what resumes exactly: a run that was cut off, at any step and in any
way, ends with the lines of one that was not. Its rule: what depends on the machine and the hour
(speed, memory, run times) stands under ``machine`` in a line, all else is the same each time.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unmasked.errors import OutputError, RecipeError, nearest
from unmasked.train import devices, saving
from unmasked.train.checkpoints import ASIDE, PROGRESS, put_in_place, unsaved

Report = Callable[[int, int, dict[str, float]], None]
"""Called at each log with the step, the number of steps, and what was measured."""

MACHINE = ("_runtime", "_per_second", "memory_gb")
"""Ends of the names of what depends on the machine."""


class Tally:
    """Sums since the last log; a checkpoint keeps them, so that the next log is the same.

    Attributes:
        since: the step of the last log.
    """

    def __init__(self) -> None:
        self.since = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add scalars; they stay on their device."""
        for name, value in values.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()

    def share(self, accelerator: Any) -> dict[str, float]:
        """The sums over all processes, as means over them; every process must ask."""
        if accelerator.num_processes > 1 and self._sums:
            names = sorted(self._sums)
            stacked = torch.stack([self._sums[name].double() for name in names])
            shared = accelerator.reduce(stacked.to(accelerator.device), "mean")
            self._sums = dict(zip(names, shared, strict=True))
        return {name: value.item() for name, value in self._sums.items()}

    def close(self, step: int) -> None:
        """Begin anew after a log."""
        self.since = step
        self._sums = {}

    def state(self) -> dict[str, Any]:
        """For JSON, without loss."""
        return {"since": self.since, "sums": {k: v.item() for k, v in self._sums.items()}}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """The other way round."""
        self.since = int(state["since"])
        self._sums = {k: torch.tensor(v, device=device) for k, v in state["sums"].items()}


class AdapterCheckpoints:
    """Mixin for a `Trainer`: adapter-only checkpoints, whole or absent, and tallied metrics."""

    _aside: str | None = None

    @property
    def _run(self: Any) -> RunCallback:
        found: RunCallback = next(
            c for c in self.callback_handler.callbacks if isinstance(c, RunCallback)
        )
        return found

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        model = trained(self.model)
        state = saving.gather(model)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        saving.save(model, folder, state)
        tally = json.dumps(self._run.tally.state())
        (folder / PROGRESS).write_text(tally, encoding="utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`_save` gathers what is sharded; the trainer would gather the frozen weights too."""
        self._save(output_dir)

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            saving.save_optimizer(self, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        saving.load(trained(self.model), resume_from_checkpoint)
        state = (Path(resume_from_checkpoint) / PROGRESS).read_text(encoding="utf-8")
        self._run.tally.load(json.loads(state), self.args.device)

    def _get_output_dir(self: Any, trial: Any = None) -> str:
        return self._aside or str(super()._get_output_dir(trial))  # type: ignore[misc]

    def _save_checkpoint(self: Any, model: Any, trial: Any = None) -> None:
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self._run.tally.share(self.accelerator)
        self._aside = str(folder / ASIDE)
        try:
            if self.args.should_save:
                shutil.rmtree(self._aside, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                put_in_place(folder / ASIDE / name, folder / name)
        except (OSError, RuntimeError) as error:  # torch's writer knows RuntimeError only
            shutil.rmtree(self._aside, ignore_errors=True)
            raise OutputError(unsaved(folder, self.state.global_step, error)) from error
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()

    def training_step(self: Any, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> Tensor:
        real, computed = self._count(inputs)
        loss: Tensor = super().training_step(model, inputs, *rest)  # type: ignore[misc]
        counts = {"loss": loss, "tokens": real, "places": computed, "batches": torch.tensor(1)}
        extra = getattr(getattr(self, "loss", None), "measured", {})
        self._run.tally.add({**counts, **{f"mean_{name}": v for name, v in extra.items()}})
        self._run.tokens = self._run.tokens + real
        return loss

    def _count(self: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Real tokens of a batch, and the places the network computes for them."""
        views = getattr(getattr(self, "loss", None), "views", 1)
        masks = [v for key, v in inputs.items() if key.endswith("attention_mask")]
        if not masks:
            whole = torch.tensor(inputs["input_ids"].numel())
            return whole, whole
        real = torch.stack([mask.sum() for mask in masks]).sum() * views
        backbone = getattr(self.model, "backbone", None)
        if getattr(backbone, "unpackable", None) is None:
            return real, real
        return real, torch.tensor(sum(mask.numel() for mask in masks) * views)

    def log(self: Any, logs: dict[str, float], *rest: Any) -> None:
        if "loss" in logs:
            tally = self._run.tally
            sums = tally.share(self.accelerator)
            logs["loss"] = sums["loss"] / (self.state.global_step - tally.since)
            logs["padding"] = 1 - sums["tokens"] / sums["places"]
            for name in sums:
                if name.startswith("mean_"):
                    logs[name.removeprefix("mean_")] = sums[name] / sums["batches"]
            tally.close(self.state.global_step)
        super().log(logs, *rest)  # type: ignore[misc]


def trained(model: Any) -> nn.Module:
    """The trunk inside a stage's model, with its adapter if it has one."""
    found: nn.Module = model.trunk if hasattr(model, "trunk") else model.backbone.auto_model
    return found


class RunCallback(TrainerCallback):
    """Metrics to a file, progress to the caller, and Ctrl-C into a checkpoint.

    Args:
        steps: stop after this many.
        metrics: JSON-lines file; lines of steps that are trained again are dropped first.
        report: told about each log.
    """

    def __init__(self, steps: int, metrics: Path, report: Report | None) -> None:
        self.steps = steps
        self.metrics = metrics
        self.report = report
        self.interrupted = False
        self.tally = Tally()
        self.tokens: Tensor | int = 0
        self._seconds = 0.0
        self._begun = 0.0
        self._previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if devices.world() > 1:  # dropout of its own on each; a checkpoint brings its own state
            torch.manual_seed(args.seed + devices.rank())
        if state.is_world_process_zero:
            self.metrics.parent.mkdir(parents=True, exist_ok=True)
            if self.metrics.exists():
                _keep_lines(self.metrics, state.global_step)
        try:
            self._previous = signal.signal(signal.SIGINT, self._interrupt)
        except ValueError:  # not the main thread: the caller's handler stays
            self._previous = None

    def _interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Tell data and samplers the epoch: accelerate leaves out the data when it resumes."""
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
        self.interrupted = devices.any_of(self.interrupted, args.device)
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
        if logs is None or "train_runtime" in logs:
            return  # the trainer's last word, about the part of the stage since the last start
        if "loss" in logs:
            tokens = int(self.tokens) * args.world_size
            logs["tokens_per_second"] = round(tokens / max(self._seconds, 1e-9), 1)
            logs["memory_gb"] = round(devices.peak_memory(args.device) / 1e9, 3)
            self.tokens, self._seconds = 0, 0.0
        if not state.is_world_process_zero:
            return
        measured = {k: float(v) for k, v in logs.items() if isinstance(v, int | float)}
        line: dict[str, Any] = {"step": state.global_step}
        line |= {k: v for k, v in measured.items() if not k.endswith(MACHINE)}
        if machine := {k: v for k, v in measured.items() if k.endswith(MACHINE)}:
            line["machine"] = machine
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.report is not None:
            self.report(state.global_step, self.steps, measured)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)


def _keep_lines(metrics: Path, step: int) -> None:
    """Drop what is trained again: every line after a step, half a line, all of them at step 0."""
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line + "\n" for line in lines if step and _step_of(line) <= step]
    aside = metrics.with_name(metrics.name + ".tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(metrics)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # half a line of a killed run


def stage_arguments(
    settings: Any, folder: Path, seed: int, most_rows: int | None = None, **own: Any
) -> dict[str, Any]:
    """Arguments of `TrainingArguments` that every stage takes from its settings.

    Args:
        settings: of the stage.
        folder: of the stage.
        seed: of the run.
        most_rows: of a forward; a batch is cut into equal parts of no more, for stages whose loss
            is a sum over rows. None leaves it whole.
        own: further arguments of the stage; those that the settings name under ``trainer`` win.

    Raises:
        RecipeError: the batch does not divide among the devices, ``trainer`` names an argument that
            there is not, or wants weights shared where they cannot be.
    """
    devices.check_sharding(bool(settings.trainer.get("fsdp")), f"{folder.name}.trainer.fsdp")
    allowed = TrainingArguments.__dataclass_fields__
    for name in settings.trainer:
        if name not in allowed:
            raise RecipeError(
                f"{folder.name}.trainer: unknown argument of TrainingArguments '{name}'"
                f"{nearest(name, allowed)}"
            )
    schedules = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
    rows = devices.rows_per_device(settings.batch_size, f"{folder.name}.batch_size")
    part = rows if most_rows is None else devices.micro_batch(rows, most_rows)
    on_cpu = not torch.cuda.is_available()
    return {
        "output_dir": str(folder),
        # the learning rate may be scheduled over more steps than are run; RunCallback stops in time
        "max_steps": settings.schedule_steps or settings.steps,
        "per_device_train_batch_size": part,
        "gradient_accumulation_steps": settings.gradient_accumulation * (rows // part),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": schedules[settings.schedule],
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "logging_steps": settings.log_steps,
        "save_steps": settings.save_steps,
        "disable_tqdm": True,
        "report_to": "none",  # `trackers` puts in what is wanted
        "run_name": f"{folder.parent.name}-{folder.name}",
        "project": "unmasked",
        "seed": seed,
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and devices.world() > 1 else None,
        "ddp_find_unused_parameters": False,
        "ddp_timeout": int(devices.LONGEST_WAIT.total_seconds()),
        **own,
        **settings.trainer,
    }
