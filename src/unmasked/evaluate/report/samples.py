"""Samples of a task for a report: texts for a map, pairs for a heatmap, and searches.

Everything is drawn from the task's own texts with a fixed seed, so that "before" and "after" show
the same ones. Cost: negligible; the caller encodes them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unmasked.evaluate.report.figures import OTHER, PALETTE
from unmasked.evaluate.tasks import kinds

MAPPED = 400  # maximum number of texts on a map
PAIRS = 6  # pairs of a heatmap
SEARCHED = 500  # maximum number of documents to search, besides the wanted ones
SEARCHES = 200  # maximum number of queries
_WORD = re.compile(r"[^\W\d_]\w*")


@dataclass(frozen=True)
class Query:
    """A query, and positions of documents in its sample."""

    text: str
    wanted: frozenset[int]  # the documents that answer it
    own: int | None  # the document with the query's own id, which is left out of its ranking


@dataclass
class Sample:
    """What a report shows of a task."""

    texts: list[str]  # for the map
    groups: list[str]  # the group of each of these texts, shown as its colour
    pairs: list[tuple[str, str]]  # texts that belong together, for the heatmap
    queries: Sequence[Query] = ()  # in random order
    documents: Sequence[tuple[str, str]] = ()  # names and texts of the documents to search


def draw_sample(task: kinds.Task) -> Sample:
    """The sample of a task."""
    if isinstance(task, kinds.RetrievalTask):
        return _of_retrieval(task)
    if isinstance(task, kinds.ClusteringTask | kinds.ClassificationTask):
        return _of_labels(task)
    pairs = [(a, b) for a, b in kinds.alike(task, share=0.1) if a != b]
    names = ["query", "relevant"]
    if not isinstance(task, kinds.RerankingTask):
        pairs, names = [pairs[i] for i in _shuffled(len(pairs))], ["first", "second"]
    shown = pairs[: MAPPED // 2]
    return Sample([text for pair in shown for text in pair], names * len(shown), pairs[:PAIRS])


def _of_labels(task: kinds.ClusteringTask | kinds.ClassificationTask) -> Sample:
    texts = task.test_texts if isinstance(task, kinds.ClassificationTask) else task.texts[None]
    labels = [str(label) for label in task.labels]
    kept = {label for label, _ in Counter(labels).most_common(len(PALETTE))}
    order = [i for i in _shuffled(len(texts)) if labels[i] in kept][:MAPPED]
    pairs = []
    for label in sorted(kept)[:PAIRS]:
        first = [texts[i] for i in order if labels[i] == label][:2]
        pairs += [(first[0], first[1])] if len(first) == 2 else []
    return Sample([texts[i] for i in order], [labels[i] for i in order], pairs)


def _of_retrieval(task: kinds.RetrievalTask) -> Sample:
    documents, queries = list(task.texts["document"]), list(task.texts["query"])
    order = _shuffled(len(documents))
    asked = [q for q in _shuffled(len(queries)) if task.grades[q]]
    linked = [
        (queries[q], documents[max(own := task.grades[q], key=own.__getitem__)]) for q in asked
    ]
    if groups := _id_groups(task.document_ids):
        mapped = [i for i in order if groups[i] != OTHER][:MAPPED]
        texts, groups = [documents[i] for i in mapped], [groups[i] for i in mapped]
    else:  # documents and queries are the two groups
        texts = [documents[i] for i in order[: MAPPED // 2]]
        groups = ["document"] * len(texts) + ["query"] * len(queries[: MAPPED // 2])
        texts += queries[: MAPPED // 2]
    grades = {q: task.grades[q] for q in asked[:SEARCHES]}
    pool = sorted({*order[:SEARCHED], *(document for own in grades.values() for document in own)})
    place = {document: position for position, document in enumerate(pool)}  # task → sample
    named = {name: place.get(document) for document, name in enumerate(task.document_ids)}
    found = []
    for q, wanted in grades.items():
        places = frozenset(place[document] for document in wanted)
        same_id = named.get(task.query_ids[q])
        found.append(Query(queries[q], places, None if same_id in places else same_id))
    names = [(task.document_ids[i], documents[i]) for i in pool]
    return Sample(texts, groups, linked[:PAIRS], found, names)


def _id_groups(ids: Sequence[str]) -> list[str]:
    """A group for each id: its first word; empty if fewer than three words are frequent."""
    firsts = [match[0] if (match := _WORD.search(name)) else "" for name in ids]
    common = Counter(firsts).most_common(len(PALETTE))
    enough = [name for name, count in common if name and count >= max(3, len(ids) // 50)]
    return [first if first in enough else OTHER for first in firsts] if len(enough) >= 3 else []


def _shuffled(count: int) -> list[int]:
    order: list[int] = np.random.default_rng(0).permutation(count).tolist()
    return order
