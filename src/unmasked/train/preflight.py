"""Checks before a run writes anything: are there settings or texts that a stage could not use?

Otherwise the third stage would fail after hours. Cost: every text is read once (those of MNTP into
the token file that it trains on), and an adapter is attached and removed; no step is trained.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import partial
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
from unmasked.recipe.schema import MNTP, AnyStage, Pairs, Recipe, SimCSE, Supervised
from unmasked.recipe.teaching import Teacher
from unmasked.recipe.values import changed_from_default
from unmasked.train import devices
from unmasked.train.checking.leaks import Leaks, keys_in
from unmasked.train.data.columns import argument_of, find_columns
from unmasked.train.data.mixing import OneSourceBatches, split_rows
from unmasked.train.data.pairs import files_of, first_columns, read_rows
from unmasked.train.data.taught import check_widths, compute_vectors
from unmasked.train.data.texts import Blocks, folded, key_of, read_texts, split_held_out, token_file
from unmasked.train.fitting import TEACHER, TOKENS, is_done
from unmasked.train.losses.depth import depths
from unmasked.train.losses.simcse import noise
from unmasked.train.plan.shapes import trained_trunk
from unmasked.train.trainer import stage_arguments

logger = logging.getLogger(__name__)

OWN_PLACE = {
    "output_dir": "-o FOLDER",
    "resume_from_checkpoint": "-o FOLDER",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "gradient_checkpointing": "gradient_checkpointing",
}
"""Arguments of the trainer that the run sets itself, and the option or setting to use instead."""
UNUSED = {"auto_find_batch_size", "dataloader_persistent_workers", "label_names",
          "label_smoothing_factor", "load_best_model_at_end", "remove_unused_columns",
          "save_only_model"}  # fmt: skip
"""Arguments that have no effect, give each epoch the same masks, or lose an optimiser's state."""
UNUSED_WITH_BATCHES = {"dataloader_drop_last", "per_device_eval_batch_size",
                       "train_sampling_strategy"}  # fmt: skip
"""The same in the contrastive stages, which have samplers of their own."""


