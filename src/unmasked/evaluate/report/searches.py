"""The searches that a report shows: the same queries before and after, and how many got better.

A few examples are drawn at random; what they cannot say, the shares of all queries do. Cost: one
product of vectors; encoding is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unmasked.evaluate.report.samples import Sample
from unmasked.evaluate.tasks.task_vectors import Encode, encoded, most_similar

SHOWN = 4
"""Queries that are shown; the sample is in random order, so they are the first ones."""


@dataclass(frozen=True)
class Search:
    """What one encoder found for a query."""

    rank: int  # of the first wanted document, from 1
    first: int  # position of the document that came first


@dataclass(frozen=True)
class Shares:
    """What became of all queries of a sample, after against before; shares from 0 to 1."""

    queries: int
    better: float
    worse: float
    median: tuple[float, float]  # rank before and after
    first: tuple[float, float]  # share of queries whose wanted document comes first


def search(sample: Sample, encode: Encode) -> list[Search]:
    """The search of each query of a sample among its documents."""
    texts, queries = [text for _, text in sample.documents], [q.text for q in sample.queries]
    documents, asked = encoded(encode, texts, "document"), encoded(encode, queries, "query")
    ranked = most_similar(asked, documents, len(texts), tie_rank=np.arange(len(texts)))
    made = []
    for row, query in zip(ranked, sample.queries, strict=True):
        found = row[row != query.own] if query.own is not None else row
        rank = 1 + int(np.isin(found, list(query.wanted)).argmax())
        made.append(Search(rank, int(found[0])))
    return made


def shares(before: Sequence[Search], after: Sequence[Search]) -> Shares:
    """How many searches got better and worse."""
    was, now = (np.array([found.rank for found in side]) for side in (before, after))
    medians, firsts = [
        (float(one), float(other))
        for one, other in (
            (np.median(was), np.median(now)),
            ((was == 1).mean(), (now == 1).mean()),
        )
    ]
    better, worse = float((now < was).mean()), float((now > was).mean())
    return Shares(len(was), better, worse, medians, firsts)
