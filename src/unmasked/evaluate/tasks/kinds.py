"""The kinds of tasks that files can have, each scored from the vectors of its texts.

Intervals need the score of each item, but sentence-transformers' evaluators and mteb return means
only. The scores are those of mteb and pytrec_eval, with the same metrics, classifiers and seeds (a
test compares them on the same vectors). Cost: encoding each distinct text once, then seconds (ten
classifiers, ten clusterings). Shapes: N texts or pairs, D width.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from unmasked.evaluate.bootstrap import PAIR_METRICS, TaskResult, metric_values
from unmasked.evaluate.tasks.task_vectors import Encode, encoded, most_similar, norms

TextsByRole = Mapping[Any, Sequence[str]]  # texts under "query" and "document", or all under None

DEPTH = 10  # documents of a ranking that metrics look at
SEED = 42  # this and the numbers below are mteb's
EXPERIMENTS = 10  # classifiers or clusterings whose scores are averaged
SAMPLES_PER_LABEL = 8  # texts of each label that a classifier is trained on
CLUSTERED = 16_384  # maximum number of texts to cluster, and draws per clustering
KMEANS_BATCH = 512


def _dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("nd,nd->n", x, y, dtype=np.float64))


SIMILARITIES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "cosine": lambda x, y: _dot(x, y) / (norms(x) * norms(y)),
    "dot": _dot,
    "euclidean": lambda x, y: -norms(x - y),
    "manhattan": lambda x, y: -np.abs(x - y).sum(axis=1, dtype=np.float64),
}
"""From two arrays (N, D) to (N,) similarities of their rows in float64; higher is more similar."""


@dataclass(slots=True)
class Task:
    """Texts to encode and a way to score their vectors."""

    name: str  # the stem of the file, or the name of the folder
    texts: TextsByRole  # the texts to encode
    kind: ClassVar[str]

    def score(self, encode: Encode) -> TaskResult:
        """Score an encoder; the first metric of the result is the one to report."""
        items = self.per_item(encode)
        return TaskResult(self.name, {name: float(v.mean()) for name, v in items.items()}, items)

    def per_item(self, encode: Encode) -> dict[str, np.ndarray]:
        """The metrics of each item; their means are the scores."""
        raise NotImplementedError


@dataclass(slots=True)
class PairTask(Task):
    """Pairs of sentences that match or not, to be separated by their similarity.

    `max_ap` is mteb's main score: the best average precision of four similarities; `cosine_ap` is
    that of the cosine. The texts are all first sentences, then all second ones.
    """

    gold: np.ndarray  # (N,) 1 for a match, else 0
    kind = "pair classification"
    metrics = ("max_ap", "cosine_ap")

    def score(self, encode: Encode) -> TaskResult:
        first, second = np.split(encoded(encode, self.texts[None]), 2)
        _, names = PAIR_METRICS[self.metrics[0]]
        items = {name: SIMILARITIES[name](first, second) for name in names} | {"gold": self.gold}
        once = np.ones((1, len(self.gold)))
        scores = {metric: metric_values(items, metric, once).item() for metric in self.metrics}
        return TaskResult(self.name, scores, items)


@dataclass(slots=True)
class StsTask(PairTask):
    """Pairs of sentences whose cosine is compared with the similarity judged by people, `gold`.

    The metrics `spearman` and `pearson` are 0 if all cosines are equal.
    """

    kind = "sts"
    metrics = ("spearman", "pearson")


@dataclass(slots=True)
class RetrievalTask(Task):
    """Queries, and the documents that answer each: `ndcg@10`, `recall@1`, `recall@10`, `mrr@10`.

    As in trec_eval, the gain is linear, grade / log2(rank + 1); recall is the share of all relevant
    documents; of equally similar documents the one with the higher id comes first. As in BEIR, and
    in mteb's tasks whose queries are also documents, the document with the id of the query is left
    out of its ranking, unless it is relevant.
    """

    document_ids: list[str]
    query_ids: list[str]
    grades: list[dict[int, float]]  # for each query: position of a relevant document → its grade
    absent: list[list[float]]  # for each query: grades of relevant documents missing in the corpus
    kind = "retrieval"

    def per_item(self, encode: Encode) -> dict[str, np.ndarray]:
        gains, ideal = np.zeros((2, len(self.grades), DEPTH))  # grades by rank, best possible ones
        judged = zip(self.ranked(encode), self.grades, self.absent, strict=True)
        for q, (ranking, grades, absent) in enumerate(judged):
            gains[q, : len(ranking)] = [grades.get(document, 0.0) for document in ranking]
            highest = sorted([*grades.values(), *absent], reverse=True)[:DEPTH]
            ideal[q, : len(highest)] = highest
        discounts = 1 / np.log2(np.arange(2, DEPTH + 2))
        pairs = zip(self.grades, self.absent, strict=True)
        relevant = np.array([max(1, len(grades) + len(absent)) for grades, absent in pairs])
        best, found = ideal @ discounts, gains > 0
        return {  # all 0 for a query without a relevant document
            "ndcg@10": gains @ discounts / np.where(best > 0, best, 1.0),
            "recall@1": found[:, 0] / relevant,
            "recall@10": found.sum(axis=1) / relevant,
            "mrr@10": (found / np.arange(1, DEPTH + 1)).max(axis=1),
        }

    def ranked(self, encode: Encode) -> list[list[int]]:
        """For each query, the positions of the most similar documents, best first."""
        documents, queries = (encoded(encode, self.texts[r], r) for r in ("document", "query"))
        id_ranks = np.argsort(np.argsort(self.document_ids))
        # One document more, as the one with the query's own id may be left out.
        found = most_similar(queries, documents, DEPTH + 1, tie_rank=-id_ranks).tolist()
        places = {name: position for position, name in enumerate(self.document_ids)}
        own = [places.get(name) for name in self.query_ids]
        left_out = [place not in grades for place, grades in zip(own, self.grades, strict=True)]
        return [
            [document for document in row if not (out and document == place)][:DEPTH]
            for row, place, out in zip(found, own, left_out, strict=True)
        ]


@dataclass(slots=True)
class RerankingTask(Task):
    """Queries, each with its own candidates to be ranked: `map` and `mrr@10`.

    Of equally similar candidates the later one comes first.
    """

    candidates: list[list[int]]  # for each query: positions of documents, the relevant ones first
    relevant: list[int]  # for each query: how many of its candidates are relevant
    kind = "reranking"

    def per_item(self, encode: Encode) -> dict[str, np.ndarray]:
        queries, documents = (encoded(encode, self.texts[r], r) for r in ("query", "document"))
        items = {"map": np.zeros(len(queries)), "mrr@10": np.zeros(len(queries))}
        for q, (own, relevant) in enumerate(zip(self.candidates, self.relevant, strict=True)):
            count = len(own)
            order = most_similar(queries[q : q + 1], documents[own], count, -np.arange(count))[0]
            ranks = np.flatnonzero(order < relevant) + 1
            items["map"][q] = (np.arange(1, relevant + 1) / ranks).mean()
            items["mrr@10"][q] = 1 / ranks[0] if ranks[0] <= DEPTH else 0
        return items


@dataclass(slots=True)
class ClusteringTask(Task):
    """Labelled texts, clustered without the labels by k-means, on ten resampled sets of them.

    `v_measure` is the mean of the ten clusterings; their spread gives the interval.
    """

    labels: np.ndarray  # (N,)
    kind = "clustering"

    def score(self, encode: Encode) -> TaskResult:
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.metrics import v_measure_score

        draw, texts = random.Random(SEED), self.texts[None]
        count = min(len(texts), CLUSTERED)
        kept = draw.sample(range(len(texts)), k=count)
        vectors, labels = encoded(encode, [texts[i] for i in kept]), self.labels[kept]
        groups, values = len(np.unique(labels)), np.zeros(EXPERIMENTS)
        means = MiniBatchKMeans(groups, batch_size=KMEANS_BATCH, n_init=1, random_state=SEED)
        for experiment in range(EXPERIMENTS):
            chosen = draw.choices(range(count), k=CLUSTERED)
            values[experiment] = v_measure_score(labels[chosen], means.fit_predict(vectors[chosen]))
        mean = float(values.mean())
        # CLUSTERED draws vary less than a test set of `count` texts does, so they are scaled up.
        spread = mean + (values - mean) * np.sqrt(CLUSTERED / count)
        return TaskResult(self.name, {"v_measure": mean}, {"redrawn v_measure": spread})


@dataclass(slots=True)
class ClassificationTask(Task):
    """Labelled texts: ten logistic regressions, each trained on eight texts of every label.

    `accuracy` is the mean of ten classifiers; for a single text, the share of them that classify it
    correctly. The texts are first those to train on, then those of the test set.
    """

    train_labels: np.ndarray
    labels: np.ndarray  # of the test set
    kind = "classification"

    @property
    def test_texts(self) -> Sequence[str]:
        """The texts that the classifiers are tested on."""
        return self.texts[None][len(self.train_labels) :]

    def per_item(self, encode: Encode) -> dict[str, np.ndarray]:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        samples = self._undersampled()
        used = sorted({index for sample in samples for index in sample})
        row = {index: position for position, index in enumerate(used)}
        train = encoded(encode, [self.texts[None][i] for i in used])
        test, right = encoded(encode, self.test_texts), np.zeros(len(self.labels))
        for sample in samples:
            classifier = LogisticRegression(max_iter=100, random_state=SEED)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # mteb has the same limit
                classifier.fit(train[[row[i] for i in sample]], self.train_labels[sample])
            right += classifier.predict(test) == self.labels
        return {"accuracy": right / EXPERIMENTS}

    def _undersampled(self) -> list[list[int]]:
        """Positions of each experiment's training texts.

        As in mteb, each experiment shuffles the previous one's order, with the same seed.
        """
        order = np.arange(len(self.train_labels))
        samples: list[list[int]] = []
        for _ in range(EXPERIMENTS):
            np.random.RandomState(SEED).shuffle(order)
            seen: Counter[str] = Counter()
            samples.append([])
            for index, label in zip(order.tolist(), self.train_labels[order], strict=True):
                seen[label] += 1
                if seen[label] <= SAMPLES_PER_LABEL:
                    samples[-1].append(index)
        return samples


def alike(task: Task, share: float = 0.2) -> list[tuple[str, str]]:
    """Pairs of texts of a task that belong together; none for clustering and classification.

    They are the `share` of sentence pairs with the highest scores, or each query and its best
    document.
    """
    if isinstance(task, PairTask):
        first, second = np.split(np.array(task.texts[None], dtype=object), 2)
        best = np.flatnonzero(task.gold >= np.quantile(task.gold, 1 - share))
        return list(zip(first[best], second[best], strict=True))
    found: list[tuple[int, int]] = []
    if isinstance(task, RerankingTask):
        found = [(q, own[0]) for q, own in enumerate(task.candidates)]
    elif isinstance(task, RetrievalTask):
        judged = enumerate(task.grades)
        found = [(q, max(grades, key=grades.__getitem__)) for q, grades in judged if grades]
    return [(task.texts["query"][q], task.texts["document"][d]) for q, d in found]
