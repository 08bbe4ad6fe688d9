"""Compares a running server, or another folder, with the encoder that it should be.

The fixed texts of `parity` are asked for one by one and all at once, and compared with what the
folder gives here. Where they differ, `faults.explain_difference` looks for the reason.

Shapes: N texts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from unmasked.checkpoint.location import locate
from unmasked.compat.llm2vec import LLM2Vec
from unmasked.errors import DataError
from unmasked.export.engines import engine_of
from unmasked.export.faults import Explanation, Reader, explain_difference
from unmasked.export.parity import LIMIT, TEXTS, Parity, compare_vectors, cosines, shown
from unmasked.export.remote import Refused, VectorServer

BATCHED = 0.9999
"""Below this cosine of a text alone and beside others, its vector depends on the batch."""
UNIT = 1e-2
"""How far the length of a vector may be from one."""

Ask = Callable[[Sequence[tuple[str, str]]], np.ndarray]


@dataclass(frozen=True)
class Verification:
    """What was found of a server or another folder.

    Attributes:
        target: what was asked.
        parity: its vectors against the folder's.
        explanation: why they differ; None where they are the same.
        notes: what else was found, in words: lengths of vectors, texts that were refused.
    """

    target: str
    parity: Parity
    explanation: Explanation | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {"target": self.target, **self.parity.as_dict(), "notes": list(self.notes)}
        return found | (self.explanation.as_dict() if self.explanation else {"faults": []})


def verify_target(
    target: str, folder: str | Path, model: str | None = None, limit: float = LIMIT
) -> Verification:
    """Compare a server or a folder with an encoder.

    Args:
        target: address of a server, or a folder: another encoder or an export.
        folder: the encoder that it should be.
        model: how the server calls its model.
        limit: the least cosine that counts as the same.

    Raises:
        DataError: it does not answer, or with vectors of another width.
        ModelError: a folder that cannot be loaded.
    """
    encoder = LLM2Vec.from_pretrained(folder, dtype="float32", allow_partial=True)
    ask, name = _asker(target, encoder, model)
    numbers, alone, notes = _one_by_one(ask)
    inputs = [list(TEXTS[n]) for n in numbers]
    ours = encoder.encode(inputs)
    if ours.shape != alone.shape:
        raise DataError(
            f"{name} gives vectors of {alone.shape[1]} numbers, {folder} of {ours.shape[1]}: "
            "they are not of one model. Fix: --against the folder that is served."
        )
    together = ask([TEXTS[n] for n in numbers])
    batched = cosines(alone, together).min() < BATCHED
    if batched:
        notes.append("a text's vector depends on the texts beside it: padding reaches it")
    notes += _lengths(alone)
    worse = np.where(cosines(ours, together) < cosines(ours, alone), 1, 0)
    compared = np.where(worse[:, None] == 1, together, alone)
    parity = compare_vectors(ours, compared, limit, numbers)
    explanation = None
    if not parity.same:
        reader = Reader(encoder, str(locate(folder).name), inputs)
        explanation = explain_difference(reader, alone, together if batched else None)
    return Verification(name, parity, explanation, tuple(notes))


def _asker(target: str, encoder: LLM2Vec, model: str | None) -> tuple[Ask, str]:
    """How to get vectors from a target, and what it is called."""
    if "://" not in target:
        engine = engine_of(Path(locate(target).name))
        return engine.vectors, f"{target} ({engine.name})"
    server = VectorServer(target, model)
    join, prefix = encoder.backbone.tokens.join, encoder.backbone.tokens.template.prefix

    def ask(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        if server.prompted:  # a request has one prompt
            order = sorted(range(len(pairs)), key=lambda n: pairs[n][0])
            parts = groupby(order, key=lambda n: pairs[n][0])
            rows = [server.vectors([pairs[n][1] for n in part], join(p)) for p, part in parts]
            return np.concatenate(rows)[np.argsort(order)]
        return server.vectors([prefix + join(instruction) + text for instruction, text in pairs])

    return ask, f"{server.address} ({server.shape})"


def _one_by_one(ask: Ask) -> tuple[list[int], np.ndarray, list[str]]:
    """Numbers of the texts that were taken, their vectors, and notes of those that were not."""
    numbers, found, notes = [], [], []
    for number, pair in enumerate(TEXTS):
        try:
            vector = ask([pair])[0]
            if pair[1] or vector.any():
                found.append(vector)
                numbers.append(number)
            else:
                notes.append(f"no vector (zeros) for {shown(number)}: it pools nothing")
        except Refused as error:
            if pair[1] and error.status not in (400, 413, 422):
                raise
            notes.append(f"refused {'a text' if pair[1] else 'the empty text'}: {error}")
    if not found:
        raise DataError(f"every text was refused. {notes[0]}")
    return numbers, np.stack(found), notes


def _lengths(vectors: np.ndarray) -> list[str]:
    lengths = np.linalg.norm(vectors, axis=1)
    if np.abs(lengths - 1).max() <= UNIT:
        return []
    return [
        f"not normalised: the vectors are {lengths.min():.3g} to {lengths.max():.3g} long, and a "
        "dot product of them is not their cosine"
    ]
