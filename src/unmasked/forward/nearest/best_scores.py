"""The highest scores of queries, updated while all vectors are read block by block.

An exact search that does not keep all scores in memory: queries are multiplied with one block at a
time, on a GPU by torch, on a CPU by FAISS if it is installed, otherwise by numpy.

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
"""Number of queries from which FAISS is used: for a single one numpy is many times faster."""


class Best(NamedTuple):
    """Scores (Q, K), highest first, and the places (Q, K) of the vectors."""

    scores: np.ndarray
    places: np.ndarray


class BestScores:
    """The K best scores so far for each of Q queries; of equal scores, the first place.

    Candidates are collected, and sorted only when there are more new ones than the Q x K to keep.

    Args:
        queries: Q.
        count: K.
    """

    def __init__(self, queries: int, count: int) -> None:
        self.queries, self.count = queries, count
        self._least = np.full(queries, -np.inf, np.float32)  # a new score must be above this
        self._seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # (rows, places, scores)
        self._kept = self._collected = 0  # entries of `_seen` after the last sort, and now

    def add_all(self, scores: np.ndarray, place: int, first: int = 0) -> None:
        """Add scores (q, n) of the n vectors from `place` on and the q queries from `first` on."""
        least = self._least[first : first + len(scores), None]
        good = scores > least  # not equal: an earlier place has that score already
        if scores.shape[1] > self.count and not np.isfinite(least).all():
            # Some query has fewer than K scores, so `least` excludes nothing: take the K best.
            good &= scores >= np.partition(scores, -self.count, axis=1)[:, -self.count, None]
        rows, columns = np.nonzero(good)
        self._collect(rows + first, columns + place, scores[rows, columns])

    def add(self, scores: np.ndarray, places: np.ndarray, first: int = 0) -> None:
        """Add scores (q, n) of the vectors at places (q, n) and the q queries from `first` on."""
        rows, columns = np.nonzero(scores > self._least[first : first + len(scores), None])
        self._collect(rows + first, places[rows, columns], scores[rows, columns])

    def _collect(self, rows: np.ndarray, places: np.ndarray, scores: np.ndarray) -> None:
        self._seen.append((rows, places, scores))
        self._collected += len(rows)
        if self._collected - self._kept > self.queries * self.count:
            self._sort()

    def _sort(self) -> None:
        """Keep only the best scores of each query, query by query, the best first."""
        rows, places, scores = map(np.concatenate, zip(*self._seen, strict=True))
        order = np.lexsort((places, -scores, rows))  # the last key is the first to sort by
        rows, places, scores = rows[order], places[order], scores[order]
        starts = np.searchsorted(rows, np.arange(self.queries + 1))  # of each query's entries
        kept = np.arange(len(rows)) - starts[rows] < self.count  # rank below K
        full = np.flatnonzero(np.diff(starts) >= self.count)  # queries that have K scores
        self._least[full] = scores[starts[full] + self.count - 1]
        self._seen = [(rows[kept], places[kept], scores[kept])]
        self._kept = self._collected = int(kept.sum())

    def result(self) -> Best:
        """The best scores, once all are added; a query with too few scores has places -1."""
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
        best: made for Q queries.
        queries, block: float32, normalised if the scores are to be cosines.
        place: the index of the first vector of the block among all.
        scale: (n,) factors of the vectors of the block.
        device: where the product is computed.
    """
    count = min(best.count, len(block))
    on_cpu = torch.device(device).type == "cpu"
    faiss = faiss_for(len(queries)) if on_cpu else None
    if scale is not None and (faiss or not on_cpu):
        block = block * scale[:, None]  # these return the best scores only, so scale before
    if not on_cpu:
        products = torch.as_tensor(queries, device=device) @ torch.as_tensor(block, device=device).T
        scores, found = torch.topk(products, count)
        best.add(scores.cpu().numpy(), found.cpu().numpy() + place)
    elif faiss:
        block = np.ascontiguousarray(block)
        scores, found = faiss.knn(queries, block, count, metric=faiss.METRIC_INNER_PRODUCT)
        best.add(scores, found + place)
    else:
        all_scores = queries @ block.T
        best.add_all(all_scores if scale is None else all_scores * scale, place)


def faiss_for(queries: int) -> Any:
    """The module of FAISS; None if it is not installed or there are few queries."""
    return import_module("faiss") if queries >= MANY and find_spec("faiss") else None
