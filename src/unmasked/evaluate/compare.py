"""Which of several encoders is better, and whether the test set is large enough to say so.

A run folder has the scores of each test item at every stage. The last stage is compared with the
best *causal* baseline: the untouched decoder with the pooling that suits it best, since a gain over
a bad pooling says little. If the stages began with more than a decoder, the last stage is compared
with that encoder, too. Cost: reading the scores, and one or two paired bootstraps per metric (0.2 s
for 1500 items).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unmasked.errors import DataError, unknown
from unmasked.evaluate.bootstrap import Interval, TaskResult, interval, paired_difference
from unmasked.recipe.schema import BEFORE, CAUSAL

COMMAND = "command.txt"  # the file in a run folder with the command that made it
MACHINE = "machine.txt"  # the file in a run folder that describes the machine it ran on


@dataclass(frozen=True)
class Comparison:
    """The stages of a run by one metric."""

    metric: str  # ``TASK.METRIC``
    scores: dict[str, float]  # stage → score as a fraction, in the order they were scored
    best_causal: str | None  # the causal baseline with the highest score; None if none was scored
    last: str | None  # the last stage that is not a baseline
    gains: dict[str, Interval] = field(default_factory=dict)
    """Gain of `last` over `best_causal` and over the encoder that the stages began with (`BEFORE`),
    if these were scored; empty without items or with 0 samples."""


@dataclass(frozen=True)
class EncoderScore:
    """One encoder's score by one metric."""

    task: str
    metric: str  # ``ndcg@10``, ``spearman``, ...
    encoder: str
    score: Interval  # the score alone without items or with 0 samples
    gain: Interval | None  # of the first encoder over this one; None without items or samples

    def as_dict(self) -> dict[str, Any]:
        """A flat dictionary for JSON: ``score``, ``low`` and ``high`` are numbers."""
        point = {"score": self.score.difference, "low": self.score.low, "high": self.score.high}
        names = {"task": self.task, "metric": self.metric, "encoder": self.encoder}
        return {**names, **point, "gain": self.gain and asdict(self.gain)}


def headlines(metrics: Iterable[str]) -> list[str]:
    """The metric to report for each task: the first of its ``TASK.METRIC`` names."""
    first: dict[str, str] = {}
    for metric in metrics:
        first.setdefault(metric.rpartition(".")[0], metric)
    return list(first.values())


def headline_metrics(run_folder: str | Path) -> list[str]:
    """The metric to report for each task of a run."""
    return headlines(next(iter(read_scores(Path(run_folder)).values()), ()))


def compare_stages(run_folder: str | Path, metric: str, samples: int = 1000) -> Comparison:
    """The stages of a run by one metric; the last stage is compared with the baselines.

    Args:
        run_folder: a folder with ``results.json`` and ``scores/STAGE.npz``.
        metric: ``TASK.METRIC``.
        samples: number of resampled test sets for the interval; 0 for no interval.

    Raises:
        DataError: the folder has no scores, or not this metric.
    """
    folder, column, gains = Path(run_folder), {}, {}
    for stage, scores in read_scores(folder).items():
        if metric not in scores:
            raise DataError(unknown("metric", metric, scores))
        column[stage] = float(scores[metric])
    if not column:
        raise DataError(f"{folder} holds no scores. Fix: run a recipe with evaluate.tasks there.")
    causal = [stage for stage in column if stage.startswith(CAUSAL)]
    best = max(causal, key=column.__getitem__, default=None)
    last = next((stage for stage in reversed(column) if stage not in (*causal, BEFORE)), None)
    for name in filter(None, (best, BEFORE)):
        if name in column and last and samples:
            a, b = (read_result(folder, stage, metric) for stage in (last, name))
            if a.items and b.items:
                gains[name] = paired_difference(a, b, metric.rpartition(".")[2], samples)
    return Comparison(metric, column, best, last, gains)


def compare_encoders(
    results: Mapping[str, Sequence[TaskResult]], samples: int = 1000
) -> list[EncoderScore]:
    """Every encoder by every metric, compared with the first encoder.

    Args:
        results: encoder → its results, of the same tasks for all encoders.
        samples: as in `compare_stages`.
    """
    first, rows = next(iter(results)), []
    for index, ours in enumerate(results[first]):
        for metric in ours.scores:
            for name, given in results.items():
                theirs, gain = given[index], None
                if samples and theirs.items and name != first:
                    gain = paired_difference(ours, theirs, metric, samples)
                score = interval(theirs, metric, samples)
                rows.append(EncoderScore(ours.name, metric, name, score, gain))
    return rows


def read_result(folder: Path, stage: str, metric: str) -> TaskResult:
    """The result of one stage of a run on the task of a metric ``TASK.METRIC``.

    Raises:
        DataError: the file with the scores of the items is missing.
    """
    task, file = metric.rpartition(".")[0], folder / "scores" / f"{stage}.npz"
    if not file.is_file():
        raise DataError(f"{file} is missing, so nothing can be compared. Fix: run it again.")
    with np.load(file) as items:
        values: list[Mapping[str, Any]] = [read_scores(folder)[stage], items]
        scores, kept = (
            {key.rpartition(".")[2]: found[key] for key in found if key.rpartition(".")[0] == task}
            for found in values
        )
    return TaskResult(task, scores, kept)


def read_scores(folder: Path) -> dict[str, dict[str, float]]:
    """Stage → scores, in the order they were scored."""
    file = folder / "results.json"
    if not file.is_file():
        return {}
    stages = json.loads(file.read_text(encoding="utf-8"))["stages"]
    return {stage["name"]: stage["scores"] for stage in stages}
