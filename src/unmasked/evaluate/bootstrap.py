"""How sure a score, or the difference between two scores, is: the paired bootstrap.

Training often moves a score by less than the choice of test queries does. Both systems are
therefore scored on the same 1000 redrawn test sets; the spread of the 1000 differences is the
interval (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; for retrieval
Sakai, SIGIR 2006).

A redrawn test set is a row of counts: how often each item was drawn. Means, Pearson, Spearman and
average precision are sums over counts, so nothing is sorted again: the interval of a Spearman
correlation of 1500 pairs takes 0.13 s and 100 MB. `scipy.stats.bootstrap` draws the same test sets
and takes 0.83 s.

Shapes: S samples, N items (pairs or queries).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from unmasked.errors import DataError, unknown

CONFIDENCE = 0.95
_CHUNK = 2**20  # counts held at a time, which bounds memory for large test sets


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What one encoder scored on one task.

    `items` are what a bootstrap redraws, arrays of one length: each metric per query or text; for
    pairs the similarities and `gold`, from which metrics are computed anew. Where the task redrew
    its own test sets: the metric on each, under `redrawn_key`. Where a metric is a share: both
    sides of it per sentence, under `ratio_keys`. mteb's results have none.
    """

    name: str
    scores: dict[str, float]  # each metric as a fraction; the first is the one to report
    items: dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference, or the score of one system, with its 95 % interval, as fractions."""

    difference: float  # on the whole test set
    low: float  # 2.5 % of the redrawn test sets give less than this
    high: float  # 2.5 % of the redrawn test sets give more than this

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def paired_difference(
    a: TaskResult, b: TaskResult, metric: str, samples: int = 1000, seed: int = 0
) -> Interval:
    """The score of `a` less that of `b` on one task; positive where `a` is better.

    Args:
        a, b: the results of two systems on the same task.
        metric: a key of `scores` that both have.
        samples: redrawn test sets; each draws as many items as there are, with replacement.
        seed: the same seed gives the same interval.

    Raises:
        DataError: the results come from different tasks, or lack the metric.
    """
    _check_same_task(a, b)
    observed = _score(a, metric) - _score(b, metric)
    if (key := redrawn_key(metric)) in a.items:
        return _spread(observed, a.items[key] - b.items[key])
    of_a, of_b = (_statistic(result.items, metric) for result in (a, b))
    return _percentiles(observed, (of_a(c) - of_b(c) for c in _redrawn(a.items, samples, seed)))


def interval(result: TaskResult, metric: str, samples: int = 1000, seed: int = 0) -> Interval:
    """The interval of one system's score; arguments and errors as `paired_difference`.

    It is a point for a result without items, and for 0 samples.
    """
    observed = _score(result, metric)
    if not (samples and result.items):
        return Interval(observed, observed, observed)
    if (key := redrawn_key(metric)) in result.items:
        return _spread(observed, result.items[key])
    statistic = _statistic(result.items, metric)
    return _percentiles(observed, map(statistic, _redrawn(result.items, samples, seed)))


def pearson(x: np.ndarray, y: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Pearson correlation of pairs that occur `counts` times.

    Args:
        x, y: (N,) or (S, N).
        counts: (S, N), how often sample s holds pair n; by default every pair once, S = 1.

    Returns:
        (S,) correlations; 0 where all x or all y are equal and none is defined.
    """
    counts = np.ones((1, x.shape[-1])) if counts is None else counts
    x, y = _centred(x, counts), _centred(y, counts)
    product, square_x, square_y = (
        np.einsum("sn,sn,sn->s", counts, u, v) for u, v in ((x, y), (x, x), (y, y))
    )
    spread = np.sqrt(square_x) * np.sqrt(square_y)
    return np.asarray(np.divide(product, spread, out=np.zeros_like(spread), where=spread > 0))


