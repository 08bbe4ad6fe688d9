"""Small figures for reports, as SVG in the colours of the page, and as PNG.

They are drawn by matplotlib, because its SVG is small (a map of 400 texts is 40 kB; a plotly page
starts at 4.7 MB) and needs no script, and the same figure is a PNG for a paper. `INK` and `FAINT`
are replaced by the page's own colours. Draw and save inside ``with style():``, since matplotlib
reads the style as each part is made. Cost: importing matplotlib (0.5 s), then 0.1 to 0.3 s per
figure.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unmasked.errors import MissingExtraError
from unmasked.evaluate.bootstrap import Interval
from unmasked.recipe.schema import BEFORE

try:
    import matplotlib.style
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError("matplotlib", "report") from error

INK, FAINT = "#10203a", "#8a94a6"
OURS, CAUSAL = "#2a78d6", "#9aa3b2"
PALETTE = (
    "#2a78d6", "#e0732d", "#1f9d6b", "#c2417c", "#8257d8", "#b08a00", "#17a2b8", "#d64545",
    "#5f8a1c", "#7a6a58",
)  # fmt: skip
OTHER = "other"
LOSSES = ("loss", "eval_token_loss", "eval_loss")  # keys of a line of metrics.jsonl that are drawn
WIDTH = 4.4  # inches, narrow enough for a phone


def style() -> Any:
    """A context in which matplotlib uses the style of the reports."""
    return matplotlib.style.context(Path(__file__).with_name("report.mplstyle"))


def save_figure(folder: Path, name: str, figure: Figure) -> str:
    """Write NAME.png (on white) and NAME.svg; return the SVG for the page, in its colours."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=180, facecolor="white")
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    svg = written.getvalue()
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    for size in ("height", "width"):  # the page sets the size
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    # Ids must be unique on the page, and so must the references to them.
    svg = re.sub(r'\bid="(?!points-)([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{name}-", svg)
    return svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)")


def stages(metric: str, scores: Mapping[str, Interval]) -> Figure:
    """Scores with intervals, one row per stage; the causal baselines in grey."""
    figure, axes = _axes(0.75 + 0.3 * len(scores), metric)
    for place, (name, score) in enumerate(scores.items()):
        at, low, high = (100 * v for v in (score.difference, score.low, score.high))
        colour = CAUSAL if name.startswith("causal") or name == BEFORE else OURS
        axes.plot([low, high], [place, place], color=colour, linewidth=2.5, alpha=0.55)
        axes.plot(at, place, "o", color=colour, markersize=6)
        axes.annotate(f"{at:.1f}", (high, place), (6, 0), textcoords="offset points", va="center",
                      fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(scores)), [name.replace("_", " ") for name in scores])
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.margins(x=0.14)
    axes.grid(visible=False, axis="y")
    spans = any(score.low < score.high for score in scores.values())
    axes.set_xlabel("x 100, with 95 % interval" if spans else "x 100", fontsize=8)
    return figure


def curves(name: str, records: Sequence[dict[str, float]]) -> Figure:
    """Training loss, held-out loss and learning rate of a stage, from its metrics.jsonl."""
    ratios = {"height_ratios": [3, 1]}
    figure, (above, below) = _axes(3.1, f"{name}: loss", 2, sharex=True, gridspec_kw=ratios)
    by_token = any("eval_token_loss" in record for record in records)
    for axes, key, label, colour, marker in (
        (above, "loss", "training", OURS, ""),
        (above, "eval_token_loss" if by_token else "eval_loss", "held out", PALETTE[1], "o"),
        (below, "learning_rate", "", PALETTE[2], ""),
    ):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=3.5)
    if above.get_legend_handles_labels()[0]:
        above.legend(loc="upper right", fontsize=8)
    below.set_title("learning rate", fontsize=8)
    below.set_xlabel("step")
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    below.yaxis.get_offset_text().set_fontsize(7)
    return figure


def heatmap(title: str, similarity: np.ndarray, lowest: float) -> Figure:
    """Cosines (N, N) of a few texts, numbered from 1; `lowest` gets the darkest colour."""
    figure, axes = _axes(3.9, title)
    shown = axes.imshow(similarity, cmap="viridis", vmin=lowest, vmax=1.0)
    for (row, column), value in np.ndenumerate(similarity):
        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5,
                  color="#ffffff" if value < (lowest + 1.0) / 2 else "#000000")  # fmt: skip
    for ticks in (axes.set_xticks, axes.set_yticks):
        ticks(range(len(similarity)), [str(n + 1) for n in range(len(similarity))])
    axes.grid(visible=False)
    figure.colorbar(shown, ax=axes, shrink=0.8)
    return figure


def text_map(title: str, points: np.ndarray, groups: Sequence[str], name: str) -> Figure:
    """Texts as points (N, 2), coloured by group; their id in the SVG is ``points-NAME``."""
    colours = group_colours(groups)
    figure, axes = _axes(4.0, title)
    axes.scatter(points[:, 0], points[:, 1], s=22, c=[colours.get(g, FAINT) for g in groups],
                 alpha=0.8, linewidths=0, gid=f"points-{name}")  # fmt: skip
    axes.set(xticks=[], yticks=[])
    return figure


def layers(means: Sequence[float], spread: Sequence[tuple[float, float]]) -> Figure:
    """Cosine between states with the mask closed and open, by layer, the embedding first."""
    figure, axes = _axes(2.6, "cosine of states, mask closed and open")
    low, high = zip(*spread, strict=True)
    axes.fill_between(range(len(means)), low, high, color=OURS, alpha=0.2, linewidth=0)
    axes.plot(range(len(means)), means, color=OURS, marker="o", markersize=3.5)
    axes.set_ylim(min(0.0, *low), 1.03)
    axes.set_xlabel("layer (band: 10 to 90 % of tokens)")
    return figure


def bars(shapes: Mapping[str, Mapping[str, float]]) -> Figure:
    """The same measures of several models, one small panel per measure."""
    measures = list(next(iter(shapes.values())))
    figure, panels = _axes(1.0 + 0.28 * len(shapes) * len(measures), "", len(measures))
    colours = [CAUSAL if name == "causal" else OURS for name in shapes]
    for axes, measure in zip(panels, measures, strict=True):
        drawn = axes.barh(list(shapes), [own[measure] for own in shapes.values()], 0.6,
                          color=colours)  # fmt: skip
        axes.bar_label(drawn, fmt="%.3f", padding=4, fontsize=8)
        axes.set_ylim(len(shapes) - 0.4, -0.6)
        axes.margins(x=0.18)
        axes.set_title(measure.replace("_", " "), fontsize=9)
        axes.grid(visible=False, axis="y")
    return figure


def group_colours(groups: Sequence[str]) -> dict[str, str]:
    """A colour for each of the most frequent groups."""
    names, counts = np.unique(np.array(groups), return_counts=True)
    frequent = [str(names[i]) for i in np.argsort(-counts, kind="stable") if names[i] != OTHER]
    return dict(zip(frequent, PALETTE, strict=False))


def _axes(height: float, title: str, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of the usual width, and its axes, the first of which get the title."""
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots(rows, **options)
    np.atleast_1d(axes)[0].set_title(title)
    return figure, axes
