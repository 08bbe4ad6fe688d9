"""One function per stage, which sets up its data, its loss and its trainer; `fitting` has the loop.

Cost besides training: MNTP loads the base a second time, for its language-model head.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import BatchSampler, RandomSampler
from transformers import TrainingArguments, default_data_collator

from unmasked.checkpoint import loading
from unmasked.recipe.schema import MNTP, AnyStage, SimCSE, Supervised
from unmasked.train import devices
from unmasked.train.data.mixing import OneSourceBatches, PairCollator, measuring_batches, split_rows
from unmasked.train.data.pairs import store_rows
from unmasked.train.data.record import write_facts
from unmasked.train.data.taught import compute_vectors, taught, teacher_of
from unmasked.train.data.texts import Blocks, facts_of, read_texts, split_held_out, token_file
from unmasked.train.fitting import (
    ROWS,
    TEACHER,
    TOKENS,
    StageSetup,
    callbacks,
    make_trainable,
    train,
)
from unmasked.train.losses import mntp
from unmasked.train.losses.depth import depths
from unmasked.train.losses.simcse import TwoViewsLoss, noise
from unmasked.train.losses.supervised import RankingLoss
from unmasked.train.losses.teacher import TeacherLoss
from unmasked.train.trainer import ContrastiveTrainer, StageTrainer, stage_arguments

logger = logging.getLogger(__name__)

FEWEST = 2
"""Minimum number of held-out rows per batch: with one, there is nothing to contrast it with."""
Batched = tuple[Any, BatchSampler]
"""Rows, and the sampler that divides them into batches."""


def fit(setup: StageSetup, stage: AnyStage) -> None:
    """Train a stage, or continue it; then its folder has the adapter, or the whole encoder.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is saved.
        OutputError: a checkpoint could not be written.
        DataError: the texts have changed since the checkpoint.
        RecipeError: see `fitting.train`.
    """
    with devices.own_environment():
        if isinstance(stage, MNTP):
            _fit_mntp(setup, stage)
        elif isinstance(stage, SimCSE):
            _fit_simcse(setup, stage)
        else:
            _fit_supervised(setup, stage)


def _fit_mntp(setup: StageSetup, stage: MNTP) -> None:
    tokens, base = setup.encoder.backbone.tokens, setup.recipe.model
    dtype = next(setup.trunk.parameters()).dtype
    language_model: Any = loading.load_causal_lm(
        base.base, dtype, setup.encoder.report.attention, revision=base.revision
    )
    mask_id = mntp.find_mask_id(tokens.tokenizer, stage.mask_token)
    vocabulary = language_model.config.get_text_config().vocab_size
    if mask_id is None or mask_id >= vocabulary:  # the mask token has no embedding yet
        mask_id = vocabulary
        for model in (setup.trunk, language_model):
            model.resize_token_embeddings(vocabulary + 1)
    make_trainable(setup, stage)
    masking = mntp.Masking(
        mask_id,
        min(vocabulary, len(tokens.tokenizer)),
        tuple({*tokens.prefix, *tokens.tokenizer.all_special_ids}),
        stage.mask_probability,
        stage.mask_style,
    )
    data, held_out = _blocks(setup, stage, masking)
    most_rows = mntp.micro_batch_rows(stage, setup.encoder.device)
    arguments = stage_arguments(
        stage,
        setup.folder,
        setup.recipe.seed,
        most_rows,
        remove_unused_columns=False,
        label_names=["labels"],
        eval_strategy="steps" if held_out else "no",
        eval_on_start=held_out is not None,
        per_device_eval_batch_size=most_rows,
    )
    trainer = StageTrainer(
        **callbacks(setup, stage, data),
        model=mntp.MaskedNextTokenModel(setup.trunk, language_model).to(setup.encoder.device),
        args=TrainingArguments(**arguments),
        data_collator=default_data_collator,
        train_dataset=data,
        eval_dataset=held_out,
        compute_metrics=mntp.token_metrics,
    )
    train(setup, stage, trainer)


def _blocks(
    setup: StageSetup, stage: MNTP, masking: mntp.Masking
) -> tuple[mntp.BlockData, mntp.BlockData | None]:
    """Blocks for training and, if any texts are held out, for evaluation.

    What was read and what was left out is written to ``data.json`` in the stage's folder.
    """
    apart, reason = stage.documents == "apart", setup.encoder.backbone.unpackable
    if apart and reason is not None:
        logger.warning("mntp.documents=joined is used instead of apart, because %s.", reason)
        apart = False
    tokens, seed = setup.encoder.backbone.tokens, setup.recipe.seed
    file = token_file(stage.data, stage.max_texts, tokens, setup.folder.parent / TOKENS)
    kept, held_out = file.split(stage.held_out, seed)
    blocks = Blocks(file, kept, stage.block_length)
    if devices.is_first():
        facts = {
            "source": file.source,
            "files": file.files,
            "texts": len(file.keys),
            "repeated": len(file.keys) - len(kept) - len(held_out),
            "held_out": len(held_out),
            "tokens": len(file.ids),
            "blocks": len(blocks),
            "dropped_tokens": blocks.dropped,
        }
        write_facts(setup.folder, facts)
    evaluated = None
    if len(held_out):
        held_out_blocks = Blocks(file, held_out, stage.block_length, held_out=True)
        evaluated = mntp.BlockData(held_out_blocks, masking, seed, apart)
    return mntp.BlockData(blocks, masking, seed, apart), evaluated


def _fit_simcse(setup: StageSetup, stage: SimCSE) -> None:
    def collate(texts: Sequence[str]) -> dict[str, Tensor]:
        features = setup.encoder.preprocess(texts, max_length=stage.max_length)
        return {f"text_{name}": value for name, value in features.items()}

    def batched(texts: Sequence[str], size: int) -> Batched:
        order = RandomSampler(texts, generator=torch.Generator().manual_seed(setup.recipe.seed))
        return texts, BatchSampler(order, size, drop_last=True)

    make_trainable(setup, stage)
    texts = read_texts(stage.data, stage.max_texts)
    if devices.is_first():
        write_facts(setup.folder, facts_of(stage.data, texts))
    kept, held_out = split_held_out(texts, stage.held_out, setup.recipe.seed)
    size = stage.batch_size // devices.world()
    held_out_size = min(size, len(held_out) // devices.world())
    evaluated = batched(held_out, held_out_size) if held_out_size >= FEWEST else None
    loss = TwoViewsLoss(setup.encoder, stage.temperature)
    with noise(setup.trunk, stage.attention_dropout, stage.embedding_dropout):
        _fit_contrastive(setup, stage, loss, collate, batched(kept, size), evaluated)


def _fit_supervised(setup: StageSetup, stage: Supervised) -> None:
    make_trainable(setup, stage)
    encoder, folder = setup.encoder, setup.folder.parent / TEACHER
    width = int(encoder.get_embedding_dimension())  # type: ignore[arg-type]
    if devices.is_first():
        facts = store_rows(stage.data, setup.folder / ROWS, teacher=stage.teacher)
        if stage.teacher is not None and stage.teacher.model is not None:
            compute_vectors(stage, folder, width, logger.info)  # only those that are missing
            facts["teacher"] = teacher_of(folder)
        write_facts(setup.folder, facts)
        # Writes the projection, which is then only read, also by the other processes.
        taught(stage, Dataset.from_file(str(setup.folder / ROWS)), folder, width)
    devices.wait()
    rows = Dataset.from_file(str(setup.folder / ROWS))
    kept, held_out = split_rows(rows, stage.held_out, setup.recipe.seed)
    world, seed = devices.world(), setup.recipe.seed
    size, weights = stage.batch_size // world, [pairs.weight for pairs in stage.data]
    batches = OneSourceBatches(np.asarray(kept["source"]), size, weights, world, seed)
    held_out_batches = measuring_batches(np.asarray(held_out["source"]), size, world)
    loss = RankingLoss(
        encoder,
        stage.temperature,
        stage.mini_batch_tokens,
        stage.false_negative_margin,
        stage.matryoshka,
        1 + len(stage.matryoshka_layers),
        TeacherLoss(encoder, stage.teacher) if stage.teacher else None,
    )
    teaching = taught(stage, rows, folder, width)
    limits = stage.hard_negatives, stage.max_length
    collate = PairCollator(encoder.preprocess, stage.data, *limits, teaching)
    evaluated = (held_out, held_out_batches) if held_out_batches else None
    with depths(encoder, stage.matryoshka_layers):
        _fit_contrastive(setup, stage, loss, collate, (kept, batches), evaluated)


def _fit_contrastive(
    setup: StageSetup,
    stage: SimCSE | Supervised,
    loss: nn.Module,
    collate: Any,
    data: Batched,
    held_out: Batched | None,
) -> None:
    rows = min(stage.batch_size, len(held_out[0])) if held_out else 0
    arguments = stage_arguments(
        stage,
        setup.folder,
        setup.recipe.seed,
        eval_strategy="steps" if held_out else "no",
        eval_on_start=held_out is not None,
        per_device_eval_batch_size=max(1, rows // devices.world()),
        prediction_loss_only=True,
        label_names=[],
        ddp_broadcast_buffers=False,
    )
    trainer = ContrastiveTrainer(
        **callbacks(setup, stage, data[1]),
        loss=loss,
        batches=(data[1], held_out and held_out[1]),
        model=setup.encoder,
        args=TrainingArguments(**arguments),
        data_collator=collate,
        train_dataset=data[0],
        eval_dataset=held_out and held_out[0],
    )
    train(setup, stage, trainer)
