"""Tables of results on stdout: stages of a run, encoders side by side, plans, searches, analyses.

Scores are shown times 100. Cost: `stage_table` computes one paired bootstrap per task.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from unmasked.cli.terminal import duration, facts, short, show, show_table
from unmasked.evaluate.bootstrap import Interval
from unmasked.evaluate.compare import EncoderScore, compare_stages, headline_metrics, headlines
from unmasked.evaluate.published import beside_published

if TYPE_CHECKING:
    from unmasked.corpus.search import Hit
    from unmasked.demo import DemoSearch
    from unmasked.evaluate.analysis import Analysis
    from unmasked.evaluate.trade_off import Cut
    from unmasked.recipe.anchors import Anchor
    from unmasked.recipe.schema import Recipe
    from unmasked.train.plan.cost import Plan, StagePlan


def stage_table(
    run_folder: Path, samples: int = 1000, metrics: Sequence[str] | None = None
) -> None:
    """Show one row per stage with the best causal baseline marked, then the last stage's gains.

    The columns are the metrics, by default the main one of each task.
    """
    metrics = metrics or headline_metrics(run_folder)
    if not metrics:
        return
    columns = [compare_stages(run_folder, metric, samples) for metric in metrics]
    rows, marked = [], []
    for index, stage in enumerate(columns[0].scores):
        stars = [" *" if column.best_causal == stage else "  " for column in columns]
        scores = [f"{100 * column.scores[stage]:.2f}" for column in columns]
        rows.append([stage, *(score + star for score, star in zip(scores, stars, strict=True))])
        if " *" in stars:
            marked.append(index)
    show_table(["stage", *metrics], rows, marked)
    if marked:
        show("* best causal baseline")
    for column in columns:
        for baseline, found in column.gains.items():
            gain, limits, verdict = _gain_cells(found)
            over = f"{column.metric}: {column.last} {gain} over {baseline}"
            show(f"{over}, 95 % interval {limits}: {verdict}")


def published_table(run_folder: Path, recipe: Recipe, anchor: Anchor) -> None:
    """Show a run's scores beside the published figures of a benchmark, one row per stage."""
    for table in beside_published(run_folder, recipe, recipe.evaluate.bootstrap):
        if table.anchor != anchor:
            continue
        rows = []
        for row in table.stages:
            ours = _score_cells(row.ours) if row.ours else ("", "")
            gap = "" if row.difference is None else f"{100 * row.difference:+.2f}"
            rows.append([row.stage, *ours, f"{100 * row.published:.2f}", gap, row.verdict])
        columns = ["stage", "ours", "95 % interval", "published", "difference", "published is"]
        show(f"{anchor.benchmark}, mean of {table.tasks} tasks; published: {anchor.source}")
        show_table(columns, rows)


def score_table(rows: Sequence[EncoderScore], every: bool = False) -> None:
    """Show the scores of encoders.

    One encoder gets a row for each task and metric. Several encoders get a row each for the main
    metric of every task, or for every metric if `every` is True, with the first one's gain.
    """
    first = rows[0].encoder
    if all(row.encoder == first for row in rows):
        cells = [[row.task, row.metric, *_score_cells(row.score)] for row in rows]
        show_table(["task", "metric", "score", "95 % interval"], cells)
        return
    names = [f"{row.task}.{row.metric}" for row in rows]
    shown = names if every else headlines(names)
    rows = [row for row in rows if f"{row.task}.{row.metric}" in shown]
    cells = [
        [f"{r.task}.{r.metric}", r.encoder, *_score_cells(r.score), *_gain_cells(r.gain)]
        for r in rows
    ]
    columns = ["metric", "encoder", "score", "95 % interval"]
    columns += ["gain over it", "95 % interval", "verdict"]
    show_table(columns, cells, [i for i, row in enumerate(rows) if row.encoder == first])


def trade_off_table(cuts: Sequence[Cut], rows: Sequence[EncoderScore]) -> None:
    """Show one row per (layers, dimensions), with its cost and each task's main metric.

    Each score is followed by its share of the whole encoder's score.
    """
    names = headlines([f"{row.task}.{row.metric}" for row in rows])
    scores = {(f"{r.task}.{r.metric}", r.encoder): r.score.difference for r in rows}
    cells = []
    for cut in cuts:
        kept = []
        for name in names:
            own, whole = scores[name, cut.name], scores[name, cuts[0].name]
            kept += [f"{100 * own:.2f}", f"{100 * own / whole:.1f} %" if whole else "-"]
        cost = [f"{100 * cut.compute:.0f} %", f"{cut.bytes:,}"]
        cells.append([str(cut.layers), str(cut.dimensions), *cost, *kept])
    columns = [part for name in names for part in (name, "of the whole")]
    show_table(["layers", "dimensions", "compute", "bytes a vector", *columns], cells, [0])


