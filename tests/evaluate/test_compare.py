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
from unmasked.evaluate.scorer import make_scorer

RANDOM = np.random.default_rng(0)
CAUSAL = np.clip(RANDOM.normal(0.3, 0.1, 200), 0, 1)
ITEMS = {
    "causal_mean": CAUSAL - 0.2,
    "causal_last_token": CAUSAL,
    "bidirectional": CAUSAL - 0.1,
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
    folder = run_folder(ITEMS)
    assert headline_metrics(folder) == ["my.task.ndcg@10", "sts.spearman"]
    found = compare_stages(folder, "my.task.ndcg@10")
    assert list(found.scores) == list(ITEMS)
    assert (found.best_causal, found.last) == ("causal_last_token", "mntp")
    assert found.gain.difference == pytest.approx((ITEMS["mntp"] - CAUSAL).mean())
    assert 0.04 < found.gain.low < found.gain.difference < found.gain.high < 0.06
    assert found.gain.clear
    assert compare_stages(folder, "my.task.ndcg@10", samples=0).gain is None


def test_what_is_missing_is_said(run_folder, tmp_path):
    assert headline_metrics(tmp_path) == []
    with pytest.raises(DataError, match="holds no scores"):
        compare_stages(tmp_path, "my.task.ndcg@10")
    folder = run_folder(["mntp"])
    alone = compare_stages(folder, "my.task.ndcg@10")
    assert (alone.best_causal, alone.last, alone.gain) == (None, "mntp", None)
    with pytest.raises(DataError, match=r"did you mean 'my\.task\.ndcg@10'"):
        compare_stages(folder, "my.task.ndcg10")


def test_scores_without_items_cannot_be_compared(run_folder):
    folder = run_folder(ITEMS)
    (folder / "scores" / "mntp.npz").unlink()
    with pytest.raises(DataError, match=r"mntp\.npz is missing"):
        compare_stages(folder, "my.task.ndcg@10")


def test_encoders_side_by_side():
    results = {
        name: [TaskResult("t", {"m": float(v.mean())}, {"m": v})] for name, v in ITEMS.items()
    }
    first, *others = compare_encoders(results)
    assert first.gain is None
    assert first.score.low < first.score.difference < first.score.high
    assert [row.gain.difference for row in others] == pytest.approx([-0.2, -0.1, -0.25], abs=0.01)
    (row, *_) = compare_encoders(results, samples=0)
    assert row.as_dict() == {
        "task": "t", "metric": "m", "encoder": "causal_mean",
        "score": row.score.difference, "low": row.score.low, "high": row.score.high, "gain": None,
    }  # fmt: skip
    assert row.score.low == row.score.high


def test_tasks_of_one_name_are_refused_before_any_model_is_scored(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        rows = "score\tsentence1\tsentence2\n1\tx\ty\n2\tx\tz\n"
        (tmp_path / folder / "sts.tsv").write_text(rows)
    with pytest.raises(DataError, match="two tasks are called 'sts'"):
        make_scorer([tmp_path / "a" / "sts.tsv", tmp_path / "b" / "sts.tsv"])


def test_the_base_is_found_through_adapters_and_run_folders(tmp_path, tiny_decoder):
    from unmasked.evaluate.baselines import causal_baselines, find_base
    from unmasked.recipe.files import recipe_text
    from unmasked.recipe.schema import Model, Recipe

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_decoder)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    recipe = Recipe(name="x", model=Model(base=str(adapter)))
    (model.parent / "recipe.yaml").write_text(recipe_text(recipe), encoding="utf-8")
    for name in (tiny_decoder, adapter, model):
        assert find_base(str(name)) == str(tiny_decoder)
    names = [name for name, _ in causal_baselines(str(tiny_decoder))]
    assert names == ["causal_mean", "causal_weighted_mean", "causal_last_token"]
