"""What each stage trains and how: its data, its loss, its trainer; and the loop they all share.

A stage is one function here that builds a trainer and hands it to `_fit`, which trains, or
continues from the last checkpoint, and leaves the adapter in the stage's folder.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftModel
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import (
    SentenceTransformerDataCollator,
)
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    PrinterCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from unmasked.checkpoint import adapters, loading
from unmasked.compat.llm2vec import LLM2Vec
from unmasked.errors import RecipeError
from unmasked.forward.packing import checkpoint_contexts
from unmasked.recipe import schema as config
from unmasked.recipe.schema import MNTP, SimCSE, Supervised, Training
from unmasked.train import devices, saving
from unmasked.train.checkpoints import last_checkpoint
from unmasked.train.data.mixing import OneSourceBatches, PairCollator, measuring_batches
from unmasked.train.data.pairs import split_rows, store_rows
from unmasked.train.data.texts import read_texts, split_held_out
from unmasked.train.losses.mntp import (
    MaskedNextTokenModel,
    MaskedNextTokenTrainer,
    Masking,
    block_data,
    find_mask_id,
    micro_batch_rows,
    token_metrics,
)
from unmasked.train.losses.simcse import ContrastiveTrainer, TwoViewsLoss, noise
from unmasked.train.losses.supervised import RankingLoss
from unmasked.train.trackers import finish_trackers, tracker_callbacks
from unmasked.train.trainer import Report, RunCallback, stage_arguments

logger = logging.getLogger(__name__)

ROWS = "rows.arrow"
"""The checked rows of a supervised stage, while it trains."""
FEWEST = 2
"""Held-out rows below which there is no negative to tell a row from."""
DONE = (adapters.CONFIG_NAME, "config.json")
"""Written last, for an adapter and for a whole encoder."""


@dataclass(frozen=True)
class Job:
    """Where and on what a stage is trained.

    Attributes:
        folder: the stage's own, for the adapter, checkpoints and metrics.
        encoder: the base with the adapters of the stages before merged; trained in place.
        model: the recipe's settings of the base.
        seed: of data order, masks, dropout and the adapter.
        report: told about each log.
        start: the adapter to train on from; None for a new one.
        trackers: where metrics go besides.
    """

    folder: Path
    encoder: LLM2Vec
    model: config.Model
    seed: int
    report: Report
    start: str | Path | None = None
    trackers: Sequence[str] = ()


def fit(job: Job, stage: MNTP | SimCSE | Supervised) -> None:
    """Train a stage, or continue it; its folder then holds the adapter.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is saved.
    """
    with devices.own_environment():
        if isinstance(stage, MNTP):
            _fit_mntp(job, stage)
        elif isinstance(stage, SimCSE):
            _fit_simcse(job, stage)
        else:
            _fit_supervised(job, stage)


def _fit_mntp(job: Job, stage: MNTP) -> None:
    tokens = job.encoder.backbone.tokens
    trunk: Any = job.encoder.backbone.auto_model
    dtype = next(trunk.parameters()).dtype
    language_model: Any = loading.load_causal_lm(
        job.model.base, dtype, job.encoder.report.attention, revision=job.model.revision
    )
    mask_id = find_mask_id(tokens.tokenizer, stage.mask_token)
    vocabulary = language_model.config.get_text_config().vocab_size
    if mask_id is None:
        mask_id = vocabulary
        trunk.resize_token_embeddings(vocabulary + 1)
        language_model.resize_token_embeddings(vocabulary + 1)
    model = _attach(job, stage)
    masking = Masking(
        mask_id,
        min(vocabulary, len(tokens.tokenizer)),
        tuple({*tokens.prefix, *tokens.tokenizer.all_special_ids}),
        stage.mask_probability,
        stage.mask_style,
    )
    train, evaluation = block_data(job.folder, stage, tokens, masking, job.seed, _apart(job, stage))
    callback = _callback(job, stage)
    most_rows = micro_batch_rows(stage, job.encoder.device)
    trainer = MaskedNextTokenTrainer(
        model=MaskedNextTokenModel(model, language_model).to(job.encoder.device),
        args=TrainingArguments(
            **stage_arguments(
                stage,
                job.folder,
                job.seed,
                most_rows,
                remove_unused_columns=False,
                label_names=["labels"],
                eval_strategy="steps" if evaluation else "no",
                eval_steps=stage.eval_steps or None,
                eval_on_start=evaluation is not None,
                per_device_eval_batch_size=most_rows,
            )
        ),
        data_collator=default_data_collator,
        train_dataset=train,
        eval_dataset=evaluation,
        compute_metrics=token_metrics,
        callbacks=_callbacks(job, callback),
    )
    _fit(job, trainer, callback, model)


def _fit_simcse(job: Job, stage: SimCSE) -> None:
    model = _attach(job, stage)
    texts, held_out = _texts(job, stage)
    collator = SentenceTransformerDataCollator(job.encoder.preprocess, max_length=stage.max_length)
    with noise(model, stage.attention_dropout, stage.embedding_dropout):
        _fit_contrastive(
            job,
            stage,
            (Dataset.from_dict({"text": texts}), Dataset.from_dict({"text": held_out})),
            TwoViewsLoss(job.encoder, stage.temperature),
            collator,
            dataloader_drop_last=True,
        )


def _fit_supervised(job: Job, stage: Supervised) -> None:
    width = job.encoder.backbone.get_embedding_dimension()
    if max(stage.matryoshka, default=0) > width:
        raise RecipeError(
            f"supervised.matryoshka: {max(stage.matryoshka)} given, but vectors have {width} "
            f"numbers. Fix: shorter lengths; {width} itself is always trained."
        )
    _attach(job, stage)
    train, held_out = split_rows(_rows(job, stage), stage.held_out, job.seed)
    weights = [pairs.weight for pairs in stage.data]
    measuring = measuring_batches(
        np.asarray(held_out["source"]), stage.batch_size // devices.world(), devices.world()
    )

    def batches(rows: Dataset, batch_size: int, **_: Any) -> Any:
        if rows is held_out:
            return measuring
        sources = np.asarray(rows["source"])
        return OneSourceBatches(sources, batch_size, weights, devices.world(), job.seed)

    loss = RankingLoss(
        job.encoder,
        stage.temperature,
        stage.mini_batch_tokens,
        stage.false_negative_margin,
        stage.matryoshka,
    )
    collator = PairCollator(
        job.encoder.preprocess, stage.data, stage.hard_negatives, stage.max_length
    )
    measured = held_out if measuring else held_out.select([])
    _fit_contrastive(job, stage, (train, measured), loss, collator, batch_sampler=batches)


def _fit_contrastive(
    job: Job,
    stage: SimCSE | Supervised,
    rows: tuple[Dataset, Dataset],
    loss: nn.Module,
    collator: Any,
    **arguments: Any,
) -> None:
    train, held_out = rows
    measured = len(held_out) // devices.world()
    callback = _callback(job, stage)
    trainer = ContrastiveTrainer(
        model=job.encoder,
        args=SentenceTransformerTrainingArguments(
            **stage_arguments(
                stage,
                job.folder,
                job.seed,
                eval_strategy="steps" if measured >= FEWEST else "no",
                eval_steps=stage.eval_steps,
                eval_on_start=measured >= FEWEST,
                per_device_eval_batch_size=min(stage.batch_size // devices.world(), measured) or 1,
                **arguments,
            )
        ),
        data_collator=collator,
        train_dataset=train,
        eval_dataset=held_out if measured >= FEWEST else None,
        loss=loss,
        callbacks=_callbacks(job, callback),
    )
    _fit(job, trainer, callback, job.encoder.backbone.auto_model)


def _rows(job: Job, stage: Supervised) -> Dataset:
    """All rows, on disk; the first device writes them."""
    file = job.folder / ROWS
    if devices.is_first():
        store_rows(stage.data, file)
    devices.wait()
    return Dataset.from_file(str(file))


def _texts(job: Job, stage: SimCSE) -> tuple[list[str], list[str]]:
    texts = read_texts(stage.data, stage.max_texts)
    return split_held_out(texts, stage.held_out, job.seed)


def _apart(job: Job, stage: MNTP) -> bool:
    """Whether documents are kept apart; told if this family has no way to."""
    reason = job.encoder.backbone.unpackable
    if stage.documents == "apart" and reason is not None:
        logger.warning("mntp.documents: joined, not apart, as %s.", reason)
        return False
    return stage.documents == "apart"


def _attach(job: Job, stage: Training) -> nn.Module:
    trunk: Any = job.encoder.backbone.auto_model
    lora = stage.lora
    set_seed(job.seed)
    model = adapters.attach(trunk, lora.rank, lora.alpha, lora.dropout, lora.targets, lora.method)
    if job.start is not None:
        saving.load(model, job.start)
    job.encoder.backbone.auto_model = model
    job.encoder.model_card_data.generate_widget_examples = False
    if stage.gradient_checkpointing:
        trunk.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": checkpoint_contexts}
        )
        trunk.enable_input_require_grads()
    return model


def _callback(job: Job, stage: Training) -> RunCallback:
    return RunCallback(stage.steps, job.folder / "metrics.jsonl", job.report)


def _callbacks(job: Job, callback: RunCallback) -> list[Any]:
    if not devices.is_first():
        return [callback]
    checkpoint = last_checkpoint(job.folder)
    hidden = checkpoint and checkpoint.step + 1  # points of steps that are trained again
    board = TensorBoardCallback(SummaryWriter(str(job.folder), purge_step=hidden))
    return [callback, board, *tracker_callbacks(job.trackers)]


def _fit(job: Job, trainer: Any, callback: RunCallback, model: nn.Module) -> None:
    """Train, or continue, until the stage's last step; then keep the adapter alone."""
    devices.prepare_sharding(trainer, model, job.folder.name)
    spare = None  # to be saved in the place of a whole model that is taken apart for good
    if trainer.is_fsdp_enabled and not isinstance(model, PeftModel):
        spare = saving.unfilled_copy(model)
    trainer.remove_callback(PrinterCallback)  # the report speaks
    checkpoint = last_checkpoint(job.folder)
    if checkpoint is not None and checkpoint.step >= callback.steps:
        saving.load(model, checkpoint.path)  # cut off after its last step
    else:
        trainer.args.eval_on_start &= checkpoint is None
        if checkpoint is not None:
            saving.check_optimizer(trainer, checkpoint.path)
        try:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint.path))
        finally:
            finish_trackers(job.trackers)
        if callback.interrupted and trainer.state.global_step < callback.steps:
            raise KeyboardInterrupt
    state = saving.gather(model) if spare or isinstance(model, PeftModel) else {}
    if devices.is_first():
        if spare:
            saving.fill(spare, state)
            job.encoder.backbone.auto_model = spare.to(job.encoder.device)
        _keep(job, model, state)
    devices.wait()
    if callback.interrupted:
        raise KeyboardInterrupt


def _keep(job: Job, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Write the adapter, or the whole encoder; once its config is there, the stage is done."""
    aside = job.folder / "trained.tmp"
    if isinstance(model, PeftModel):
        adapters.save_adapter(model, aside, state)
    else:
        job.encoder.save(aside)
    for item in sorted(aside.iterdir(), key=lambda item: item.name in DONE):
        place = job.folder / item.name
        if place.is_dir():
            shutil.rmtree(place)
        item.replace(place)


def is_done(folder: Path) -> bool:
    """Whether a stage is trained to its end."""
    return any((folder / name).is_file() for name in DONE)


def clear(folder: Path) -> None:
    """Remove what a finished stage needs no more, also after a kill in the middle of this."""
    for scrap in [*folder.glob("checkpoint-*"), *folder.glob("*.tmp")]:
        if scrap.is_dir():
            shutil.rmtree(scrap)
    (folder / ROWS).unlink(missing_ok=True)
