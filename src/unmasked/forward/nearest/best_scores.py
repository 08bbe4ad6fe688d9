"""The highest scores of queries, kept while all vectors pass by in blocks.

It is what an exact search needs that must not hold all its scores: the product of queries and one
block at a time, on the device that is given, through FAISS where that is installed, else numpy.

Cost: the product, and one comparison for each score.

Shapes: Q queries, n vectors of a block, D width, K best ones.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch

MANY = 20
"""Queries from which FAISS is used: for one, the product alone is many times faster than FAISS."""


class Best(NamedTuple):
    """Scores (Q, K), highest first, and the places (Q, K) of the vectors."""

    scores: np.ndarray
    places: np.ndarray


class BestScores:
    """The best of what was seen so far, for each query; of equal scores, the first place.

    What may belong to them is collected, and sorted when there is as much of it as is kept.

    Args:
        queries: Q.
        count: K.
    """

    def __init__(self, queries: int, count: int) -> None:
        self.queries, self.count = queries, count
        self._least = np.full(queries, -np.inf, np.float32)  # what a score has to be above
        self._seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._kept = self._collected = 0

    def add_all(self, scores: np.ndarray, place: int, first: int = 0) -> None:
        """Scores (q, n) of all vectors from a place on, of the queries from `first` on."""
        least = self._least[first : first + len(scores), None]
        good = scores > least  # of equal ones the first was there before
        if scores.shape[1] > self.count and not np.isfinite(least).all():
            good &= scores >= np.partition(scores, -self.count, axis=1)[:, -self.count, None]
        rows, columns = np.nonzero(good)
        self._collect(rows + first, columns + place, scores[rows, columns])

    def add(self, scores: np.ndarray, places: np.ndarray, first: int = 0) -> None:
        """Scores (q, n) of the vectors at places (q, n), of the queries from `first` on."""
        rows, columns = np.nonzero(scores > self._least[first : first + len(scores), None])
        self._collect(rows + first, places[rows, columns], scores[rows, columns])

    def _collect(self, rows: np.ndarray, places: np.ndarray, scores: np.ndarray) -> None:
        self._seen.append((rows, places, scores))
        self._collected += len(rows)
        if self._collected - self._kept > self.queries * self.count:
            self._sort()

    def _sort(self) -> None:
        """Leave what is best so far, query by query, the best first."""
        rows, places, scores = map(np.concatenate, zip(*self._seen, strict=True))
        order = np.lexsort((places, -scores, rows))
        rows, places, scores = rows[order], places[order], scores[order]
        starts = np.searchsorted(rows, np.arange(self.queries + 1))
        kept = np.arange(len(rows)) - starts[rows] < self.count
        full = np.flatnonzero(np.diff(starts) >= self.count)
        self._least[full] = scores[starts[full] + self.count - 1]
        self._seen = [(rows[kept], places[kept], scores[kept])]
        self._kept = self._collected = int(kept.sum())

    def result(self) -> Best:
        """Everything has been added; where fewer than K were, the others have place -1."""
        best = Best(
            np.full((self.queries, self.count), -np.inf, np.float32),
            np.full((self.queries, self.count), -1, np.int64),
        )
        if self._seen:
            self._sort()
            rows, places, scores = self._seen[0]
            ranks = np.arange(len(rows)) - np.searchsorted(rows, rows)
            best.scores[rows, ranks], best.places[rows, ranks] = scores, places
        most = int((best.places >= 0).sum(axis=1).max(initial=0))
        return Best(best.scores[:, :most], best.places[:, :most])


def add_products(
    best: BestScores,
    queries: np.ndarray,
    block: np.ndarray,
    place: int,
    scale: np.ndarray | None = None,
    device: Any = "cpu",
) -> None:
    """Multiply all queries (Q, D) with a block (n, D) of vectors, and keep the best products.

    Args:
        best: of as many queries.
        queries, block: float32, of length 1 where cosines are wanted.
        place: of the first vector of the block.
        scale: (n,) factors of the vectors of the block.
        device: where the product is computed.
    """
    count = min(best.count, len(block))
    compiled = torch.device(device).type != "cpu" or faiss_for(len(queries)) is not None
    if scale is not None and compiled:
        block = block * scale[:, None]
    if torch.device(device).type != "cpu":
        parts = (torch.as_tensor(part, device=device) for part in (queries, block))
        scores, found = torch.topk(torch.matmul(next(parts), next(parts).T), count)
        best.add(scores.cpu().numpy(), found.cpu().numpy() + place)
    elif faiss := faiss_for(len(queries)):
        block = np.ascontiguousarray(block)
        scores, found = faiss.knn(queries, block, count, metric=faiss.METRIC_INNER_PRODUCT)
        best.add(scores, found + place)
    else:
        products = queries @ block.T
        best.add_all(products if scale is None else products * scale, place)


def faiss_for(queries: int) -> Any:
    """FAISS, or None where it is not installed or the queries are few."""
    return import_module("faiss") if queries >= MANY and find_spec("faiss") else None