def check_settings(recipe: Recipe, path: Path) -> None:
    """Check everything that can be checked without the model.

    Args:
        recipe: the recipe of the run.
        path: the run folder.

    Raises:
        RecipeError: an argument of the trainer cannot be used, or a batch cannot be divided among
            the devices.
        DataError: a stage has no data, or its texts do not exist or cannot be read twice.
        MissingExtraError: bitsandbytes, which ``qlora`` needs, is not installed.
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
        for key in stage.trainer:
            if place := OWN_PLACE.get(key):
                raise RecipeError(f"{name}.trainer.{key} is set by the run. Fix: {place}.")
            if key in UNUSED or (key in UNUSED_WITH_BATCHES and not isinstance(stage, MNTP)):
                raise RecipeError(
                    f"{name}.trainer.{key} has no effect in this stage, or would change the result "
                    "of a run that is continued. Fix: leave it out."
                )
        arguments = stage_arguments(stage, path / name, recipe.seed)
        try:
            TrainingArguments(**arguments)
        except (ValueError, TypeError, ImportError) as error:
            raise RecipeError(
                f"{name}.trainer cannot be used: {error}. Fix: leave that out."
            ) from error


def check_inputs(
    recipe: Recipe,
    path: Path,
    encoder: TextEncoder,
    tell: Callable[[str], object],
    leaks: Leaks | None = None,
) -> None:
    """Check that the settings fit the model, and that the data is sound and fills a batch.

    Args:
        recipe, path: as in `check_settings`.
        encoder: the base, on which adapters and dropout are tried; its weights do not change.
        tell: called with a line of progress while the vectors of a teacher are computed.
        leaks: texts of the test sets; a warning names each stage whose data contains any of them.

    Raises:
        RecipeError: the model cannot take the longest input of a stage, or its vectors are shorter
            than a setting requires.
        ModelError: an adapter matches no layer, or dropout has no effect.
        DataError: a row is faulty, or there are too few rows.
    """
    trunk: Any = encoder.backbone.auto_model
    width = int(encoder.get_embedding_dimension())  # type: ignore[arg-type]
    leaks = leaks or Leaks({})
    for name, stage in _to_do(recipe, path):
        if isinstance(stage, MNTP):
            tokens = encoder.backbone.tokens
            file = token_file(stage.data, stage.max_texts, tokens, path / TOKENS)
            _warn(leaks.told(f"{name}.data", stage.data, file.keys))
            train, held_out = file.split(stage.held_out, recipe.seed)
            Blocks(file, train, stage.block_length)
            if len(held_out):
                Blocks(file, held_out, stage.block_length, held_out=True)
        elif isinstance(stage, SimCSE):
            _check_texts(stage, recipe.seed, leaks)
            with noise(trunk, stage.attention_dropout, stage.embedding_dropout):
                pass  # entering it proves that the dropout has an effect
        else:
            _check_pairs(stage, encoder, recipe.seed, leaks)
            _check_teacher(stage, width)
            _check_layers(stage, encoder)
            if max(stage.matryoshka, default=0) > width:
                raise RecipeError(
                    f"{name}.matryoshka: {max(stage.matryoshka)} given, but vectors have {width} "
                    f"numbers. Fix: shorter lengths; {width} itself is always trained."
                )
        if stage.lora.method != "full":
            attached: Any = trained_trunk(trunk, stage)
            attached.unload()
        _check_length(name, stage, encoder)
    # Last, because this is the only check that may take hours.
    for _, stage in _to_do(recipe, path):
        if isinstance(stage, Supervised) and stage.teacher and stage.teacher.model:
            compute_vectors(stage, path / TEACHER, width, tell)


def _to_do(recipe: Recipe, path: Path) -> Iterator[tuple[str, AnyStage]]:
    """Names and settings of the stages that are not finished."""
    return ((name, stage) for name, stage in recipe.stages() if not is_done(path / name))


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        logger.warning("%s", line)


def _check_texts(stage: SimCSE, seed: int, leaks: Leaks) -> None:
    texts = read_texts(stage.data, stage.max_texts)
    _warn(leaks.told("simcse.data", stage.data, keys_in(texts)))
    count = len(split_held_out(texts, stage.held_out, seed)[0])
    if count < stage.batch_size:
        raise DataError(
            f"simcse.data has {count} different texts to train on, fewer than one batch of "
            f"{stage.batch_size}. Fix: a smaller simcse.batch_size or simcse.held_out, or more "
            "texts."
        )


def _check_pairs(stage: Supervised, encoder: TextEncoder, seed: int, leaks: Leaks) -> None:
    """Read every row and try instructions and batches, which refuses what fits or fills none."""
    read = partial(read_rows, tell=logger.warning, teacher=stage.teacher)
    sources, queries = array("I"), array("Q")
    for number, pairs in enumerate(stage.data):
        keys, instructions = array("Q"), (set[str](), set[str]())
        for row in read(pairs):
            sources.append(number)
            instructions[0].add(row.query_instruction)
            instructions[1].add(row.document_instruction)
            queries.append(key_of(folded(row.query)))
            keys.extend(map(key_of, (row.query, row.positive, *row.negatives)))
        _warn(_without_prompt(pairs, *instructions))
        given_of_all = {*pairs.instruction, *pairs.document_instruction}.union(*instructions)
        longest = sorted(given_of_all, key=len)[-100:]  # in characters, nearly so in tokens
        encoder.preprocess([[given, "a"] for given in longest], max_length=stage.max_length)
        given = [_argument_of(pairs, stage.teacher)]
        _warn(leaks.told("supervised.data", given, np.frombuffer(keys, np.uint64)))
    rows = Dataset.from_dict({"source": np.asarray(sources)})
    train, _ = split_rows(rows, stage.held_out, seed, np.asarray(queries))
    batch, weights = stage.batch_size // devices.world(), [pairs.weight for pairs in stage.data]
    OneSourceBatches(np.asarray(train["source"]), batch, weights, devices.world())


def _without_prompt(pairs: Pairs, asked: set[str], answered: set[str]) -> Iterator[str]:
    """A warning for queries, and one for documents, if their rows' instructions differ."""
    for side, given in (("queries", asked), ("documents", answered)):
        if len(given) > 1:
            count = len(given - {""})
            several = f"{count:,} different instructions" if count > 1 else "an instruction"
            several += " in some rows and none in others" if "" in given else ""
            yield (
                f"supervised.data: the {side} of {pairs.path} have {several}, so none of these is "
                "saved as a prompt. Fix: to encode with one, give it with each text, as in "
                "training: model.encode([[INSTRUCTION, TEXT]])."
            )


