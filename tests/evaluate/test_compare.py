"""The last stage against the best causal baseline, from what a run folder holds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from unmasked.errors import DataError
from unmasked.evaluate.bootstrap import TaskResult
from unmasked.evaluate.compare import (
    compare_encoders,
    compare_stages,
    headline_metrics,
)
from unmasked.recipe.schema import BEFORE

RANDOM = np.random.default_rng(0)
CAUSAL = np.clip(RANDOM.normal(0.3, 0.1, 200), 0, 1)
ITEMS = {
    "causal_mean": CAUSAL - 0.2,
    "causal_last_token": CAUSAL,
    "bidirectional": CAUSAL - 0.1,
    BEFORE: CAUSAL + 0.02,
    "mntp": CAUSAL + 0.05 + RANDOM.normal(0, 0.02, 200),
}


@pytest.fixture
def run_folder(tmp_path):
    def write(names):
        (tmp_path / "scores").mkdir()
        stages = []
        for name in names:
            values = ITEMS[name]
            np.savez(tmp_path / "scores" / f"{name}.npz", **{"my.task.ndcg@10": values})
            scores = {"my.task.ndcg@10": float(values.mean()), "my.task.mrr@10": 0.5}
            stages.append({"name": name, "scores": {**scores, "sts.spearman": 0.1}})
        (tmp_path / "results.json").write_text(json.dumps({"stages": stages}))
        return tmp_path

    return write


def test_the_last_stage_against_the_best_causal_baseline(run_folder):
    folder = run_folder([name for name in ITEMS if name != BEFORE])
    assert headline_metrics(folder) == ["my.task.ndcg@10", "sts.spearman"]
    found = compare_stages(folder, "my.task.ndcg@10")
    assert list(found.scores) == ["causal_mean", "causal_last_token", "bidirectional", "mntp"]
    assert (found.best_causal, found.last) == ("causal_last_token", "mntp")
    (gain,) = found.gains.values()
    assert gain.difference == pytest.approx((ITEMS["mntp"] - CAUSAL).mean())
    assert 0.04 < gain.low < gain.difference < gain.high < 0.06
    assert gain.clear
    assert compare_stages(folder, "my.task.ndcg@10", samples=0).gains == {}


def test_what_the_stages_began_with_is_a_baseline_of_its_own(run_folder):
    folder = run_folder(["causal_mean", BEFORE, "mntp"])
    found = compare_stages(folder, "my.task.ndcg@10")
    assert (found.best_causal, found.last) == ("causal_mean", "mntp")
    gains = {name: gain.difference for name, gain in found.gains.items()}
    mntp = ITEMS["mntp"].mean()
    expected = {name: mntp - ITEMS[name].mean() for name in ("causal_mean", BEFORE)}
    assert gains == pytest.approx(expected)


def test_without_a_causal_decoder_nothing_is_called_causal(run_folder):
    found = compare_stages(run_folder([BEFORE, "mntp"]), "my.task.ndcg@10")
    assert (found.best_causal, found.last, list(found.gains)) == (None, "mntp", [BEFORE])


def test_a_run_that_only_converts_has_no_gain_over_itself(run_folder):
    found = compare_stages(run_folder(["causal_mean", BEFORE]), "my.task.ndcg@10")
    assert (found.last, found.gains) == (None, {})


def test_what_is_missing_is_said(run_folder, tmp_path):
    assert headline_metrics(tmp_path) == []
    with pytest.raises(DataError, match="holds no scores"):
        compare_stages(tmp_path, "my.task.ndcg@10")
    folder = run_folder(["mntp"])
    alone = compare_stages(folder, "my.task.ndcg@10")
    assert (alone.best_causal, alone.last, alone.gains) == (None, "mntp", {})
    with pytest.raises(DataError, match=r"did you mean 'my\.task\.ndcg@10'"):
        compare_stages(folder, "my.task.ndcg10")


def test_scores_without_items_cannot_be_compared(run_folder):
    folder = run_folder(ITEMS)
    (folder / "scores" / "mntp.npz").unlink()
    with pytest.raises(DataError, match=r"mntp\.npz is missing"):
        compare_stages(folder, "my.task.ndcg@10")


def test_encoders_side_by_side():
    results = {
        name: [TaskResult("t", {"m": float(v.mean())}, {"m": v})]
        for name, v in ITEMS.items()
        if name != BEFORE
    }
    first, *others = compare_encoders(results)
    assert first.gain is None
    assert first.score.low < first.score.difference < first.score.high
    assert [row.gain.difference for row in others] == pytest.approx([-0.2, -0.1, -0.25], abs=0.01)
    expected = {"difference": -0.24823, "low": -0.25093, "high": -0.24552}  # drawn from seed 0
    assert others[-1].as_dict()["gain"] == pytest.approx(expected, abs=1e-5)
    (row, *_) = compare_encoders(results, samples=0)
    point = float(ITEMS["causal_mean"].mean())
    assert row.as_dict() == {
        "task": "t", "metric": "m", "encoder": "causal_mean",
        "score": point, "low": point, "high": point, "gain": None,
    }  # fmt: skip
