"""The loop that all stages share: train or continue, stop at Ctrl-C, save the trained weights."""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, set_seed
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    get_reporting_integration_callbacks,
)

from unmasked.checkpoint import adapters
from unmasked.files.writing import folder_aside
from unmasked.forward import compiling
from unmasked.mask.opening import decoder_of
from unmasked.model import TextEncoder
from unmasked.recipe.schema import MNTP, AnyStage, Recipe, SimCSE, Training
from unmasked.train import checkpoints, devices
from unmasked.train.callback import OnLog, StageCallback
from unmasked.train.trainer import StageTrainer

logger = logging.getLogger(__name__)

TOKENS = "tokens"
"""Folder of the token file; it is in the run folder until MNTP is done."""
TEACHER = "teacher"
"""Folder of a teacher's vectors; it is in the run folder until the supervised stage is done."""
ROWS = "rows.arrow"
"""File of the checked rows of a supervised stage, which exists while the stage trains."""
DONE = (adapters.CONFIG_NAME, "config.json")
"""The file that is written last, of an adapter and of a whole encoder."""


@dataclass(frozen=True)
class StageSetup:
    """What a stage starts from, and where it writes.

    Attributes:
        folder: the stage's folder, for the adapter, checkpoints and metrics.
        encoder: the base with the adapters of earlier stages merged into it; trained in place.
        recipe: the recipe of the run.
        notify: called at each log.
        start: the adapter to continue training; None for a new one.
    """

    folder: Path
    encoder: TextEncoder
    recipe: Recipe
    notify: OnLog
    start: str | Path | None = None

    @property
    def trunk(self) -> Any:
        """The transformer that is trained, with its adapter once that is attached."""
        return self.encoder.backbone.auto_model


def is_done(folder: Path) -> bool:
    """Whether a stage is finished: its adapter, or its whole encoder, has been written."""
    return any((folder / name).is_file() for name in DONE)


def clear(folder: Path) -> None:
    """Remove what a finished stage no longer needs; it may be called again after a kill."""
    for leftover in [*folder.glob("checkpoint-*"), *folder.glob("*.tmp")]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
    (folder / ROWS).unlink(missing_ok=True)


def make_trainable(setup: StageSetup, stage: Training) -> None:
    """Attach the stage's adapter to the trunk, with the weights of an earlier one if it continues.

    With ``lora.method: full`` all weights of the trunk become trainable instead.
    """
    trunk, lora = setup.trunk, stage.lora
    set_seed(setup.recipe.seed)
    model: Any = adapters.attach(
        trunk, lora.rank, lora.alpha, lora.dropout, lora.targets, lora.method
    )
    if setup.start is not None:
        state = load_file(Path(setup.start) / adapters.WEIGHTS_NAME)
        adapters.load_adapter_state(model, state, str(setup.start))
    setup.encoder.backbone.auto_model = model
    if stage.gradient_checkpointing:
        trunk.activation_checkpointing_enable({"use_reentrant": False})
        trunk.enable_input_require_grads()


def callbacks(setup: StageSetup, stage: Training, data: Any) -> dict[str, Any]:
    """Callbacks, as arguments of a `StageTrainer`: our own, TensorBoard, the recipe's trackers.

    Args:
        setup, stage: where and how the stage trains.
        data: its `set_epoch` is called in each epoch, if it has one.
    """
    callback = StageCallback(stage.steps, setup.folder / "metrics.jsonl", setup.notify, data)
    if not devices.is_first():
        return {"callback": callback}
    checkpoint = checkpoints.last_checkpoint(setup.folder)
    repeated = checkpoint and checkpoint.step + 1  # TensorBoard drops points from this step on
    board = TensorBoardCallback(SummaryWriter(str(setup.folder), purge_step=repeated))
    os.environ.setdefault("WANDB_PROJECT", "unmasked")
    trackers = get_reporting_integration_callbacks(list(setup.recipe.trackers))
    return {"callback": callback, "others": [board, *(tracker() for tracker in trackers)]}


def tokens_of(stage: AnyStage) -> int:
    """Roughly how many tokens a whole stage trains on.

    Texts are assumed to be a quarter of the maximum length. The estimate uses the settings alone,
    so that a continued run gets the same number.
    """
    rows = stage.steps * stage.gradient_accumulation * stage.batch_size
    if isinstance(stage, MNTP):
        return rows * stage.block_length
    texts = 2 if isinstance(stage, SimCSE) else 2 + stage.hard_negatives
    return rows * texts * stage.max_length // 4


