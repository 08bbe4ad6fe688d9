"""Evaluation tasks, scored for any encoder from the vectors of their texts.

mteb measures the public benchmarks; users' own data lies in plain files (see `files`), and a score
before and after each training stage has to be cheap. The scores mean what they mean in mteb and
pytrec_eval: same metrics, same classifiers, same seeds (a test compares them on the same vectors).

Cost: encoding, once a distinct text; then seconds (ten classifiers, ten clusterings). numpy alone;
scikit-learn is imported where a task trains something.

Shapes: N texts or pairs, Q queries, D width.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from unmasked.errors import DataError
from unmasked.evaluate.bootstrap import (
    CORRELATIONS,
    SIMILARITIES,
    TaskResult,
    best_precision,
    redrawn_key,
)
from unmasked.evaluate.tasks.vectors import (
    Encode,
    encode_once,
    encoded,
    most_similar,
    norms,
    paired_cosines,
)

Texts = Mapping[str | None, Sequence[str]]
"""What a task has encoded, by role."""

DEPTH = 10  # documents a ranking is judged by
SEED = 42  # mteb's, as are the numbers below
EXPERIMENTS = 10
SAMPLES_PER_LABEL = 8  # texts a label that a classifier is trained on
CLUSTERED = 16_384  # texts at most that are clustered, and texts of each redrawn clustering
KMEANS_BATCH = 512


class Task(Protocol):
    """Texts to encode and a way to score their vectors; `name` is the file stem or folder."""

    name: str
    kind: str

    @property
    def texts(self) -> Texts:
        """What is encoded."""

    def score(self, encode: Encode) -> TaskResult:
        """Scores an encoder; DataError for vectors that are not finite."""


@dataclass(slots=True)
class StsTask:
    """Pairs of sentences and the similarity people see in each, compared with the cosine.

    Attributes:
        texts: All first sentences, then all second ones; no role.
        gold: The similarity of each pair, on any scale.
    """

    name: str
    texts: Texts
    gold: np.ndarray
    kind: str = "sts"

    def score(self, encode: Encode) -> TaskResult:
        """`spearman` (the one to report) and `pearson`; 0 where all cosines are equal."""
        cosine = paired_cosines(*np.split(encoded(encode, self.texts[None]), 2))
        scores = {name: f(cosine, self.gold).item() for name, f in CORRELATIONS.items()}
        return TaskResult(self.name, scores, {"cosine": cosine, "gold": self.gold})


@dataclass(slots=True)
class RetrievalTask:
    """Queries, and for each the documents that answer it.

    Attributes:
        texts: The documents and the queries.
        grades: For each query the grade of its relevant documents, by their position.
    """

    name: str
    texts: Texts
    document_ids: list[str]
    grades: list[dict[int, float]]
    kind: str = "retrieval"

    def score(self, encode: Encode) -> TaskResult:
        """`ndcg@10` (the one to report), `recall@1`, `recall@10` and `mrr@10`.

        As in trec_eval the gain is linear, grade / log2(rank + 1); recall is the share of all
        relevant documents; of equal similarities the document with the higher id comes first.
        """
        documents, queries = (encoded(encode, self.texts[r], r) for r in ("document", "query"))
        id_ranks = np.argsort(np.argsort(self.document_ids))
        best, _ = most_similar(queries, documents, DEPTH, tie_rank=-id_ranks)
        gains, ideal = np.zeros((2, len(queries), DEPTH))
        for q, grades in enumerate(self.grades):
            gains[q, : best.shape[1]] = [grades.get(document, 0.0) for document in best[q].tolist()]
            highest = sorted(grades.values(), reverse=True)[:DEPTH]
            ideal[q, : len(highest)] = highest
        discounts = 1 / np.log2(np.arange(2, DEPTH + 2))
        found = gains > 0
        relevant = np.array([len(grades) for grades in self.grades])
        items = {
            "ndcg@10": (gains @ discounts) / (ideal @ discounts),
            "recall@1": found[:, 0] / relevant,
            "recall@10": found.sum(axis=1) / relevant,
            "mrr@10": (found / np.arange(1, DEPTH + 1)).max(axis=1),
        }
        scores = {metric: float(values.mean()) for metric, values in items.items()}
        return TaskResult(self.name, scores, items)


@dataclass(slots=True)
class PairTask:
    """Pairs of sentences that match or do not, told apart by their similarity.

    Attributes:
        texts: All first sentences, then all second ones; no role.
        gold: (N,) 1 for a match, else 0.
    """

    name: str
    texts: Texts
    gold: np.ndarray
    kind: str = "pair classification"

    def score(self, encode: Encode) -> TaskResult:
        """`max_ap` (the one to report: mteb's, the best of four similarities) and `cosine_ap`."""
        first, second = np.split(encoded(encode, self.texts[None]), 2)
        apart = first - second
        items = {
            "cosine": paired_cosines(first, second),
            "dot": np.einsum("nd,nd->n", first, second, dtype=np.float64),
            "euclidean": -norms(apart),
            "manhattan": -np.abs(apart).sum(axis=1, dtype=np.float64),
            "gold": self.gold,
        }
        scores = {
            metric: best_precision(items, names).item() for metric, names in SIMILARITIES.items()
        }
        return TaskResult(self.name, scores, items)


@dataclass(slots=True)
class RerankingTask:
    """Queries, each with a few candidates of its own to be put in order.

    Attributes:
        queries: Q queries.
        candidates: For each query its documents, the relevant ones first.
        relevant: For each query how many of its candidates are relevant.
    """

    name: str
    queries: list[str]
    candidates: list[list[str]]
    relevant: list[int]
    kind: str = "reranking"

    @property
    def texts(self) -> Texts:
        documents = list(dict.fromkeys(text for own in self.candidates for text in own))
        return {"query": self.queries, "document": documents}

    def score(self, encode: Encode) -> TaskResult:
        """`map` (the one to report) and `mrr@10`; of equal similarities the later comes first."""
        texts = self.texts
        queries, documents = (encoded(encode, texts[role], role) for role in ("query", "document"))
        position = {text: index for index, text in enumerate(texts["document"])}
        items = {"map": np.zeros(len(queries)), "mrr@10": np.zeros(len(queries))}
        for q, (own, relevant) in enumerate(zip(self.candidates, self.relevant, strict=True)):
            vectors = documents[[position[text] for text in own]]
            order, _ = most_similar(queries[q : q + 1], vectors, len(own), -np.arange(len(own)))
            ranks = np.flatnonzero(order[0] < relevant) + 1
            items["map"][q] = (np.arange(1, relevant + 1) / ranks).mean()
            items["mrr@10"][q] = 1 / ranks[0] if ranks[0] <= DEPTH else 0
        scores = {metric: float(values.mean()) for metric, values in items.items()}
        return TaskResult(self.name, scores, items)


@dataclass(slots=True)
class ClusteringTask:
    """Labelled texts, grouped without the labels: k-means on ten redrawn sets of them.

    Attributes:
        texts: N texts; no role.
        labels: (N,) their labels.
    """

    name: str
    texts: Texts
    labels: np.ndarray
    kind: str = "clustering"

    def score(self, encode: Encode) -> TaskResult:
        """`v_measure`, the mean of ten clusterings.

        Each clusters another redrawn set of the texts, so their spread is the interval's.
        """
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
        # More draws than texts vary less than a test set of that size does.
        spread = mean + (values - mean) * np.sqrt(CLUSTERED / count)
        return TaskResult(self.name, {"v_measure": mean}, {redrawn_key("v_measure"): spread})


@dataclass(slots=True)
class ClassificationTask:
    """Labelled texts: ten logistic regressions, each trained on eight texts of every label.

    Attributes:
        train_texts, train_labels: what the classifiers are trained on.
        test_texts, labels: what they are judged by.
    """

    name: str
    train_texts: list[str]
    train_labels: list[str]
    test_texts: list[str]
    labels: list[str]
    kind: str = "classification"

    @property
    def texts(self) -> Texts:
        return {None: [*self.train_texts, *self.test_texts]}

    def score(self, encode: Encode) -> TaskResult:
        """`accuracy`, the mean of ten classifiers; per test text the share that had it right."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        chosen = self._undersampled()
        used = sorted({index for sample in chosen for index in sample})
        row = {index: position for position, index in enumerate(used)}
        train = encoded(encode, [self.train_texts[i] for i in used])
        test = encoded(encode, self.test_texts)
        names = sorted(set(self.train_labels))
        code = {label: number for number, label in enumerate(names)}
        gold = np.array([code[label] for label in self.labels])
        right = np.zeros(len(gold))
        for sample in chosen:
            classifier = LogisticRegression(max_iter=100, random_state=SEED)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # as far as mteb's goes
                classifier.fit(
                    train[[row[i] for i in sample]], [code[self.train_labels[i]] for i in sample]
                )
            right += classifier.predict(test) == gold
        right /= EXPERIMENTS
        return TaskResult(self.name, {"accuracy": float(right.mean())}, {"accuracy": right})

    def _undersampled(self) -> list[list[int]]:
        """Positions of the training texts of each experiment; mteb shuffles the same list again."""
        order = list(range(len(self.train_labels)))
        samples: list[list[int]] = []
        for _ in range(EXPERIMENTS):
            np.random.RandomState(SEED).shuffle(order)
            seen: Counter[str] = Counter()
            samples.append([])
            for index in order:
                seen[self.train_labels[index]] += 1
                if seen[self.train_labels[index]] <= SAMPLES_PER_LABEL:
                    samples[-1].append(index)
        return samples


def alike(task: Task, share: float = 0.2) -> list[tuple[str, str]]:
    """Texts of a task that belong together; none where it has no such.

    Args:
        task: STS, pairs, reranking or retrieval.
        share: of scored pairs, how many of the most alike are taken.
    """
    if isinstance(task, StsTask | PairTask):
        first, second = np.split(np.array(task.texts[None], dtype=object), 2)
        best = np.flatnonzero(task.gold >= np.quantile(task.gold, 1 - share))
        return list(zip(first[best], second[best], strict=True))
    if isinstance(task, RerankingTask):
        return [(query, own[0]) for query, own in zip(task.queries, task.candidates, strict=True)]
    if isinstance(task, RetrievalTask):
        documents, queries = task.texts["document"], task.texts["query"]
        found = (max(grades, key=grades.__getitem__) for grades in task.grades)
        return [(query, documents[best]) for query, best in zip(queries, found, strict=True)]
    return []


def evaluate(tasks: Sequence[Task], encode: Encode) -> list[TaskResult]:
    """Scores an encoder on every task, encoding each distinct text and role once.

    Raises:
        DataError: A vector is not finite; the message names the task and the first such texts.
    """
    encode, results = encode_once(encode), []
    for task in tasks:
        try:
            results.append(task.score(encode))
        except DataError as error:
            raise DataError(f"task {task.name}: {error}") from error
    return results
