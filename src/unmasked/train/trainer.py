"""transformers' `Trainer` for the stages; only public methods are replaced, and none for saving.

`SentenceTransformerTrainer` is not used: it reloads a whole model to resume, and cannot do so where
weights are shared among devices (FSDP).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader
from transformers import Trainer, TrainingArguments

from unmasked.errors import RecipeError, nearest
from unmasked.train import devices
from unmasked.train.callback import Tally


class StageTrainer(Trainer):
    """A `Trainer` that adds what each forward of training measured to a tally.

    Args:
        tally: of the stage's callback.
        given: as in `Trainer`.
    """

    def __init__(self, *, tally: Tally, **given: Any) -> None:
        super().__init__(**given)
        self.tally = tally

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self._add(loss, tokens := torch.tensor(inputs["input_ids"].numel()), tokens)
        return (loss, outputs) if return_outputs else loss

    def _add(self, loss: Tensor, tokens: Tensor, places: Tensor, **measured: Tensor) -> None:
        """Add a forward: its share of the step's loss, real tokens, and tokens computed for."""
        counts = {"tokens": tokens, "places": places, "forwards": torch.tensor(1)}
        self.tally.add(loss=loss.mean(), **counts, **measured)


class ContrastiveTrainer(StageTrainer):
    """A trainer whose loss runs the encoder as often as it needs to, and whose batches are given.

    Args:
        loss: called, as in sentence-transformers, with a list of one dictionary of features and
            with the labels. Its ``model`` is replaced by the encoder as it is wrapped for several
            devices; ``views`` says how often it runs every token; ``measured`` holds further
            scalars to log.
        batches: of training, and of the held-out rows.
        given: as in `StageTrainer`.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self, *, loss: nn.Module, batches: tuple[BatchSampler, BatchSampler], **given: Any
    ) -> None:
        super().__init__(**given)
        self.loss = loss
        self.batches = batches
        self.can_return_loss = True  # without labels, as sentence-transformers does

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        features = {name.removeprefix("text_"): value for name, value in inputs.items()}
        attention = features["attention_mask"]
        self.loss.model = model
        loss: Tensor = self.loss([features], features.pop("label", None))
        if model.training:
            loss = loss / self.current_gradient_accumulation_steps
            views = self.loss.views
            tokens = attention.sum() * views
            padded = self.model.backbone.unpackable is not None
            places = torch.tensor(attention.numel() * views) if padded else tokens
            self._add(loss, tokens, places, **self.loss.measured)
        return (loss, {}) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train_dataset, self.batches[0])

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        return self._loader(eval_dataset or self.eval_dataset, self.batches[1])

    def _loader(self, rows: Any, batches: BatchSampler) -> DataLoader[Any]:
        loader = DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared


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
        # the rate may be scheduled over more steps than are run; the callback stops in time
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