def spearman(x: np.ndarray, y: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Spearman rank correlation, ties at their mean rank; x and y (N,), else as `pearson`."""
    counts = np.ones((1, x.shape[-1])) if counts is None else counts
    return pearson(_mean_ranks(x, counts), _mean_ranks(y, counts), counts)


def average_precision(x: np.ndarray, gold: np.ndarray, counts: np.ndarray | None) -> np.ndarray:
    """Average precision of ranking pairs by similarity, ties sharing a rank, as in scikit-learn.

    Args:
        x: (N,) similarities.
        gold: (N,) 1 for a match, else 0.
        counts: as `pearson`.

    Returns:
        (S,) values; 0 where a sample holds no match.
    """
    counts = np.ones((1, len(gold))) if counts is None else counts
    order = np.argsort(-x, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(x[order]) != 0, True))
    seen = counts[:, order].cumsum(axis=1)[:, ends]
    hits = (counts * gold)[:, order].cumsum(axis=1)[:, ends]
    gained = np.diff(hits, axis=1, prepend=0)
    areas = (gained * hits / np.maximum(seen, 1)).sum(axis=1)
    return np.asarray(areas / np.maximum(hits[:, -1], 1))


PAIR_METRICS: dict[str, tuple[Callable[..., np.ndarray], tuple[str, ...]]] = {
    "spearman": (spearman, ("cosine",)),
    "pearson": (pearson, ("cosine",)),
    "max_ap": (average_precision, ("cosine", "dot", "euclidean", "manhattan")),
    "cosine_ap": (average_precision, ("cosine",)),
}
"""Metrics of pairs: how similarities and `gold` give them, and which similarities."""


def pair_metric(
    items: Mapping[str, np.ndarray], metric: str, counts: np.ndarray | None = None
) -> np.ndarray:
    """A metric (S,) of `PAIR_METRICS`; by several similarities, that of the best of them."""
    compute, names = PAIR_METRICS[metric]
    return np.asarray(np.max([compute(items[x], items["gold"], counts) for x in names], axis=0))


def redrawn_key(metric: str) -> str:
    """Where a result keeps a metric's values on test sets that the task redrew itself."""
    return f"redrawn {metric}"


def ratio_keys(metric: str) -> tuple[str, str]:
    """Where a result keeps both sides of a metric that is a share: the hits, and of how many."""
    return f"{metric} hits", f"{metric} of"


def _centred(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Deviations (S, N) from each sample's mean, the rounding noise of equal values set to 0."""
    means = (counts * values).sum(axis=1, keepdims=True) / counts.sum(axis=1, keepdims=True)
    deviations: np.ndarray = values - means
    deviations[np.abs(deviations) <= 1e-12 * np.abs(means)] = 0.0
    return deviations


def _mean_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rank (S, N) of each value (N,) in each sample, counted from 1."""
    _, group, repeats = np.unique(values, return_inverse=True, return_counts=True)
    starts = repeats.cumsum() - repeats
    sizes = np.add.reduceat(counts[:, np.argsort(values)], starts, axis=1)
    ranks: np.ndarray = sizes.cumsum(axis=1) - (sizes - 1) / 2
    return ranks[:, group]


def _score(result: TaskResult, metric: str) -> float:
    if metric not in result.scores:
        raise DataError(f"task {result.name}: {unknown('metric', metric, result.scores)}")
    return result.scores[metric]


def _statistic(items: Mapping[str, np.ndarray], metric: str) -> Callable[[np.ndarray], np.ndarray]:
    """The metric (S,) as a function of counts (S, N)."""
    hits, of = ratio_keys(metric)
    if metric in items:
        return lambda counts: counts @ items[metric] / len(items[metric])
    if hits in items:
        return lambda counts: counts @ items[hits] / np.maximum(counts @ items[of], 1)
    return partial(pair_metric, items, metric)


def _redrawn(items: Mapping[str, np.ndarray], samples: int, seed: int) -> Iterator[np.ndarray]:
    """Counts (at most S, N) of `samples` redrawn test sets, some at a time."""
    random, count = np.random.default_rng(seed), len(next(iter(items.values())))
    rows = max(1, _CHUNK // count)
    for start in range(0, samples, rows):
        size = min(rows, samples - start)
        drawn = random.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        yield counts.astype(np.float64)


def _percentiles(observed: float, drawn: Iterable[np.ndarray]) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(list(drawn)), (tail, 1 - tail))
    return Interval(observed, float(low), float(high))


def _spread(observed: float, drawn: np.ndarray) -> Interval:
    """The normal interval (Student's, for few samples) from values on redrawn test sets."""
    from scipy.stats import t

    margin = float(t.ppf((1 + CONFIDENCE) / 2, len(drawn) - 1) * drawn.std(ddof=1))
    return Interval(observed, observed - margin, observed + margin)


def _check_same_task(a: TaskResult, b: TaskResult) -> None:
    size_a, size_b = ({key: len(v) for key, v in result.items.items()} for result in (a, b))
    same = size_a == size_b and np.array_equal(a.items.get("gold", 0), b.items.get("gold", 0))
    if a.name != b.name or not same:
        raise DataError(
            f"the results to compare are of different test items: '{a.name}' {size_a} and "
            f"'{b.name}' {size_b}. Fix: score both systems on the same file."
        )
