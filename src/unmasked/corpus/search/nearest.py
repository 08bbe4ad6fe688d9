"""The vectors nearest to a query by cosine, exactly: one product with all of them, block by block.

int8 numbers are put back to scale in the product, so that only what was lost in storing is lost.
Bits are compared by the number of them that differ, which is fast and coarse, and the best
`RESCORED` times as many are scored again with the query's own numbers. Where FAISS is installed and
there are `MANY` queries or more, it takes the products and the counts of bits, to the same result.

Cost: a pass over the stored bytes, the speed of memory: a million vectors of 256 float32 numbers in
a fraction of a second. Memory: one block of `BLOCK` vectors as float32.

Shapes: Q queries, N vectors, D width, W stored numbers of a vector, K nearest ones.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from unmasked.corpus.search.stored_files import StoredVectors

BLOCK = 16384
"""Vectors of a block."""
RESCORED = 32
"""How many times as many bit vectors as are asked for are scored again."""

MANY = 20
"""Queries from which FAISS is used: for one, the product alone is many times faster than FAISS."""


class Nearest(NamedTuple):
    """Scores (Q, K), highest first, and the places (Q, K) of the vectors; K is at most N."""

    scores: np.ndarray
    places: np.ndarray


def nearest_vectors(stored: StoredVectors, queries: np.ndarray, count: int) -> Nearest:
    """The vectors with the highest cosine to each query; of equal ones, the first.

    Args:
        stored: the vectors.
        queries: (Q, D) float32.
        count: K.
    """
    queries = np.asarray(queries, dtype=np.float32)
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    queries = np.ascontiguousarray(queries / np.maximum(lengths, 1e-12))
    if stored.precision == "binary":
        return _by_bits(stored, queries, count)
    if stored.norms is None:
        stored.norms = np.concatenate(
            [np.linalg.norm(_numbers(stored, part), axis=1) for _, part in stored.parts(BLOCK)]
            or [np.empty(0, np.float32)]
        )
    best = _Best(len(queries), count)
    scales = 1 / np.maximum(stored.norms, 1e-12)
    for place, part in stored.parts(BLOCK):
        block, scale = _numbers(stored, part), scales[place : place + len(part)]
        if faiss := _faiss(len(queries)):
            scores, found = faiss.knn(
                queries,
                np.ascontiguousarray(block * scale[:, None]),
                min(count, len(part)),
                metric=faiss.METRIC_INNER_PRODUCT,
            )
            best.add(scores, found + place)
        else:
            best.add_all((queries @ block.T) * scale, place)
    return best.result()


def _faiss(queries: int) -> Any:
    """FAISS, or None where it is not installed or the queries are few."""
    return import_module("faiss") if queries >= MANY and find_spec("faiss") else None


def _numbers(stored: StoredVectors, part: np.ndarray) -> np.ndarray:
    """Stored vectors as the (n, D) float32 numbers that they stand for."""
    numbers = np.asarray(part, dtype=np.float32)
    if stored.ranges is None:
        return numbers
    low, high = stored.ranges
    step = (high - low) / 255
    restored: np.ndarray = numbers * step + (low + 128.5 * step)
    return restored  # the middle of what was rounded down to it


def _by_bits(stored: StoredVectors, queries: np.ndarray, count: int) -> Nearest:
    """The nearest bit vectors: by differing bits first, then by the query's own numbers."""
    asked = np.packbits(queries > 0, axis=1)  # (Q, W)
    rough = _Best(len(queries), max(RESCORED * count, 256))
    for place, part in stored.parts(BLOCK):
        if faiss := _faiss(len(asked)):
            differing, found = faiss.knn_hamming(
                asked, np.ascontiguousarray(part), min(rough.count, len(part))
            )
            rough.add(-differing.astype(np.float32), found.astype(np.int64) + place)
        else:
            for query, bits in enumerate(asked):
                differing = _set_bits(part ^ bits).sum(axis=1, dtype=np.int32)
                rough.add_all(-differing[None].astype(np.float32), place, query)
    best = _Best(len(queries), count)
    for query, places in enumerate(rough.result().places):
        bits = np.unpackbits(stored.gather(places), axis=1)[:, : stored.width]
        signs = bits.astype(np.float32) * 2 - 1  # (n, D)
        best.add((signs @ queries[query])[None] / stored.width**0.5, places[None], query)
    return best.result()


def _set_bits(packed: np.ndarray) -> np.ndarray:
    """How many bits are set in each byte."""
    if hasattr(np, "bitwise_count"):  # numpy 2
        counts: np.ndarray = np.bitwise_count(packed)
        return counts
    table = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)
    counts = table[packed]
    return counts


class _Best:
    """The best of what was seen so far, for each query."""

    def __init__(self, queries: int, count: int) -> None:
        self.count = count
        self.scores = [np.empty(0, np.float32)] * queries
        self.places = [np.empty(0, np.int64)] * queries

    def add_all(self, scores: np.ndarray, place: int, first: int = 0) -> None:
        """Scores (q, n) of all vectors from a place on, of the queries from `first` on."""
        places = np.arange(place, place + scores.shape[1])
        for query, row in enumerate(scores, start=first):
            least = self.scores[query][-1] if len(self.scores[query]) == self.count else -np.inf
            good = np.flatnonzero(row > least)  # of equal ones the first was there before
            if len(good) > self.count:
                border = np.partition(row[good], -self.count)[-self.count]
                good = good[row[good] >= border]
            self._merge(query, row[good], places[good])

    def add(self, scores: np.ndarray, places: np.ndarray, first: int = 0) -> None:
        """Scores (q, n) of the vectors at places (q, n), of the queries from `first` on."""
        for query, row in enumerate(zip(scores, places, strict=True), start=first):
            self._merge(query, *row)

    def _merge(self, query: int, scores: np.ndarray, places: np.ndarray) -> None:
        scores = np.concatenate([self.scores[query], scores])
        places = np.concatenate([self.places[query], places])
        order = np.lexsort((places, -scores))[: self.count]
        self.scores[query], self.places[query] = scores[order], places[order]

    def result(self) -> Nearest:
        """Everything has been added."""
        return Nearest(np.stack(self.scores), np.stack(self.places))
