"""Which of several encoders is better, and whether the test set is large enough to say so.

A run leaves the scores of every stage in its folder, with what each test item scored; here the
stages are put side by side and the last is compared with the best *causal* baseline: the decoder as
it was, with its best pooling. Beating an unlucky pooling is no achievement.

Cost: reading the scores, and one paired bootstrap a metric (0.2 s for 1500 items).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unmasked.errors import DataError, unknown
from unmasked.evaluate.bootstrap import Interval, TaskResult, interval, paired_difference

CAUSAL = "causal_"
"""What the names of the baselines begin with."""
COMMAND = "command.txt"
"""Where a run folder keeps the command that made it."""


@dataclass(frozen=True)
class Comparison:
    """The stages of a run by one metric.

    Attributes:
        metric: ``TASK.METRIC``.
        scores: stage → score as a fraction, in the order they were made.
        best_causal: the causal baseline that scored highest; None if none was scored.
        last: the last stage that is no baseline; None if there is none.
        gain: last less best_causal; None if one of them is missing, no samples were drawn, or the
            task keeps no items to draw from.
    """

    metric: str
    scores: dict[str, float]
    best_causal: str | None
    last: str | None
    gain: Interval | None


@dataclass(frozen=True)
class Row:
    """One encoder's score on one metric.

    Attributes:
        task: the task's name.
        metric: ``ndcg@10``, ``spearman``, ...
        encoder: which encoder.
        score: with its interval, a point if no samples were drawn.
        gain: the first encoder less this one; None for the first itself, and without samples.
    """

    task: str
    metric: str
    encoder: str
    score: Interval
    gain: Interval | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the score a number with ``low`` and ``high`` beside it."""
        point = {"score": self.score.difference, "low": self.score.low, "high": self.score.high}
        gain = asdict(self.gain) if self.gain else None
        names = {"task": self.task, "metric": self.metric, "encoder": self.encoder}
        return {**names, **point, "gain": gain}


def headlines(metrics: Iterable[str]) -> list[str]:
    """Of ``TASK.METRIC`` names, the one to report of each task: its first."""
    first: dict[str, str] = {}
    for metric in metrics:
        first.setdefault(metric.rpartition(".")[0], metric)
    return list(first.values())


def headline_metrics(run_folder: str | Path) -> list[str]:
    """The metric to report of each task that a run was scored on."""
    stages = _read_stages(Path(run_folder))
    return headlines(stages[0]["scores"]) if stages else []


def compare_stages(run_folder: str | Path, metric: str, samples: int = 1000) -> Comparison:
    """The stages of a run by one metric; the last one against the best causal baseline.

    Args:
        run_folder: with ``results.json`` and ``scores/STAGE.npz``.
        metric: ``TASK.METRIC``.
        samples: redrawn test sets behind the interval; 0 for no interval.

    Raises:
        DataError: no scores there, or no such metric.
    """
    folder = Path(run_folder)
    scores = {stage["name"]: stage["scores"] for stage in _read_stages(folder)}
    if not scores:
        raise DataError(f"{folder} holds no scores. Fix: run a recipe with evaluate.tasks there.")
    for given in scores.values():
        if metric not in given:
            raise DataError(unknown("metric", metric, given))
    column = {name: float(given[metric]) for name, given in scores.items()}
    causal = [name for name in column if name.startswith(CAUSAL)]
    ours = [name for name in column if not name.startswith(CAUSAL)]
    best = max(causal, key=column.__getitem__, default=None)
    last = ours[-1] if ours else None
    gain = None
    if best and last and samples:
        a, b = (read_result(folder, name, metric) for name in (last, best))
        if a.items and b.items:  # mteb's own results keep none
            gain = paired_difference(a, b, metric.rpartition(".")[2], samples)
    return Comparison(metric, column, best, last, gain)


def compare_encoders(results: Mapping[str, Sequence[TaskResult]], samples: int = 1000) -> list[Row]:
    """Every encoder on every metric, each compared with the first encoder.

    Args:
        results: encoder → its results; all of the same tasks.
        samples: redrawn test sets behind each interval; 0 for no intervals.
    """
    first = next(iter(results))
    rows = []
    for index, ours in enumerate(results[first]):
        for metric in ours.scores:
            for name, given in results.items():
                theirs = given[index]
                point = theirs.scores[metric]
                score = Interval(point, point, point)
                gain = None
                if samples and theirs.items:  # mteb's own results keep none
                    score = interval(theirs, metric, samples)
                if samples and theirs.items and name != first:
                    gain = paired_difference(ours, theirs, metric, samples)
                rows.append(Row(ours.name, metric, name, score, gain))
    return rows


def _read_stages(folder: Path) -> list[dict[str, Any]]:
    file = folder / "results.json"
    if not file.is_file():
        return []
    stages: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["stages"]
    return stages


def read_result(folder: Path, stage: str, metric: str) -> TaskResult:
    """What one stage of a run scored on the task of a metric.

    Raises:
        DataError: the file of its items is missing.
    """
    scores = next(s["scores"] for s in _read_stages(folder) if s["name"] == stage)
    task = metric.rpartition(".")[0]
    file = folder / "scores" / f"{stage}.npz"
    if not file.is_file():
        raise DataError(f"{file} is missing, so nothing can be compared. Fix: run it again.")

    def of_task(values: Mapping[str, Any]) -> dict[str, Any]:
        keys = [key for key in values if key.rpartition(".")[0] == task]
        return {key.rpartition(".")[2]: values[key] for key in keys}

    with np.load(file) as items:
        return TaskResult(task, of_task(scores), of_task(items))