def compiles(stage: AnyStage, choice: str, device: torch.device) -> bool:
    """Whether a stage compiles its layers, if its weights are not sharded.

    Args:
        stage: its settings.
        choice: one of `compiling.CHOICES`; ``auto`` was not tried with several processes.
        device: where it trains.
    """
    if choice == "auto" and devices.world() > 1:
        return False
    return compiling.pays(choice, device, tokens_of(stage))


@contextmanager
def layers_compiled(setup: StageSetup, stage: AnyStage, trainer: StageTrainer) -> Iterator[None]:
    """Within the block, the decoder layers are compiled if `stage` is long enough to pay for it.

    Layers that were compiled for encoding are first put back: their gradients were not compared.
    """
    choice, model = setup.recipe.model.compile, decoder_of(setup.trunk)
    compiling.put_back(model)
    # When only adapters are trained, the input of the first layer needs no gradient but that of all
    # other layers does, and layers would be compiled for both cases. So the first one gets it too.
    give_input_gradient = stage.lora.method != "full" and not stage.gradient_checkpointing
    if not trainer.is_fsdp_enabled:
        with trainer.accelerator.autocast():
            setup.encoder.backbone.packs_here()
            if compiles(stage, choice, model.device):
                if give_input_gradient:
                    model.enable_input_require_grads()
                setup.encoder.backbone.compile_for(tokens_of(stage), choice, training=True)
    elif choice == "always":  # not tried: FSDP's hooks around each layer gather its weights
        logger.warning("model.compile=always has no effect: the weights are sharded (FSDP).")
    try:
        yield
    finally:
        compiling.put_back(model)
        if give_input_gradient:
            model.disable_input_require_grads()


def train(setup: StageSetup, stage: AnyStage, trainer: StageTrainer) -> None:
    """Train, or continue, up to the stage's last step; then save the result.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is saved.
        OutputError: a checkpoint could not be written.
        RecipeError: weights cannot be sharded (FSDP) here, or the checkpoint was made with the
            other setting.
    """
    callback, trunk, whole = trainer.callback, setup.trunk, None
    devices.prepare_sharding(trainer, trunk, setup.folder.name)
    if trainer.is_fsdp_enabled and not isinstance(trunk, PeftModel):
        # FSDP replaces the trunk's parameters by shards for good. This copy, whose weights are
        # filled in at the end, is saved in its place.
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="cpu")) for p in trunk.parameters()}
        whole = copy.deepcopy(trunk, empty)
    trainer.remove_callback(PrinterCallback)  # the listener reports
    if devices.is_first():
        checkpoints.remove_incomplete(setup.folder)
    devices.wait()
    checkpoint = checkpoints.last_checkpoint(setup.folder)
    with checkpoints.trained_weights_only(trainer.model):
        if checkpoint is not None and checkpoint.step >= callback.steps:
            checkpoints.load(trainer.model, checkpoint)  # it was killed after the last step
        else:
            trainer.args.eval_on_start &= checkpoint is None
            if checkpoint is not None:
                checkpoints.check_optimizer(trainer, checkpoint.path)
            try:
                with (
                    callback.catching_interrupts(),
                    checkpoints.told_if_unsaved(setup.folder),
                    layers_compiled(setup, stage, trainer),
                ):
                    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint.path))
            finally:  # so that the next stage starts a new run in the tracker
                if "wandb" in setup.recipe.trackers and devices.is_first():
                    import_module("wandb").finish()
            if callback.interrupted and trainer.state.global_step < callback.steps:
                raise KeyboardInterrupt
    _save_result(setup, whole)
    if callback.interrupted:
        raise KeyboardInterrupt


def _save_result(setup: StageSetup, whole: nn.Module | None) -> None:
    """Write the adapter, or the whole encoder; once its config is written, the stage is done.

    Args:
        setup: where and what the stage trained.
        whole: a copy of a sharded trunk, to be filled with the gathered weights; None if the trunk
            is not sharded, or if only an adapter is trained.
    """
    trunk: Any = setup.trunk
    state: Any = None
    if whole is not None or isinstance(trunk, PeftModel):  # gathered: each process may have a part
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        state = get_model_state_dict(trunk, options=options)
    if devices.is_first():
        aside = setup.folder / "trained.tmp"
        with folder_aside(setup.folder, aside=aside, last=DONE):
            if isinstance(trunk, PeftModel):
                adapters.save_adapter(trunk, aside, adapters.adapter_state(trunk, state))
            else:
                if whole is not None:
                    whole.load_state_dict(state)
                    setup.encoder.backbone.auto_model = whole.to(setup.encoder.device)
                setup.encoder.save(aside)
    devices.wait()