def plan_table(recipe: Recipe, plan: Plan) -> None:
    """Show what all stages have in common, then one column per stage."""
    facts(
        [
            ("base", f"{recipe.model.base}, {short(plan.parameters)} parameters, {plan.dtype}"),
            ("devices", str(plan.devices)),
            ("disk", f"{short(plan.disk, 'B')} at most, with the finished encoder"),
        ]
    )
    rows: list[tuple[str, Callable[[StagePlan], str]]] = [
        ("steps", lambda s: f"{s.steps:,}"),
        ("tokens a step", lambda s: f"{'~' if s.assumed else ''}{s.tokens_per_step:,}"),
        ("tokens", lambda s: short(s.tokens_per_step * s.steps)),
        ("forwards a step", lambda s: f"{s.forwards} of {s.tokens:,} tokens"),
        ("trainable parameters", lambda s: f"{s.trainable:,}"),
        ("FLOPs", lambda s: f"{s.flops:.2e}"),
        ("weights", lambda s: short(s.memory.weights, "B")),
        ("gradients", lambda s: short(s.memory.gradients, "B")),
        ("optimiser", lambda s: short(s.memory.optimiser, "B")),
        ("activations", lambda s: short(s.memory.activations, "B")),
        ("logits", lambda s: short(s.memory.logits, "B")),
        ("memory per device", lambda s: short(s.memory.total, "B")),
    ]
    if any(stage.teacher for stage in plan.stages):
        rows[-1:-1] = [
            ("teacher's texts", lambda s: short(s.teacher.texts) if s.teacher else ""),
            ("while it encodes", lambda s: short(s.memory.teaching, "B") if s.teacher else ""),
        ]
    marked = [len(rows) - 1]
    if any(stage.seconds is not None for stage in plan.stages):
        rows.append(("time", lambda s: duration(s.seconds or 0)))
    cells = [[label, *(value(stage) for stage in plan.stages)] for label, value in rows]
    show_table(["", *(stage.name for stage in plan.stages)], cells, marked)
    for stage in plan.stages:
        if stage.assumed:
            show(f"~ {stage.name}: half of max_length is assumed for a text, as {stage.assumed}")
        if stage.unread:
            show(f"~ {stage.name}: {stage.unread}")


def settings_text(below: str = "") -> str:
    """The settings of a recipe at and below a name (by default all), with a paragraph each."""
    from unmasked.recipe.settings import settings

    parts = []
    for setting in settings(below):
        name = setting.name
        head = f"[{name}]" if setting.section else f"{name}: {setting.values}"
        lines = textwrap.wrap(setting.about, 76, initial_indent="    ", subsequent_indent="    ")
        parts.append("\n".join([head, *lines]))
    return "\n".join(parts)


def show_searches(searches: Sequence[DemoSearch]) -> None:
    """Show a few searches: the rank of the wanted document, and the document that came first."""
    for search in searches:
        show(f'\nsearch: "{search.query}"')
        show(f"  wanted         {search.wanted}")
        for when, (rank, hit) in (("before", search.before), ("after", search.after)):
            found = "found first" if rank == 1 else f"rank {rank}; first: {hit}"
            show(f"  {when:<6}         {found}")


def show_analysis(found: Analysis) -> None:
    """Show the cosine of states with closed and open mask by layer, then the vectors' geometry."""
    if found.layers is None or found.spread is None:
        show("no closed mask to compare with: this model was saved without one\n")
    else:
        names = ["embedding", *(f"layer {n}" for n in range(1, len(found.layers)))]
        cells = [
            [name, f"{mean:.3f}", f"[{low:.3f}, {high:.3f}]"]
            for name, mean, (low, high) in zip(names, found.layers, found.spread, strict=True)
        ]
        show_table(["closed and open mask", "cosine", "10 to 90 % of tokens"], cells)
    shapes = [asdict(shape) for shape in found.shapes.values()]
    rows = [[key.replace("_", " "), *(f"{s[key]:.3f}" for s in shapes)] for key in shapes[0]]
    show_table([f"vectors of {found.pairs} pairs", *found.shapes], rows)


def _score_cells(score: Interval) -> tuple[str, str]:
    return f"{100 * score.difference:.2f}", _limits(score)


def _gain_cells(gain: Interval | None) -> tuple[str, str, str]:
    if gain is None:
        return "", "", ""
    verdict = "worse, clear of zero" if gain.high < 0 else "clear of zero"
    verdict = verdict if gain.clear else "not clear: may be chance"
    return f"{100 * gain.difference:+.2f}", _limits(gain), verdict


def _limits(value: Interval) -> str:
    if value.low == value.high:
        return "-"  # mteb's results keep no scores of single items to resample
    return f"[{100 * value.low:.2f}, {100 * value.high:.2f}]"


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def show_hits(hits: Sequence[Hit]) -> None:
    """Show each text that was found: a line with its score and place, then its beginning."""
    for hit in hits:
        place = [hit.id if hit.id is not None else f"row {hit.row}"]
        if hit.file is not None and hit.file != hit.id:
            place.append(hit.file)
        if hit.begin is not None:
            place.append(f"characters {hit.begin:,} to {hit.end:,}")
        lines = [f"{hit.score:.4f}  {', '.join(place)}"]
        if hit.text is not None:
            lines.append(f"        {shorten(hit.text, 200, placeholder=' ...')}")
        for line in lines:  # a text may contain control sequences, which the terminal would execute
            show(_CONTROL.sub("\ufffd", line))
