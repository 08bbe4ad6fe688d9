"""The searches that a report shows: the same queries before and after training.

A few examples are drawn at random, and the share of better results is computed over all queries.
Cost: one matrix product; the caller encodes the texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unmasked.evaluate.report.samples import Sample
from unmasked.evaluate.tasks.task_vectors import Encode, encoded, most_similar

SHOWN = 4  # number of queries that are shown: the first ones, as the sample is in random order


@dataclass(frozen=True)
class Search:
    """The result of a query with one encoder."""

    rank: int  # of the first wanted document, from 1
    first: int  # position of the document that came first


@dataclass(frozen=True)
class Shares:
    """All queries of a sample, before and after; shares are from 0 to 1."""

    queries: int  # their number
    better: float  # share of queries whose wanted document ranks higher after
    worse: float
    median: tuple[float, float]  # median rank before and after
    first: tuple[float, float]  # share of queries whose wanted document comes first


def search(sample: Sample, encode: Encode) -> list[Search]:
    """Search the sample's documents for each of its queries."""
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
    """Compare the ranks before and after."""
    was, now = (np.array([found.rank for found in side]) for side in (before, after))
    return Shares(
        queries=len(was),
        better=float((now < was).mean()),
        worse=float((now > was).mean()),
        median=(float(np.median(was)), float(np.median(now))),
        first=(float((was == 1).mean()), float((now == 1).mean())),
    )
