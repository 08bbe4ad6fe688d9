"""What is refused before a run writes anything: settings and texts that a stage could not use.

A stage that stands third would otherwise fail after hours. Cost: every text is read once, MNTP's
into the token file that it trains on; an adapter is attached and taken off; no step is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainingArguments

from unmasked.errors import DataError, MissingExtraError, RecipeError
from unmasked.files.training_source import training_source
from unmasked.model import TextEncoder
from unmasked.recipe.schema import MNTP, AnyStage, Recipe, SimCSE, Supervised
from unmasked.train import devices
from unmasked.train.data.mixing import OneSourceBatches
from unmasked.train.data.pairs import read_rows, split_rows
from unmasked.train.data.texts import Blocks, read_texts, split_held_out, token_file
from unmasked.train.fitting import TOKENS, is_done
from unmasked.train.losses.simcse import noise
from unmasked.train.plan.shapes import trained_trunk
from unmasked.train.trainer import stage_arguments

logger = logging.getLogger(__name__)

OWN_PLACE = {"output_dir": "-o FOLDER", "max_steps": "steps"}
"""Arguments of the trainer that the run itself sets, and where they are given."""


def check_settings(recipe: Recipe, path: Path) -> None:
    """Refuse what can be refused without the model.

    Args:
        recipe: of the run.
        path: the run folder.

    Raises:
        RecipeError: arguments of the trainer, or a batch that cannot be divided among the devices.
        DataError: a stage without data, or texts that do not exist or cannot be read again.
        MissingExtraError: no bitsandbytes for ``qlora``.
    """
    for name, stage in _to_do(recipe, path):
        if not stage.data:
            raise DataError(
                f"{name}.data: nothing to train on was given. Fix: {name}.data=FILE (or "
                f"'{name}.data=[FILE, FILE]'), or {name}=null to leave the stage out."
            )
        for source in map(training_source, [] if isinstance(stage, Supervised) else stage.data):
            if not source.files or not source.again:
                raise DataError(
                    f"{name}.data: {source.name} cannot be read again, which continuing a run "
                    "needs. Fix: write the texts to a file."
                )
        if stage.lora.method == "qlora" and find_spec("bitsandbytes") is None:
            raise MissingExtraError("bitsandbytes", "qlora")
        for key in OWN_PLACE.keys() & stage.trainer.keys():
            raise RecipeError(f"{name}.trainer.{key} is set by the run. Fix: {OWN_PLACE[key]}.")
        arguments = stage_arguments(stage, path / name, recipe.seed)
        try:
            TrainingArguments(**arguments)
        except (ValueError, TypeError, ImportError) as error:
            raise RecipeError(f"{name}.trainer cannot be used: {error}") from error


def check_inputs(recipe: Recipe, path: Path, encoder: TextEncoder) -> None:
    """Refuse what does not fit the model, and texts that make no batch.

    Args:
        recipe, path: as above.
        encoder: of the base, to try on; its weights are frozen.

    Raises:
        RecipeError: the model fails at the longest input of a stage, or vectors are too short.
        ModelError: adapters that fit no layer, or dropout that does not act.
        DataError: a faulty row, or too few of them.
    """
    trunk: Any = encoder.backbone.auto_model
    for name, stage in _to_do(recipe, path):
        if isinstance(stage, MNTP):
            tokens = encoder.backbone.tokens
            file = token_file(stage.data, stage.max_texts, tokens, path / TOKENS)
            train, held_out = file.split(stage.held_out, recipe.seed)
            Blocks(file, train, stage.block_length)
            if len(held_out):
                Blocks(file, held_out, stage.block_length, held_out=True)
        elif isinstance(stage, SimCSE):
            texts = read_texts(stage.data, stage.max_texts)
            count = len(split_held_out(texts, stage.held_out, recipe.seed)[0])
            if count < stage.batch_size:
                raise DataError(
                    f"simcse.data has {count} different texts to train on, fewer than one batch "
                    f"of {stage.batch_size}. Fix: a smaller simcse.batch_size or simcse.held_out, "
                    "or more texts."
                )
            with noise(trunk, stage.attention_dropout, stage.embedding_dropout):
                pass
        else:
            _check_pairs(stage, recipe.seed)
            width = encoder.backbone.get_embedding_dimension()
            if max(stage.matryoshka, default=0) > width:
                raise RecipeError(
                    f"{name}.matryoshka: {max(stage.matryoshka)} given, but vectors have {width} "
                    f"numbers. Fix: shorter lengths; {width} itself is always trained."
                )
        if stage.lora.method != "full":
            attached: Any = trained_trunk(trunk, stage)
            attached.unload()
        _check_length(name, stage, encoder)


def _to_do(recipe: Recipe, path: Path) -> Iterator[tuple[str, AnyStage]]:
    return ((name, stage) for name, stage in recipe.stages() if not is_done(path / name))


def _check_pairs(stage: Supervised, seed: int) -> None:
    """Read every row, and deal batches of them, which refuses a data set that fills none."""
    counts = [sum(1 for _ in read_rows(pairs, tell=logger.warning)) for pairs in stage.data]
    rows = Dataset.from_dict({"source": np.repeat(np.arange(len(counts)), counts)})
    train, _ = split_rows(rows, stage.held_out, seed)
    batch, weights = stage.batch_size // devices.world(), [pairs.weight for pairs in stage.data]
    OneSourceBatches(np.asarray(train["source"]), batch, weights, devices.world())


def _check_length(name: str, stage: AnyStage, encoder: TextEncoder) -> None:
    """Where an input may be longer than the model's positions, try one of that length."""
    key = "block_length" if isinstance(stage, MNTP) else "max_length"
    length = int(getattr(stage, key))
    model: Any = encoder.backbone.auto_model
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    if length <= most:
        return
    try:
        with torch.no_grad():
            ids = torch.zeros(1, length, dtype=torch.int64, device=encoder.device)
            model(input_ids=ids, use_cache=False).last_hidden_state.cpu()
    except (IndexError, RuntimeError) as error:
        raise RecipeError(
            f"{name}.{key}: {length} tokens, but the model has {most} positions. "
            f"Fix: {name}.{key}={most}, or less."
        ) from error
