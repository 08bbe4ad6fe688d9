"""What each stage trains and how: its data, its loss, its trainer; and the loop they share.

A stage is one function here that builds a trainer and hands it to `_train`, which trains, or
continues from the last checkpoint, and leaves the adapter in the stage's folder. Cost: beside
training itself, a second load of the base for MNTP, which needs its head.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import BatchSampler, RandomSampler
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, TrainingArguments, default_data_collator, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback

from unmasked.checkpoint import adapters, loading
from unmasked.errors import RecipeError
from unmasked.forward.packing import checkpoint_contexts
from unmasked.model import TextEncoder
from unmasked.recipe import schema
from unmasked.recipe.schema import MNTP, SimCSE, Supervised, Training
from unmasked.train import checkpoints, devices
from unmasked.train.callback import OnLog, StageCallback
from unmasked.train.data.mixing import OneSourceBatches, PairCollator, measuring_batches
from unmasked.train.data.pairs import split_rows, store_rows
from unmasked.train.data.texts import read_texts, split_held_out
from unmasked.train.losses.mntp import (
    MaskedNextTokenModel,
    Masking,
    block_data,
    find_mask_id,
    micro_batch_rows,
    token_metrics,
)
from unmasked.train.losses.simcse import TwoViewsLoss, noise
from unmasked.train.losses.supervised import RankingLoss
from unmasked.train.trackers import finish_trackers, tracker_callbacks
from unmasked.train.trainer import ContrastiveTrainer, StageTrainer, stage_arguments

logger = logging.getLogger(__name__)

ROWS = "rows.arrow"
"""The checked rows of a supervised stage, while it trains."""
FEWEST = 2
"""Held-out rows below which a row has no other to be told from."""
DONE = (adapters.CONFIG_NAME, "config.json")
"""Written last, for an adapter and for a whole encoder."""


@dataclass(frozen=True)
class StageSetup:
    """Where and on what a stage is trained.

    Attributes:
        folder: the stage's own, for the adapter, checkpoints and metrics.
        encoder: the base with the adapters of the stages before merged; trained in place.
        model: the recipe's settings of the base.
        seed: of data order, masks, dropout and the adapter.
        notify: called at each log.
        start: the adapter to train on from; None for a new one.
        trackers: where metrics go besides.
    """

    folder: Path
    encoder: TextEncoder
    model: schema.Model
    seed: int
    notify: OnLog
    start: str | Path | None = None
    trackers: Sequence[str] = ()

    @property
    def trunk(self) -> Any:
        """The transformer that is trained, with its adapter once that is attached."""
        return self.encoder.backbone.auto_model


def fit(setup: StageSetup, stage: MNTP | SimCSE | Supervised) -> None:
    """Train a stage, or continue it; its folder then holds the adapter, or the whole encoder.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is saved.
        OutputError: a checkpoint could not be written.
    """
    with devices.own_environment():
        if isinstance(stage, MNTP):
            _fit_mntp(setup, stage)
        elif isinstance(stage, SimCSE):
            _fit_simcse(setup, stage)
        else:
            _fit_supervised(setup, stage)


def _fit_mntp(setup: StageSetup, stage: MNTP) -> None:
    tokens = setup.encoder.backbone.tokens
    language_model: Any = loading.load_causal_lm(
        setup.model.base,
        next(setup.trunk.parameters()).dtype,
        setup.encoder.report.attention,
        revision=setup.model.revision,
    )
    mask_id = find_mask_id(tokens.tokenizer, stage.mask_token)
    vocabulary = language_model.config.get_text_config().vocab_size
    if mask_id is None:
        mask_id = vocabulary
        for model in (setup.trunk, language_model):
            model.resize_token_embeddings(vocabulary + 1)
    _attach(setup, stage)
    masking = Masking(
        mask_id,
        min(vocabulary, len(tokens.tokenizer)),
        tuple({*tokens.prefix, *tokens.tokenizer.all_special_ids}),
        stage.mask_probability,
        stage.mask_style,
    )
    apart, reason = stage.documents == "apart", setup.encoder.backbone.unpackable
    if apart and reason is not None:
        logger.warning("mntp.documents: joined, not apart, as %s.", reason)
    train, held_out = block_data(
        setup.folder, stage, tokens, masking, setup.seed, apart and reason is None
    )
    most_rows = micro_batch_rows(stage, setup.encoder.device)
    callback = _callback(setup, stage)
    arguments = stage_arguments(
        stage,
        setup.folder,
        setup.seed,
        most_rows,
        remove_unused_columns=False,
        label_names=["labels"],
        eval_strategy="steps" if held_out else "no",
        eval_steps=stage.eval_steps,
        eval_on_start=held_out is not None,
        per_device_eval_batch_size=most_rows,
    )
    trainer = StageTrainer(
        tally=callback.tally,
        model=MaskedNextTokenModel(setup.trunk, language_model).to(setup.encoder.device),
        args=TrainingArguments(**arguments),
        data_collator=default_data_collator,
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=token_metrics,
        callbacks=_callbacks(setup, callback),
    )
    _train(setup, trainer, callback)


def _fit_simcse(setup: StageSetup, stage: SimCSE) -> None:
    _attach(setup, stage)
    texts = read_texts(stage.data, stage.max_texts)
    train, held_out = split_held_out(texts, stage.held_out, setup.seed)

    def collate(texts: Sequence[str]) -> dict[str, Tensor]:
        features = setup.encoder.preprocess(texts, max_length=stage.max_length)
        return {f"text_{name}": value for name, value in features.items()}

    def batches(texts: Sequence[str], size: int) -> BatchSampler:
        generator = torch.Generator().manual_seed(setup.seed)
        return BatchSampler(RandomSampler(texts, generator=generator), size, drop_last=True)

    rows = stage.batch_size // devices.world()
    measured = min(rows, len(held_out) // devices.world())
    with noise(setup.trunk, stage.attention_dropout, stage.embedding_dropout):
        _fit_contrastive(
            setup,
            stage,
            TwoViewsLoss(setup.encoder, stage.temperature),
            collate,
            (train, batches(train, rows)),
            (held_out, batches(held_out, measured)) if measured >= FEWEST else None,
        )


def _fit_supervised(setup: StageSetup, stage: Supervised) -> None:
    width = setup.encoder.backbone.get_embedding_dimension()
    if max(stage.matryoshka, default=0) > width:
        raise RecipeError(
            f"supervised.matryoshka: {max(stage.matryoshka)} given, but vectors have {width} "
            f"numbers. Fix: shorter lengths; {width} itself is always trained."
        )
    _attach(setup, stage)
    if devices.is_first():
        store_rows(stage.data, setup.folder / ROWS)
    devices.wait()
    rows = Dataset.from_file(str(setup.folder / ROWS))
    train, held_out = split_rows(rows, stage.held_out, setup.seed)
    loss = RankingLoss(
        setup.encoder,
        stage.temperature,
        stage.mini_batch_tokens,
        stage.false_negative_margin,
        stage.matryoshka,
    )
    collate = PairCollator(
        setup.encoder.preprocess, stage.data, stage.hard_negatives, stage.max_length
    )
    world, size = devices.world(), stage.batch_size // devices.world()
    weights = [pairs.weight for pairs in stage.data]
    batches = OneSourceBatches(np.asarray(train["source"]), size, weights, world, setup.seed)
    measuring = measuring_batches(np.asarray(held_out["source"]), size, world)
    measured = (held_out, measuring) if measuring else None
    _fit_contrastive(setup, stage, loss, collate, (train, batches), measured)


def _fit_contrastive(
    setup: StageSetup,
    stage: SimCSE | Supervised,
    loss: nn.Module,
    collate: Any,
    train: tuple[Any, BatchSampler],
    held_out: tuple[Any, BatchSampler] | None,
) -> None:
    """Train on rows and the batches of them; measure the loss on the held-out ones."""
    callback = _callback(setup, stage)
    arguments = stage_arguments(
        stage,
        setup.folder,
        setup.seed,
        eval_strategy="steps" if held_out else "no",
        eval_steps=stage.eval_steps,
        eval_on_start=held_out is not None,
        per_device_eval_batch_size=min(stage.batch_size, len(held_out[0])) // devices.world()
        if held_out
        else 1,
        prediction_loss_only=True,
        label_names=[],
        ddp_broadcast_buffers=False,
    )
    trainer = ContrastiveTrainer(
        loss=loss,
        batches=(train[1], held_out and held_out[1]),
        tally=callback.tally,
        model=setup.encoder,
        args=TrainingArguments(**arguments),
        data_collator=collate,
        train_dataset=train[0],
        eval_dataset=held_out and held_out[0],
        callbacks=_callbacks(setup, callback),
    )
    _train(setup, trainer, callback)


def _attach(setup: StageSetup, stage: Training) -> None:
    """Make the trunk trainable, with the weights of the adapter that it continues, if any."""
    trunk, lora = setup.trunk, stage.lora
    set_seed(setup.seed)
    model = adapters.attach(trunk, lora.rank, lora.alpha, lora.dropout, lora.targets, lora.method)
    if setup.start is not None:
        state = load_file(Path(setup.start) / adapters.WEIGHTS_NAME)
        adapters.load_adapter_state(model, state, str(setup.start))
    setup.encoder.backbone.auto_model = model
    if stage.gradient_checkpointing:
        trunk.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": checkpoint_contexts}
        )
        trunk.enable_input_require_grads()


def _callback(setup: StageSetup, stage: Training) -> StageCallback:
    return StageCallback(stage.steps, setup.folder / "metrics.jsonl", setup.notify)


def _callbacks(setup: StageSetup, callback: StageCallback) -> list[Any]:
    if not devices.is_first():
        return [callback]
    checkpoint = checkpoints.last_checkpoint(setup.folder)
    hidden = checkpoint and checkpoint.step + 1  # points of steps that are trained again
    board = TensorBoardCallback(SummaryWriter(str(setup.folder), purge_step=hidden))
    return [callback, board, *tracker_callbacks(setup.trackers)]


def _train(setup: StageSetup, trainer: StageTrainer, callback: StageCallback) -> None:
    """Train, or continue, until the stage's last step; then keep the result alone."""
    devices.prepare_sharding(trainer, setup.trunk, setup.folder.name)
    trunk, whole = setup.trunk, None
    if trainer.is_fsdp_enabled and not isinstance(trunk, PeftModel):
        whole = _unfilled_copy(trunk)  # the trunk itself is taken apart for good
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
                with callback.catching_interrupts(), checkpoints.told_if_unsaved(setup.folder):
                    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint.path))
            finally:
                finish_trackers(setup.trackers)
            if callback.interrupted and trainer.state.global_step < callback.steps:
                raise KeyboardInterrupt
    _keep(setup, whole)
    if callback.interrupted:
        raise KeyboardInterrupt


