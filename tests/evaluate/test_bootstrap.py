"""Intervals of scores and of differences, and the metrics that are computed from counts."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy import stats

from unmasked.errors import DataError
from unmasked.evaluate import TaskResult, interval, paired_difference
from unmasked.evaluate.bootstrap import average_precision, metric_values, pearson, spearman


def sts_result(noise: float, pairs: int = 1500, seed: int = 0) -> TaskResult:
    gold = np.random.default_rng(99).integers(0, 26, pairs) / 5
    cosine = gold / 5 + noise * np.random.default_rng(seed).standard_normal(pairs)
    items, once = {"cosine": cosine, "gold": gold}, np.ones((1, pairs))
    scores = {
        metric: metric_values(items, metric, once).item() for metric in ("spearman", "pearson")
    }
    return TaskResult("sts", scores, items)


def ranking_result(values: np.ndarray) -> TaskResult:
    return TaskResult("ranking", {"ndcg@10": float(values.mean())}, {"ndcg@10": values})


def test_correlation_of_resampled_pairs_is_that_of_scipy() -> None:
    random = np.random.default_rng(5)
    x, y = random.integers(0, 9, 40) / 3, random.standard_normal(40).round(1)
    counts = random.multinomial(40, [1 / 40] * 40, size=25).astype(np.float64)
    for ours, theirs in ((spearman, stats.spearmanr), (pearson, stats.pearsonr)):
        expected = [theirs(np.repeat(x, c), np.repeat(y, c)).statistic for c in counts.astype(int)]
        np.testing.assert_allclose(ours(x, y, counts), expected, rtol=1e-12)
        equal = np.full(3, 0.1)  # whose mean is not quite 0.1
        assert ours(equal, equal, np.ones((1, 3))) == 0


def test_interval_of_a_mean_is_the_known_one() -> None:
    values = np.random.default_rng(6).uniform(0, 1, 2000)
    got = interval(ranking_result(values), "ndcg@10", samples=4000)
    margin = 1.96 * values.std() / math.sqrt(len(values))
    assert got.difference == values.mean()
    assert got.low == pytest.approx(values.mean() - margin, abs=margin / 10)
    assert got.high == pytest.approx(values.mean() + margin, abs=margin / 10)
    assert got.clear


def test_interval_of_spearman_covers_the_score_and_repeats() -> None:
    result = sts_result(noise=0.3)
    got = interval(result, "spearman")
    assert got.low < result.scores["spearman"] < got.high
    assert 0.01 < got.high - got.low < 0.06
    assert got == interval(result, "spearman", seed=0) != interval(result, "spearman", seed=1)


@pytest.mark.parametrize("metric", ["spearman", "pearson"])
def test_sts_difference(metric: str) -> None:
    good, bad, other = sts_result(0.1), sts_result(0.6), sts_result(0.1, seed=1)
    same = paired_difference(good, good, metric)
    assert (same.difference, same.low, same.high, same.clear) == (0, 0, 0, False)
    better, worse = paired_difference(good, bad, metric), paired_difference(bad, good, metric)
    assert better.clear and better.low > 0.1
    assert worse.clear and worse.high == pytest.approx(-better.low)
    alike = paired_difference(good, other, metric)
    assert not alike.clear and alike.low < 0 < alike.high


def test_pairing_finds_a_small_gain_that_unpaired_intervals_hide() -> None:
    random = np.random.default_rng(7)
    before = random.uniform(0, 1, 225)
    a = ranking_result(before + 0.01 + 0.02 * random.standard_normal(225))
    b = ranking_result(before)
    assert paired_difference(a, b, "ndcg@10").clear
    assert interval(a, "ndcg@10").low < interval(b, "ndcg@10").high


def test_results_that_cannot_be_compared_are_refused() -> None:
    a = sts_result(0.1)
    other_gold = TaskResult("sts", a.scores, a.items | {"gold": a.items["gold"][::-1]})
    for b in (sts_result(0.1, pairs=20), ranking_result(np.ones(1500)), other_gold):
        with pytest.raises(DataError, match=r"different test items.*Fix"):
            paired_difference(a, b, "spearman")
    with pytest.raises(DataError, match="unknown metric 'spearmen', did you mean 'spearman'"):
        interval(a, "spearmen")


def test_an_interval_of_redrawn_test_sets_is_that_of_student_within_what_is_possible() -> None:
    def result(values: list[float]) -> TaskResult:
        drawn = np.array(values)
        return TaskResult("t", {"v_measure": drawn.mean()}, {"redrawn v_measure": drawn})

    near, far, other = result([0.4, 0.5, 0.6]), result([-2.0, 0.5, 3.0]), result([0.5, 0.4, 0.3])
    score = interval(near, "v_measure")
    expected = stats.t.interval(0.95, 2, loc=0.5, scale=0.1)
    assert (score.low, score.high) == pytest.approx(expected)
    assert (interval(far, "v_measure").low, interval(far, "v_measure").high) == (0, 1)
    gain = paired_difference(far, other, "v_measure")
    assert (gain.low, gain.high) == (-1, 1)


def test_a_thousand_samples_of_1500_pairs_take_less_than_two_seconds() -> None:
    a, b = sts_result(0.1), sts_result(0.2)
    start = time.process_time()
    paired_difference(a, b, "spearman", samples=1000)
    assert time.process_time() - start < 2


def test_average_precision_is_that_of_scikit_learn():
    from sklearn.metrics import average_precision_score

    random = np.random.default_rng(0)
    gold, similarity = random.integers(0, 2, 50), random.integers(0, 20, 50) / 20
    counts = random.multinomial(50, [1 / 50] * 50, size=20)
    expected = [average_precision_score(gold, similarity, sample_weight=row) for row in counts]
    np.testing.assert_allclose(average_precision(similarity, gold, counts), expected)
    items = {"cosine": similarity, "dot": -similarity, "euclidean": similarity,
             "manhattan": similarity, "gold": gold}  # fmt: skip
    expected = [average_precision_score(gold, by) for by in (similarity, -similarity)]
    once = np.ones((1, 50))
    assert metric_values(items, "cosine_ap", once).item() == pytest.approx(expected[0])
    assert metric_values(items, "max_ap", once).item() == pytest.approx(max(expected))
