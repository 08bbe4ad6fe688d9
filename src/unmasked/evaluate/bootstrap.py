"""Confidence intervals of a score, or of the difference of two scores: the paired bootstrap.

Training often changes a score by less than another choice of test queries would. Both systems are
therefore scored on the same 1000 resampled test sets; the interval spans the middle 95 % of the
1000 differences (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; Sakai,
SIGIR 2006). A resampled test set is a row of counts: how often each item was drawn. All metrics
here are sums over counts, so nothing is sorted again: the interval of a Spearman correlation of
1500 pairs takes 0.13 s and 100 MB; `scipy.stats.bootstrap` draws the same test sets and takes
0.83 s.

Shapes: S samples (resampled test sets), N items (pairs or queries); counts are (S, N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unmasked.errors import DataError, unknown

CONFIDENCE = 0.95
_CHUNK = 2**20  # counts in memory at a time, which bounds it for large test sets


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The scores of one encoder on one task.

    `items` has what a bootstrap resamples, arrays of equal length: METRIC of each query or text;
    for pairs, the similarities and `gold`, from which metrics are computed again; for a ratio,
    ``METRIC hits`` and ``METRIC of`` of each sentence. A task that resamples its own test sets has
    the metric on each as ``redrawn METRIC``. Results of mteb have no items.
    """

    name: str
    scores: dict[str, float]  # each metric as a fraction; the first is the one to report
    items: dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference, or the score of one system, with its 95 % interval, as fractions."""

    difference: float  # on the whole test set; the score itself for a single system
    low: float  # 2.5 % of the resampled test sets give less than this
    high: float  # 2.5 % of the resampled test sets give more than this

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def paired_difference(
    a: TaskResult, b: TaskResult, metric: str, samples: int = 1000, seed: int = 0
) -> Interval:
    """The score of `a` minus that of `b` on one task; positive if `a` is better.

    Args:
        a, b: the results of two systems on the same task.
        metric: a key of `scores` that both have.
        samples: number of resampled test sets, each of the original size, drawn with replacement.
        seed: the same seed gives the same interval.

    Raises:
        DataError: the results come from different tasks, or lack the metric.
    """
    size_a, size_b = ({key: len(v) for key, v in result.items.items()} for result in (a, b))
    same = size_a == size_b and np.array_equal(a.items.get("gold", 0), b.items.get("gold", 0))
    if a.name != b.name or not same:
        raise DataError(
            f"the results to compare are of different test items: '{a.name}' {size_a} and "
            f"'{b.name}' {size_b}. Fix: score both systems on the same file."
        )
    return _bootstrap((a, b), metric, samples, seed)


def interval(result: TaskResult, metric: str, samples: int = 1000, seed: int = 0) -> Interval:
    """The interval of one system's score; arguments and errors as in `paired_difference`.

    For a result without items, and for 0 samples, the interval is the score alone.
    """
    return _bootstrap((result,), metric, samples, seed)


def pearson(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson correlation (S,) of x and y, (N,) or (S, N); 0 where all x or all y are equal."""
    x, y = _centred(x, counts), _centred(y, counts)
    product, square_x, square_y = (
        np.einsum("sn,sn,sn->s", counts, u, v) for u, v in ((x, y), (x, x), (y, y))
    )
    spread = np.sqrt(square_x) * np.sqrt(square_y)
    return np.asarray(np.divide(product, spread, out=np.zeros_like(spread), where=spread > 0))


def spearman(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Spearman correlation (S,) of x and y (N,), with mean ranks for ties; 0 as in `pearson`."""
    return pearson(_mean_ranks(x, counts), _mean_ranks(y, counts), counts)


def average_precision(x: np.ndarray, gold: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Average precision (S,) of a ranking by similarity x (N,), in which ties share a rank.

    As in scikit-learn; `gold` (N,) is 1 for a match, else 0. A sample without a match has 0.
    """
    order = np.argsort(-x, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(x[order]) != 0, True))  # last place of each tie
    seen = counts[:, order].cumsum(axis=1)[:, ends]  # (S, distinct similarities)
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
"""Metrics of pairs: the function of a similarity and `gold`, and the similarities it is applied to,
of which the best value counts."""


def metric_values(items: Mapping[str, np.ndarray], metric: str, counts: np.ndarray) -> np.ndarray:
    """A metric (S,) of a result's items on the test sets that the counts (S, N) describe."""
    if metric in items:
        return np.asarray(counts @ items[metric] / len(items[metric]))
    if (hits := f"{metric} hits") in items:
        return np.asarray(counts @ items[hits] / np.maximum(counts @ items[f"{metric} of"], 1))
    compute, names = PAIR_METRICS[metric]
    each = [compute(items[name], items["gold"], counts) for name in names]
    return np.asarray(np.max(each, axis=0))


def _centred(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Deviations (S, N) from each sample's mean; rounding errors of equal values become 0."""
    means = (counts * values).sum(axis=1, keepdims=True) / counts.sum(axis=1, keepdims=True)
    deviations: np.ndarray = values - means
    deviations[np.abs(deviations) <= 1e-12 * np.abs(means)] = 0.0
    return deviations


def _mean_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rank (S, N) of each value (N,) in each sample, from 1; equal values share their mean rank."""
    _, group, repeats = np.unique(values, return_inverse=True, return_counts=True)
    starts = repeats.cumsum() - repeats
    sizes = np.add.reduceat(counts[:, np.argsort(values)], starts, axis=1)  # of ties, per sample
    ranks: np.ndarray = sizes.cumsum(axis=1) - (sizes - 1) / 2
    return ranks[:, group]


def _bootstrap(results: tuple[TaskResult, ...], metric: str, samples: int, seed: int) -> Interval:
    """The interval of one result's score, or of the difference of two results' scores."""
    for result in results:
        if metric not in result.scores:
            raise DataError(f"task {result.name}: {unknown('metric', metric, result.scores)}")
    observed = _difference([result.scores[metric] for result in results])
    items = [result.items for result in results]
    if not (samples and items[0]):
        return Interval(observed, observed, observed)
    if (key := f"redrawn {metric}") in items[0]:
        from scipy.stats import t

        # Ten test sets are too few for percentiles, so this is the interval of Student's t.
        drawn = _difference([own[key] for own in items])
        margin = float(t.ppf((1 + CONFIDENCE) / 2, len(drawn) - 1) * drawn.std(ddof=1))
        lowest = 0.0 if len(results) == 1 else -1.0  # a fraction, or a difference of two
        return Interval(observed, max(observed - margin, lowest), min(observed + margin, 1.0))
    size = len(next(iter(items[0].values())))
    values = [
        _difference([metric_values(own, metric, counts) for own in items])
        for counts in _resampled(size, samples, seed)
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(values), (tail, 1 - tail)).tolist()
    return Interval(observed, low, high)


def _difference(values: Sequence[Any]) -> Any:
    """The first of two values minus the second; a single value itself."""
    return values[0] - values[1] if len(values) > 1 else values[0]


def _resampled(items: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Counts of `samples` resampled test sets, in chunks of at most `_CHUNK` numbers."""
    random, rows = np.random.default_rng(seed), max(1, _CHUNK // items)
    for start in range(0, samples, rows):
        size = min(rows, samples - start)
        drawn = random.integers(items, size=(size, items)) + items * np.arange(size)[:, None]
        # Row i has the numbers from i * items on, so that one `bincount` counts all rows.
        counts = np.bincount(drawn.ravel(), minlength=size * items).reshape(size, items)
        yield counts.astype(np.float64)
