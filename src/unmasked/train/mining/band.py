"""The documents in a band of ranks for each query, without those that answer it.

A document answers a query if it equals one of the query's positives, in any row, or the query
itself; case and white space make no difference, also between the queries of two rows. The search is
exact: all queries against all documents, one shard of each at a time.

Shapes: Q distinct queries, N distinct documents, R rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from unmasked.forward.nearest.best_scores import BestScores, add_products
from unmasked.train.mining import work_folder
from unmasked.train.mining.work_folder import NumberedArrays, Progress

FOUND = np.dtype([("place", np.int64), ("score", np.float32)])
"""The number of a document and its cosine to the query; place -1 if there was none."""
MANY = 256
"""A query with up to this many answers is searched for that many more documents, and its answers
are removed from the result. For queries with more answers, that would take too much memory: theirs
are excluded during the search, which is slower."""


class Answers:
    """Which documents answer which query.

    Args:
        queries: (R,) the number of each row's query.
        documents: (R,) the number of each row's positive.
        query_keys: (Q,) numbers that are equal for queries that are equal when folded.
        document_keys: (N,) the same for documents.
    """

    def __init__(
        self,
        queries: np.ndarray,
        documents: np.ndarray,
        query_keys: np.ndarray,
        document_keys: np.ndarray,
    ) -> None:
        # Queries that are equal when folded form a group, which has the answers of all of them.
        _, self._group = np.unique(query_keys, return_inverse=True)
        groups = self._group[queries]
        order = np.argsort(groups, kind="stable")
        self._answers = document_keys[documents[order]]  # group by group, see `_ends`
        self._ends = np.searchsorted(groups[order], np.arange(len(query_keys) + 1))
        self._query_keys, self._document_keys = query_keys, document_keys
        self._known, self._times = np.unique(document_keys, return_counts=True)

    def keys(self, query: int) -> np.ndarray:
        """The distinct keys of everything that answers a query."""
        group = self._group[query]
        own = self._answers[self._ends[group] : self._ends[group + 1]]
        return np.unique(np.append(own, self._query_keys[query]))

    def number(self, query: int) -> int:
        """How many documents answer a query."""
        keys = self.keys(query)
        there = np.minimum(np.searchsorted(self._known, keys), len(self._known) - 1)
        # The query's own key may be that of no document, so each match is checked.
        return int(self._times[there][self._known[there] == keys].sum())

    def among(self, query: int, documents: np.ndarray) -> np.ndarray:
        """Whether each of some documents answers a query."""
        return np.isin(self._document_keys[documents], self.keys(query))


def search_bands(
    bands: NumberedArrays,
    queries: NumberedArrays,
    documents: NumberedArrays,
    answers: Answers,
    ranks: tuple[int, int],
    progress: Progress,
    device: Any = "cpu",
) -> None:
    """Search every query, and write the documents found: (Q, W) of `FOUND`, the nearest first.

    Args:
        bands: where the result is written; shards that exist are kept.
        queries, documents: unit vectors.
        answers: documents to leave out.
        ranks: the first rank of the band, from 0, and the one after its last; W is the difference.
        progress: called after every block.
        device: where the products are computed.
    """
    first, last = ranks
    blocks, shard = len(documents), work_folder.SHARD

    def find(begin: int, end: int) -> np.ndarray:
        counts = np.array([answers.number(query) for query in range(begin, end)])
        few, many = np.flatnonzero(counts <= MANY), np.flatnonzero(counts > MANY)
        most = last + int(counts[few].max(initial=0))
        best = BestScores(len(few), min(most, documents.count))
        others = BestScores(len(many), min(last, documents.count))
        asked = np.ascontiguousarray(queries.load(begin // shard))
        for number in range(blocks):
            block, place = documents.load(number), number * shard
            if len(few):
                add_products(best, asked[few], block, place, device=device)
            if len(many):
                products = asked[many] @ block.T
                places = np.arange(place, place + len(block))
                for row, query in zip(products, many.tolist(), strict=True):
                    row[answers.among(begin + query, places)] = -np.inf
                others.add_all(products, place)
            progress("searching", begin // shard * blocks + number + 1, len(queries) * blocks)
        found = np.zeros((end - begin, last - first), FOUND)
        found["place"] = -1
        for rows, scored in ((few, best), (many, others)):
            for row, scores, places in zip(rows.tolist(), *scored.result(), strict=True):
                good = (places >= 0) & ~answers.among(begin + row, places)
                kept = np.flatnonzero(good)[first:last]
                found["place"][row, : len(kept)] = places[kept]
                found["score"][row, : len(kept)] = scores[kept]
        return found

    bands.make(find, lambda rows: None)
