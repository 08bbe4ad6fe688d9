"""The loop that all stages share: train or continue, stop at Ctrl-C, keep the adapter alone."""

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
"""Folder of the token file, in the run folder until MNTP is done."""
TEACHER = "teacher"
"""Folder of the vectors of a teacher, in the run folder until the supervised stage is done."""
ROWS = "rows.arrow"
"""The checked rows of a supervised stage, while it trains."""
DONE = (adapters.CONFIG_NAME, "config.json")
"""Written last, for an adapter and for a whole encoder."""


@dataclass(frozen=True)
class StageSetup:
    """Where and on what a stage is trained.

    Attributes:
        folder: the stage's own, for the adapter, checkpoints and metrics.
        encoder: the base with the adapters of the stages before merged; trained in place.
        recipe: of the run.
        notify: called at each log.
        start: the adapter to train on from; None for a new one.
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
    """Whether a stage is trained to its end."""
    return any((folder / name).is_file() for name in DONE)


def clear(folder: Path) -> None:
    """Remove what a finished stage no longer needs, also after a kill in the middle of this."""
    for scrap in [*folder.glob("checkpoint-*"), *folder.glob("*.tmp")]:
        if scrap.is_dir():
            shutil.rmtree(scrap)
    (folder / ROWS).unlink(missing_ok=True)


def make_trainable(setup: StageSetup, stage: Training) -> None:
    """Make the trunk trainable, with the weights of the adapter that it continues, if any."""
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
    """What a `StageTrainer` tells: the stage's callback, TensorBoard, the recipe's trackers.

    Args:
        setup, stage: of the stage.
        data: told the epoch, if it has a `set_epoch`.
    """
    callback = StageCallback(stage.steps, setup.folder / "metrics.jsonl", setup.notify, data)
    if not devices.is_first():
        return {"callback": callback}
    checkpoint = checkpoints.last_checkpoint(setup.folder)
    hidden = checkpoint and checkpoint.step + 1  # points of steps that are trained again
    board = TensorBoardCallback(SummaryWriter(str(setup.folder), purge_step=hidden))
    os.environ.setdefault("WANDB_PROJECT", "unmasked")
    trackers = get_reporting_integration_callbacks(list(setup.recipe.trackers))
    return {"callback": callback, "others": [board, *(made() for made in trackers)]}


def tokens_of(stage: AnyStage) -> int:
    """About how many tokens a whole stage trains on.

    Texts are taken to be a quarter as long as they may be. It is read off the settings alone, so
    that a run that continues has the same.
    """
    rows = stage.steps * stage.gradient_accumulation * stage.batch_size
    if isinstance(stage, MNTP):
        return rows * stage.block_length
    texts = 2 if isinstance(stage, SimCSE) else 2 + stage.hard_negatives
    return rows * texts * stage.max_length // 4


@contextmanager
def layers_compiled(setup: StageSetup, stage: AnyStage, trainer: StageTrainer) -> Iterator[None]:
    """The decoder layers are compiled inside the block where `stage` pays for it.

    What compiled them before, for encoding, did not compare gradients, so they begin as they are.
    """
    choice, model = setup.recipe.model.compile, decoder_of(setup.trunk)
    if choice == "auto" and devices.world() > 1:  # not tried with several processes
        choice = "never"
    compiling.put_back(model)
    # Adapters alone give the first layer an input without a gradient, and all others one with it:
    # each would be compiled for.
    like_the_others = stage.lora.method != "full" and not stage.gradient_checkpointing
    if not trainer.is_fsdp_enabled:
        with trainer.accelerator.autocast():
            setup.encoder.backbone.packs_here()
            if like_the_others and compiling.pays(choice, model.device, tokens_of(stage)):
                model.enable_input_require_grads()
            setup.encoder.backbone.compile_for(tokens_of(stage), choice, training=True)
    elif choice == "always":  # not tried: hooks around each layer gather its weights
        logger.warning("The layers run as they are, not compiled: their weights are shared (FSDP).")
    try:
        yield
    finally:
        compiling.put_back(model)
        if like_the_others:
            model.disable_input_require_grads()


def train(setup: StageSetup, stage: AnyStage, trainer: StageTrainer) -> None:
    """Train, or continue, until the stage's last step; then keep the result alone.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is saved.
        OutputError: a checkpoint could not be written.
        RecipeError: weights are shared among devices where they cannot be, or were not before.
    """
    callback, trunk, whole = trainer.callback, setup.trunk, None
    devices.prepare_sharding(trainer, trunk, setup.folder.name)
    if trainer.is_fsdp_enabled and not isinstance(trunk, PeftModel):
        # The trunk is taken apart for good; this is what will be saved in its place.
        apart = {id(p): nn.Parameter(torch.empty_like(p, device="cpu")) for p in trunk.parameters()}
        whole = copy.deepcopy(trunk, apart)
    trainer.remove_callback(PrinterCallback)  # the listener speaks
    if devices.is_first():
        checkpoints.remove_incomplete(setup.folder)
    devices.wait()
    checkpoint = checkpoints.last_checkpoint(setup.folder)
    with checkpoints.trained_weights_only(trainer.model):
        if checkpoint is not None and checkpoint.step >= callback.steps:
            checkpoints.load(trainer.model, checkpoint)  # cut off after its last step
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
            finally:  # so that the next stage begins a run of its own
                if "wandb" in setup.recipe.trackers and devices.is_first():
                    import_module("wandb").finish()
            if callback.interrupted and trainer.state.global_step < callback.steps:
                raise KeyboardInterrupt
    _keep(setup, whole)
    if callback.interrupted:
        raise KeyboardInterrupt


def _keep(setup: StageSetup, whole: nn.Module | None) -> None:
    """Write the adapter, or the whole encoder; once its config is there, the stage is done.

    Args:
        setup: of the stage.
        whole: what to fill with the weights of a trunk that was taken apart, where it was.
    """
    trunk: Any = setup.trunk
    state: Any = None
    if whole is not None or isinstance(trunk, PeftModel):  # every process holds a part
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
