"""transformers' `Trainer` for the stages; only public methods are overridden, and none for saving.

`SentenceTransformerTrainer` is not used: to resume, it reloads a whole model, which does not work
when weights are sharded among devices (FSDP).
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
from unmasked.train.callback import StageCallback


class StageTrainer(Trainer):
    """A `Trainer` that passes the measurements of each training forward to its callback.

    Args:
        callback: the stage's callback, which is called before all others.
        others: further callbacks.
        given: the other arguments of `Trainer`.
    """

    model: Any

    def __init__(self, *, callback: StageCallback, others: Any = (), **given: Any) -> None:
        super().__init__(callbacks=[callback, *others], **given)
        self.callback = callback

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.tell(loss, size := torch.tensor(inputs["input_ids"].numel()), size)
        return (loss, outputs) if return_outputs else loss

    def tell(self, loss: Tensor, tokens: Tensor, places: Tensor, **measured: Tensor) -> None:
        """Pass the measurements of one forward to the callback.

        Args:
            loss: its part of the step's loss.
            tokens, places: how many tokens it computed without and with padding.
            measured: other scalars to log.
        """
        counts = {"tokens": tokens, "places": places, "forwards": torch.tensor(1)}
        self.callback.add(loss=loss.mean(), **counts, **measured)


class ContrastiveTrainer(StageTrainer):
    """A trainer for losses that run the encoder themselves, on batches that a sampler has chosen.

    Args:
        loss: a loss as `unmasked.train.losses` describes it. Its ``model`` is replaced by the
            encoder as it is wrapped for several devices.
        batches: samplers of batches, for training and for the held-out rows.
        given: the other arguments of `StageTrainer`.
    """

    loss_is_scaled_for_ga = True  # compute_loss below divides by the accumulation steps itself

    def __init__(self, *, loss: nn.Module, batches: Any, **given: Any) -> None:
        super().__init__(**given)
        self.loss: Any = loss
        self.batches = batches
        self.can_return_loss = True  # evaluation has a loss, although the batches have no labels

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        features = {name.removeprefix("text_"): value for name, value in inputs.items()}
        attention = features["attention_mask"]
        self.loss.model = model
        loss = self.loss([features], features.pop("label", None))
        if model.training:
            loss = loss / self.current_gradient_accumulation_steps
            tokens = places = attention.sum() * self.loss.views
            if self.model.backbone.unpackable is not None:  # then padding is computed, too
                places = torch.tensor(attention.numel() * self.loss.views)
            self.tell(loss, tokens, places, **self.loss.measured)
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
        settings: the stage's settings.
        folder: the stage's folder.
        seed: the run's seed.
        most_rows: maximum number of rows per forward, for a loss that is a sum over rows; a batch
            is divided into equal parts. None does not divide it.
        own: further arguments of the stage. Those that the settings name under ``trainer`` take
            precedence.

    Raises:
        RecipeError: the batch cannot be divided among the devices, or ``trainer`` has an argument
            that does not exist, or requires FSDP where that is impossible.
    """
    devices.check_sharding(bool(settings.trainer.get("fsdp")), f"{folder.name}.trainer.fsdp")
    allowed = TrainingArguments.__dataclass_fields__
    for name in settings.trainer:
        if name not in allowed:
            raise RecipeError(
                f"{folder.name}.trainer: unknown argument of TrainingArguments '{name}'"
                f"{nearest(name, allowed)} Fix: correct it, or leave it out."
            )
    schedules = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
    rows = devices.rows_per_device(settings.batch_size, f"{folder.name}.batch_size")
    part = rows if most_rows is None else devices.micro_batch(rows, most_rows)
    on_cpu = not torch.cuda.is_available()
    return {
        # Mixed precision: weights keep their type, matrix products are computed in bfloat16.
        # Without it, a LoRA in float32 would turn its products, and the sums with them, to float32.
        "bf16": not (on_cpu or settings.trainer.get("fp16")) and torch.cuda.is_bf16_supported(),
        "output_dir": str(folder),
        # The schedule may be longer than the stage; the callback stops after the stage's steps.
        "max_steps": max(settings.schedule_steps or 0, settings.steps),
        "per_device_train_batch_size": part,
        "gradient_accumulation_steps": settings.gradient_accumulation * (rows // part),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": schedules[settings.schedule],
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "logging_steps": settings.log_steps,
        "eval_steps": settings.eval_steps,
        "save_steps": settings.save_steps,
        "disable_tqdm": True,
        # Otherwise the host waits for the GPU: at each copy of a batch, and in each forward for a
        # check of the loss that changes the trainer's own average only, which is not shown.
        "accelerator_config": {"non_blocking": True},
        "logging_nan_inf_filter": False,
        "report_to": "none",  # `fitting` adds the callbacks that are wanted
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
