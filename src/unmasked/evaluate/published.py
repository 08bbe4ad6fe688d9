"""A run beside published figures: the mean over a benchmark's tasks, stage by stage.

Published figures come without item scores, so a paired bootstrap is impossible. The interval is
that of our own mean, from the intervals of its tasks, which are independent test sets. It says how
uncertain our score is, not how much two training runs differ: that would take several seeds.

Cost: reading the scores, and a bootstrap for each task and stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unmasked.evaluate.bootstrap import Interval, interval
from unmasked.evaluate.compare import headline_metrics, read_result, read_scores
from unmasked.recipe.anchors import Anchor
from unmasked.recipe.schema import Recipe


@dataclass(frozen=True)
class PublishedStage:
    """One encoder of a run on a published benchmark."""

    stage: str  # name of the encoder in a run
    published: float  # the published score as a fraction
    ours: Interval | None
    """Our mean score with its interval; None if it is not scored yet. There is no interval (``low``
    equals ``high``) if a task has no item scores, as mteb's public tasks."""

    @property
    def difference(self) -> float | None:
        """Our score minus the published one."""
        return None if self.ours is None else self.ours.difference - self.published

    @property
    def verdict(self) -> str:
        """Whether the published score is within our interval, in words."""
        if self.ours is None:
            return "not scored yet"
        if self.ours.low == self.ours.high:
            return "no interval: the tasks keep no items"
        return "within" if self.ours.low <= self.published <= self.ours.high else "outside"


@dataclass(frozen=True)
class PublishedTable:
    """A published benchmark, and how many of its tasks a run has scored."""

    anchor: Anchor
    tasks: int
    stages: Sequence[PublishedStage]


def beside_published(run: str | Path, recipe: Recipe, samples: int = 1000) -> list[PublishedTable]:
    """A table for each published benchmark of a recipe that a run folder has begun to score."""
    named = [name for name, _ in recipe.stages()]
    tables = []
    for anchor in recipe.published():
        folder, figures = Path(run) / anchor.folder, anchor.of_stages(named)
        metrics, scored = headline_metrics(folder), read_scores(folder)
        rows = [
            PublishedStage(
                stage,
                figure / 100,
                _mean(folder, stage, metrics, samples) if stage in scored else None,
            )
            for stage, figure in figures.items()
        ]
        if scored and rows:
            tables.append(PublishedTable(anchor, len(metrics), rows))
    return tables


def _mean(folder: Path, stage: str, metrics: Sequence[str], samples: int) -> Interval:
    """The mean of one encoder's scores by one metric of each task."""
    each = [
        interval(read_result(folder, stage, metric), metric.rpartition(".")[2], samples)
        for metric in metrics
    ]
    if len(each) == 1:
        return each[0]
    mean = math.fsum(one.difference for one in each) / len(each)
    if any(one.low == one.high for one in each):
        return Interval(mean, mean, mean)
    # Errors of independent test sets add up as the root of the sum of their squares.
    below, above = (
        math.hypot(*(one.difference - end for one, end in zip(each, ends, strict=True))) / len(each)
        for ends in ([one.low for one in each], [one.high for one in each])
    )
    return Interval(mean, mean - below, mean + above)
