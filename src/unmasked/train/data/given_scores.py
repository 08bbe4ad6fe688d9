"""A teacher's scores or vectors in a row, divided among its positives.

A single score of a pair is its score. A single score of a triplet is the margin between its
documents, as in data for margin-MSE; it is read as the scores (margin, 0).

Cost: parsing the cells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from unmasked.recipe.teaching import Teacher
from unmasked.train.data.cells import FaultyCell, numbers_of, vectors_of
from unmasked.train.data.columns import Columns

Given = tuple[list[float], list[list[float]]]
"""Scores and vectors of one positive and the negatives; the vector of the query comes first."""


def given_scores(
    known: Columns,
    values: Mapping[str, Any],
    teacher: Teacher | None,
    positives: int,
    negatives: int,
) -> list[Given]:
    """For each positive of a row, a teacher's scores and vectors, with those of the negatives.

    Args:
        known: the roles of the columns.
        values: the cells of the row.
        teacher: what is learned; None if the row is only kept: then everything is taken that some
            loss could learn, and anything else in these columns is no teacher's.
        positives, negatives: how many documents the row has.

    Raises:
        FaultyCell: there is not one for each text, or the loss can learn nothing from them.
    """
    nothing: list[Given] = [([], [])] * positives
    if not known.taught:
        return nothing
    if teacher is not None:
        is_vectors = teacher.wants == "vectors"
        return _divided(known, values, is_vectors, teacher.loss, positives, negatives)
    try:
        is_vectors = _are_vectors(values[known.taught[0]])
        return _divided(known, values, is_vectors, None, positives, negatives)
    except FaultyCell:
        return nothing


def _divided(
    known: Columns,
    values: Mapping[str, Any],
    is_vectors: bool,
    loss: str | None,
    positives: int,
    negatives: int,
) -> list[Given]:
    name, count = known.taught[0], positives + negatives
    if is_vectors:
        query, *documents = vectors_of(name, values[name], 1 + count)
        return [([], [query, own, *documents[positives:]]) for own in documents[:positives]]
    if len(known.taught) == 2:  # one column of positives' scores, one of negatives'
        of_each = zip(known.taught, (positives, negatives), strict=True)
        scores = [score for key, n in of_each for score in numbers_of(key, values[key], n)]
    elif (positives, negatives) == (1, 1) and _is_margin(values[name]) and loss != "cosent":
        scores = [*numbers_of(name, values[name], 1), 0.0]
    else:
        scores = numbers_of(name, values[name], count)
    if loss not in (None, "cosent") and not negatives:
        given = f"a row without negatives, from which the loss {loss} learns nothing"
        raise FaultyCell(given, "give negatives, or loss=cosent contrastive=0")
    return [([own, *scores[positives:]], []) for own in scores[:positives]]


def _is_margin(value: object) -> bool:
    """Whether a cell is a single number, perhaps as a string."""
    return not isinstance(value, list | tuple) and not str(value).lstrip().startswith("[")


def _are_vectors(value: object) -> bool:
    """Whether a cell is a list of lists, perhaps as a string."""
    if isinstance(value, str):
        return re.match(r"\s*\[\s*\[", value) is not None
    return isinstance(value, list | tuple) and any(isinstance(v, list | tuple) for v in value)
