"""Compares the vectors of a running server, or of another folder, with those of an encoder.

The vectors of the fixed texts of `parity` are requested one by one and all at once. If they differ
from the encoder's own, `faults.explain_difference` looks for the reason.

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
"""If the vectors of a text alone and in a batch have a lower cosine, they depend on the batch."""
UNIT = 1e-2  # largest difference between 1 and the length of a vector that counts as normalised

Ask = Callable[[Sequence[tuple[str, str]]], np.ndarray]


@dataclass(frozen=True)
class Verification:
    """The result of a comparison."""

    target: str  # the server or folder whose vectors were compared
    parity: Parity  # its vectors compared with the encoder's
    explanation: Explanation | None  # why they differ; None if they are the same
    notes: tuple[str, ...]
    """Sentences about other findings: lengths of vectors, texts that were refused."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {"target": self.target, **self.parity.as_dict(), "notes": list(self.notes)}
        return found | (self.explanation.as_dict() if self.explanation else {"faults": []})


def verify_target(
    target: str, folder: str | Path, model: str | None = None, limit: float = LIMIT
) -> Verification:
    """Compare the vectors of a server or a folder with those of an encoder.

    Args:
        target: the address of a server, or the folder of another encoder or of an export.
        folder: the encoder whose vectors are the right ones.
        model: the server's name for its model.
        limit: the minimum cosine of vectors that count as the same.

    Raises:
        DataError: the server does not answer, or its vectors have another width.
        ModelError: a folder cannot be loaded.
    """
    encoder = LLM2Vec.from_pretrained(folder, dtype="float32", allow_partial=True)
    ask, name = _asker(target, encoder, model)
    numbers, alone, notes = _one_by_one(ask)
    inputs = [list(TEXTS[n]) for n in numbers]
    ours = encoder.encode(inputs)
    if ours.shape != alone.shape:
        raise DataError(
            f"{name} gives vectors of {alone.shape[1]} numbers, {folder} of {ours.shape[1]}: "
            "they are different models. Fix: --against the folder that is served."
        )
    together = ask([TEXTS[n] for n in numbers])
    batched = cosines(alone, together).min() < BATCHED
    if batched:
        notes.append("a text's vector depends on the other texts of its batch: padding reaches it")
    notes += _lengths(alone)
    # Of the two vectors of each text, the one that is farther from ours is judged.
    batch_is_worse = cosines(ours, together) < cosines(ours, alone)
    worst = np.where(batch_is_worse[:, None], together, alone)
    parity = compare_vectors(ours, worst, limit, numbers)
    explanation = None
    if not parity.same:
        reader = Reader(encoder, str(locate(folder).name), inputs)
        explanation = explain_difference(reader, alone, together if batched else None)
    return Verification(name, parity, explanation, tuple(notes))


def _asker(target: str, encoder: LLM2Vec, model: str | None) -> tuple[Ask, str]:
    """The function that gets vectors from a target, and the target's name in messages."""
    if "://" not in target:
        engine = engine_of(Path(locate(target).name))
        return engine.vectors, f"{target} ({engine.name})"
    server = VectorServer(target, model)
    join, prefix = encoder.backbone.tokens.join, encoder.backbone.tokens.template.prefix

    def ask(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        if server.prompted:  # a request has one prompt, so there is one request per instruction
            order = sorted(range(len(pairs)), key=lambda n: pairs[n][0])
            parts = groupby(order, key=lambda n: pairs[n][0])
            rows = [server.vectors([pairs[n][1] for n in part], join(i)) for i, part in parts]
            return np.concatenate(rows)[np.argsort(order)]  # back in the order of `pairs`
        return server.vectors([prefix + join(instruction) + text for instruction, text in pairs])

    return ask, f"{server.address} ({server.shape})"


def _one_by_one(ask: Ask) -> tuple[list[int], np.ndarray, list[str]]:
    """Indices of the texts that got a vector, these vectors, and notes about the other texts."""
    numbers, found, notes = [], [], []
    for number, pair in enumerate(TEXTS):
        try:
            vector = ask([pair])[0]
            if pair[1] or vector.any():
                found.append(vector)
                numbers.append(number)
            else:
                notes.append(f"no vector (zeros) for {shown(number)}: nothing is pooled")
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
        f"not normalised: the vectors are {lengths.min():.3g} to {lengths.max():.3g} long, so the "
        "dot product of two is not their cosine"
    ]