def _unfilled_copy(model: nn.Module) -> nn.Module:
    """The same model with weights of its own, on the CPU and of any value."""
    apart = {id(p): nn.Parameter(torch.empty_like(p, device="cpu")) for p in model.parameters()}
    return copy.deepcopy(model, apart)


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
        if isinstance(trunk, PeftModel):
            adapters.save_adapter(trunk, aside, adapters.adapter_state(trunk, state))
        else:
            if whole is not None:
                whole.load_state_dict(state)
                setup.encoder.backbone.auto_model = whole.to(setup.encoder.device)
            setup.encoder.save(aside)
        for item in sorted(aside.iterdir(), key=lambda item: item.name in DONE):
            place = setup.folder / item.name
            if place.is_dir():
                shutil.rmtree(place)
            item.replace(place)
    devices.wait()


def is_done(folder: Path) -> bool:
    """Whether a stage is trained to its end."""
    return any((folder / name).is_file() for name in DONE)


def clear(folder: Path) -> None:
    """Remove what a finished stage needs no more, also after a kill in the middle of this."""
    for scrap in [*folder.glob("checkpoint-*"), *folder.glob("*.tmp")]:
        if scrap.is_dir():
            shutil.rmtree(scrap)
    (folder / ROWS).unlink(missing_ok=True)
