"""What a report shows of a task: texts for a map, pairs for a heatmap, searches.

Everything is drawn from the task's own texts by a fixed seed, so that "before" and "after" show the
same ones. Cost: negligible; encoding is the caller's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unmasked.evaluate.report.figures import OTHER, PALETTE
from unmasked.evaluate.tasks import kinds

MAPPED = 400  # most texts on a map
PAIRS = 6
SEARCHED = 500  # most documents that a search goes through, beside the wanted ones
SEARCHES = 200  # most queries
_WORD = re.compile(r"[^\W\d_]\w*")


@dataclass(frozen=True)
class Query:
    """A query, and positions among the documents of its sample."""

    text: str
    wanted: frozenset[int]
    own: int | None  # the document with the id of the query, which it does not find


@dataclass
class Sample:
    """Texts of a task, with what is known of them."""

    texts: list[str]  # for the map
    groups: list[str]  # what each of these texts belongs to
    pairs: list[tuple[str, str]]  # texts that belong together, for the heatmap
    queries: Sequence[Query] = ()  # in random order
    documents: Sequence[tuple[str, str]] = ()  # what is searched: name and text


def draw_sample(task: kinds.Task) -> Sample:
    """What to show of a task."""
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
    else:
        texts = [documents[i] for i in order[: MAPPED // 2]]
        groups = ["document"] * len(texts) + ["query"] * len(queries[: MAPPED // 2])
        texts += queries[: MAPPED // 2]
    grades = {q: task.grades[q] for q in asked[:SEARCHES]}
    pool = sorted({*order[:SEARCHED], *(document for own in grades.values() for document in own)})
    place = {document: position for position, document in enumerate(pool)}
    named = {name: place.get(document) for document, name in enumerate(task.document_ids)}
    found = []
    for q, wanted in grades.items():
        places = frozenset(place[document] for document in wanted)
        same_id = named.get(task.query_ids[q])
        found.append(Query(queries[q], places, None if same_id in places else same_id))
    names = [(task.document_ids[i], documents[i]) for i in pool]
    return Sample(texts, groups, linked[:PAIRS], found, names)


def _id_groups(ids: Sequence[str]) -> list[str]:
    """Groups told from the first word of each id; empty if the ids have no words in common."""
    firsts = [match[0] if (match := _WORD.search(name)) else "" for name in ids]
    common = Counter(firsts).most_common(len(PALETTE))
    enough = [name for name, count in common if name and count >= max(3, len(ids) // 50)]
    return [first if first in enough else OTHER for first in firsts] if len(enough) >= 3 else []


def _shuffled(count: int) -> list[int]:
    order: list[int] = np.random.default_rng(0).permutation(count).tolist()
    return order
