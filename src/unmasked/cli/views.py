"""Tables of scores on stdout: the stages of a run, and encoders side by side.

Scores are shown times 100.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from unmasked.cli import terminal
from unmasked.cli.terminal import short
from unmasked.evaluate.bootstrap import Interval
from unmasked.evaluate.compare import (
    Comparison,
    EncoderScore,
    compare_stages,
    headline_metrics,
    headlines,
)

if TYPE_CHECKING:
    from unmasked.demo import DemoSearch
    from unmasked.evaluate.analysis import Analysis
    from unmasked.recipe.schema import Recipe
    from unmasked.train.plan.cost import Plan, StagePlan


def stage_table(
    run_folder: Path, samples: int = 1000, metrics: Sequence[str] | None = None
) -> None:
    """One row a stage, the best causal baseline marked; below, what the last stage gained.

    Args:
        run_folder: with scores.
        samples: redrawn test sets behind each interval.
        metrics: ``TASK.METRIC`` of each column; by default the one to report of each task.
    """
    metrics = metrics or headline_metrics(run_folder)
    if not metrics:
        return
    columns = [compare_stages(run_folder, metric, samples) for metric in metrics]
    rows, marked = [], []
    for index, stage in enumerate(columns[0].scores):
        best = [column.best_causal == stage for column in columns]
        cells = [
            f"{100 * column.scores[stage]:.2f}{' *' if is_best else '  '}"
            for column, is_best in zip(columns, best, strict=True)
        ]
        rows.append([stage, *cells])
        if any(best):
            marked.append(index)
    terminal.table(["stage", *metrics], rows, marked)
    terminal.show("* best causal baseline")
    for column in columns:
        if text := _gain(column):
            terminal.show(text)


def score_table(rows: Sequence[EncoderScore], every: bool = False) -> None:
    """One row a task and metric, or, of several encoders, a task and encoder.

    Several encoders are shown by the metric to report alone unless every one is asked for, with
    what the first gains on each.
    """
    first = rows[0].encoder
    if all(row.encoder == first for row in rows):
        cells = [[r.task, r.metric, _percent(r.score), _range(r.score)] for r in rows]
        terminal.table(["task", "metric", "score", "95 % interval"], cells)
        return
    names = [f"{row.task}.{row.metric}" for row in rows]
    shown = names if every else headlines(names)
    rows = [row for row in rows if f"{row.task}.{row.metric}" in shown]
    cells = [
        [f"{r.task}.{r.metric}", r.encoder, _percent(r.score), _range(r.score), *_gained(r.gain)]
        for r in rows
    ]
    columns = ["metric", "encoder", "score", "95 % interval", "gain on it", "95 % interval", ""]
    terminal.table(columns, cells, [i for i, row in enumerate(rows) if row.encoder == first])


def plan_table(recipe: Recipe, plan: Plan) -> None:
    """What holds for all stages, then one column a stage."""
    terminal.facts(
        [
            ("base", f"{recipe.model.base}, {short(plan.parameters)} parameters, {plan.dtype}"),
            ("devices", str(plan.devices)),
            ("disk", f"{short(plan.disk, 'B')} at most, with the finished encoder"),
        ]
    )
    rows: list[tuple[str, Callable[[StagePlan], str]]] = [
        ("steps", lambda s: f"{s.steps:,}"),
        ("tokens a step", lambda s: f"{'~' if s.shape.assumed else ''}{s.tokens_per_step:,}"),
        ("tokens", lambda s: short(s.tokens_per_step * s.steps)),
        ("forwards a step", lambda s: f"{s.shape.forwards} of {s.shape.tokens:,} tokens"),
        ("trainable parameters", lambda s: f"{s.trainable:,}"),
        ("FLOPs", lambda s: f"{s.flops:.2e}"),
        ("weights", lambda s: short(s.memory.weights, "B")),
        ("gradients", lambda s: short(s.memory.gradients, "B")),
        ("optimiser", lambda s: short(s.memory.optimiser, "B")),
        ("activations", lambda s: short(s.memory.activations, "B")),
        ("logits", lambda s: short(s.memory.logits, "B")),
        ("memory per device", lambda s: short(s.memory.total, "B")),
    ]
    if plan.seconds is not None:
        rows.append(("time", lambda s: terminal.duration(s.seconds or 0)))
    cells = [[label, *(show(stage) for stage in plan.stages)] for label, show in rows]
    names = [stage.name for stage in plan.stages]
    terminal.table(["", *names], cells, [11])
    if any(stage.shape.assumed for stage in plan.stages):
        terminal.show("~ no text could be read: half of max_length is assumed for its length")


def show_searches(searches: Sequence[DemoSearch]) -> None:
    """A few searches: where the wanted document was found, and what was found instead."""
    for search in searches:
        terminal.show(f'\nsearch: "{search.query}"')
        terminal.show(f"  wanted         {search.wanted}")
        for when, (rank, hit) in (("before", search.before), ("after", search.after)):
            found = "found first" if rank == 1 else f"rank {rank}; first: {hit}"
            terminal.show(f"  {when:<6}         {found}")


def show_analysis(found: Analysis) -> None:
    """States with the mask closed and open, layer by layer; then the shape of the vectors."""
    if found.layers is None or found.spread is None:
        terminal.show("no closed mask to compare with: this model was saved without one\n")
    else:
        names = ["embedding", *(f"layer {n}" for n in range(1, len(found.layers)))]
        cells = [
            [name, f"{mean:.3f}", f"[{low:.3f}, {high:.3f}]"]
            for name, mean, (low, high) in zip(names, found.layers, found.spread, strict=True)
        ]
        terminal.table(["closed and open mask", "cosine", "10 to 90 % of tokens"], cells)
    measures = asdict(next(iter(found.shapes.values())))
    rows = [
        [measure.replace("_", " "), *(f"{asdict(s)[measure]:.3f}" for s in found.shapes.values())]
        for measure in measures
    ]
    terminal.table([f"vectors of {found.pairs} pairs", *found.shapes], rows)


def _gained(gain: Interval | None) -> list[str]:
    return [_signed(gain), _range(gain), _clear(gain)] if gain else ["", "", ""]


def _gain(column: Comparison) -> str:
    if column.gain is None:
        return ""
    return (
        f"{column.metric}: {column.last} {_signed(column.gain)} over {column.best_causal}, "
        f"95 % interval {_range(column.gain)}: {_clear(column.gain)}"
    )


def _percent(score: Interval) -> str:
    return f"{100 * score.difference:.2f}"


def _signed(gain: Interval) -> str:
    return f"{100 * gain.difference:+.2f}"


def _range(value: Interval) -> str:
    if value.low == value.high:
        return "-"  # mteb's results keep no items to draw from
    return f"[{100 * value.low:.2f}, {100 * value.high:.2f}]"


def _clear(gain: Interval) -> str:
    if not gain.clear:
        return "not clear: may be chance"
    return "worse, clear of zero" if gain.high < 0 else "clear of zero"