def _argument_of(pairs: Pairs, teacher: Teacher | None) -> str:
    """A data set for ``unmasked data check``, with the column of the teacher that the rows have."""
    if teacher is None or teacher.wants is None or pairs.teacher is not None:
        return argument_of(pairs)
    there = first_columns(files_of(pairs)[0])
    taught = find_columns(pairs, there, pairs.path, teacher.wants).taught
    return argument_of(pairs, teacher=taught[0]) if len(taught) == 1 else argument_of(pairs)


def _check_teacher(stage: Supervised, width: int) -> None:
    """Refuse a teacher's scores or vectors that nothing reads, or from which nothing is learned."""
    teacher = stage.teacher
    for pairs in stage.data if teacher is None or teacher.wants is None else ():
        if pairs.teacher is not None:
            raise RecipeError(
                f"supervised.data: {pairs.path} names '{pairs.teacher}' as the column of a "
                "teacher, but nothing reads it. Fix: for scores supervised.teacher.loss=kl without "
                "a teacher.model, for vectors supervised.teacher.loss=cosine; or leave it out."
            )
    if teacher is None:
        return
    if teacher.wants == "scores" and teacher.loss != "cosent" and not stage.hard_negatives:
        raise RecipeError(
            f"supervised.hard_negatives 0 leaves one document for each query, from which the loss "
            f"{teacher.loss} learns nothing. Fix: supervised.hard_negatives=1, or more."
        )
    names = ("false_negative_margin", "matryoshka", "matryoshka_layers")
    if not teacher.contrastive and (unread := changed_from_default(stage, *names)):
        raise RecipeError(
            f"supervised.teacher.contrastive 0 leaves out the loss that reads {unread}. Fix: leave "
            "that out, or supervised.teacher.contrastive=1."
        )
    if teacher.wants == "vectors":
        rows = (row for pairs in stage.data for row in read_rows(pairs, teacher=teacher))
        check_widths(stage, rows, width)


def _check_layers(stage: Supervised, encoder: TextEncoder) -> None:
    """Refuse a Matryoshka depth that the model does not have, or cannot run alone."""
    model: Any = encoder.backbone.auto_model
    depth = int(model.config.get_text_config().num_hidden_layers)
    if max(stage.matryoshka_layers, default=0) >= depth:
        raise RecipeError(
            f"supervised.matryoshka_layers: {max(stage.matryoshka_layers)} given, but the model "
            f"has {depth} layers. Fix: fewer; all {depth} are always trained."
        )
    with depths(encoder, stage.matryoshka_layers):
        pass


def _check_length(name: str, stage: AnyStage, encoder: TextEncoder) -> None:
    """If inputs may be longer than the positions that the config names, try a forward of one."""
    key = "block_length" if isinstance(stage, MNTP) else "max_length"
    length = int(getattr(stage, key))
    unscaled = encoder.backbone.longest_unscaled
    if unscaled is not None and length > unscaled:
        logger.warning(
            "%s.%s: %d tokens. One text of more than %d stretches the positions of all texts in "
            "its batch (LongRoPE); encoding stretches only longer texts. Fix: %s.%s=%d, or less.",
            name, key, length, unscaled, name, key, unscaled,
        )  # fmt: skip
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
