"""What a report shows of a task: texts for a map, alike texts for a heatmap, searches.

Everything is drawn from the task's own texts, by a fixed seed, so that "before" and "after" show
the same ones. Cost: none worth the name; encoding is the caller's.

Shapes: N texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from unmasked.evaluate.report.figures import OTHER, PALETTE
from unmasked.evaluate.tasks.kinds import (
    ClassificationTask,
    ClusteringTask,
    RerankingTask,
    RetrievalTask,
    Task,
    alike,
)

MAPPED = 400
PAIRS = 6
SEARCHED = 500  # documents at most that a search goes through
SEARCHES = 4
_WORD = re.compile(r"[^\W\d_]\w*")


@dataclass
class Sample:
    """Texts of a task, with what is known of them.

    Attributes:
        texts, groups: for the map, N each.
        pairs: texts that belong together, for the heatmap.
        queries: for searches: text, and positions of the documents that answer it.
        documents: what is searched.
        ids: a name for each document.
    """

    texts: list[str]
    groups: list[str]
    pairs: list[tuple[str, str]]
    queries: list[tuple[str, set[int]]] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)


def draw_sample(task: Task) -> Sample:
    """What to show of a task."""
    if isinstance(task, RetrievalTask):
        return _of_retrieval(task)
    if isinstance(task, ClusteringTask | ClassificationTask):
        return _of_labels(task)
    pairs = [(a, b) for a, b in alike(task, share=0.1) if a != b]
    if isinstance(task, RerankingTask):
        return _linked(pairs, "query", "relevant")
    return _linked([pairs[i] for i in _shuffled(len(pairs))], "first", "second")


def _of_labels(task: ClusteringTask | ClassificationTask) -> Sample:
    texts = task.test_texts if isinstance(task, ClassificationTask) else list(task.texts[None])
    labels = [str(label) for label in task.labels]
    kept = {label for label, _ in Counter(labels).most_common(len(PALETTE))}
    order = [i for i in _shuffled(len(texts)) if labels[i] in kept][:MAPPED]
    pairs = []
    for label in sorted(kept)[:PAIRS]:
        alike = [i for i in order if labels[i] == label][:2]
        if len(alike) == 2:
            pairs.append((texts[alike[0]], texts[alike[1]]))
    return Sample([texts[i] for i in order], [labels[i] for i in order], pairs)


def _linked(pairs: Sequence[tuple[str, str]], first: str, second: str) -> Sample:
    shown = pairs[: MAPPED // 2]
    texts = [text for pair in shown for text in pair]
    return Sample(texts, [first, second] * len(shown), list(pairs[:PAIRS]))


def _of_retrieval(task: RetrievalTask) -> Sample:
    documents, queries = list(task.texts["document"]), list(task.texts["query"])
    groups = _id_groups(task.document_ids)
    order = _shuffled(len(documents))
    if groups:
        mapped = [i for i in order if groups[i] != OTHER][:MAPPED]
        texts, colours = [documents[i] for i in mapped], [groups[i] for i in mapped]
    else:
        texts = [documents[i] for i in order[: MAPPED // 2]] + queries[: MAPPED // 2]
        colours = ["document"] * min(len(documents), MAPPED // 2)
        colours += ["query"] * (len(texts) - len(colours))
    asked, linked = _shuffled(len(queries)), alike(task)
    pairs = [linked[q] for q in asked[:PAIRS]]
    wanted = {d for q in asked[:SEARCHES] for d in task.grades[q]}
    pool = sorted({*order[:SEARCHED], *wanted})
    place = {document: position for position, document in enumerate(pool)}
    found = [(queries[q], {place[d] for d in task.grades[q]}) for q in asked[:SEARCHES]]
    names = [task.document_ids[i] for i in pool]
    return Sample(texts, colours, pairs, found, [documents[i] for i in pool], names)


def _id_groups(ids: Sequence[str]) -> list[str]:
    """Groups told from the first word of each id; empty if the ids have no words in common."""
    firsts = [match[0] if (match := _WORD.search(name)) else "" for name in ids]
    common = Counter(firsts).most_common(len(PALETTE))
    enough = [name for name, count in common if name and count >= max(3, len(ids) // 50)]
    if len(enough) < 3:
        return []
    return [first if first in enough else OTHER for first in firsts]


def _shuffled(count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(0).permutation(count)]
