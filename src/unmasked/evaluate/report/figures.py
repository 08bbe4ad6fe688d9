"""Small figures for reports, as SVG that follows the page's colours, and as PNG.

matplotlib, because its SVG is lean (a map of 400 texts is 40 kB; a plotly page begins at 4.7 MB),
needs no script to be seen, and the same figure is a PNG for a paper. Text stays text. What is drawn
in the page's own colours is drawn in `INK` and `FAINT`, which become CSS when the SVG is read.

Cost: importing matplotlib (0.5 s), then 0.1 to 0.3 s a figure.

Shapes: N texts or points.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np

from unmasked.errors import MissingExtraError
from unmasked.evaluate.bootstrap import Interval

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError("matplotlib", "report") from error

Given = ParamSpec("Given")

INK, FAINT = "#10203a", "#8a94a6"
OURS, CAUSAL = "#2a78d6", "#9aa3b2"
PALETTE = (
    "#2a78d6", "#e0732d", "#1f9d6b", "#c2417c", "#8257d8", "#b08a00", "#17a2b8", "#d64545",
    "#5f8a1c", "#7a6a58",
)  # fmt: skip
OTHER = "other"
WIDTH = 4.4  # inches; a phone shows it nearly as large as a desk
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "unmasked",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def styled(draw: Callable[Given, Figure]) -> Callable[Given, Figure]:
    """Draws in `STYLE`, which matplotlib reads as each part is made."""

    @wraps(draw)
    def drawn(*given: Given.args, **named: Given.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*given, **named)

    return drawn


def new_figure(height: float, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of the usual width, with its axes."""
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots(rows, **options)


def save_figure(figure: Figure, folder: Path, name: str) -> str:
    """Writes NAME.png (white) and NAME.svg; returns the SVG with the page's colours in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(folder / f"{name}.png", dpi=180, facecolor="white")
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    svg = written.getvalue()
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="(?!points-)([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{name}-", svg)
    return svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)")


@styled
def stages_figure(title: str, rows: Sequence[tuple[str, Interval, bool]]) -> Figure:
    """Scores with intervals, one row a stage.

    Args:
        title: the metric.
        rows: stage, score as a fraction, and whether it is a causal baseline.
    """
    figure, axes = new_figure(0.75 + 0.3 * len(rows))
    for place, (_, score, causal) in enumerate(rows):
        at, low, high = (100 * v for v in (score.difference, score.low, score.high))
        colour = CAUSAL if causal else OURS
        axes.plot([low, high], [place, place], color=colour, linewidth=2.5, alpha=0.55)
        axes.plot(at, place, "o", color=colour, markersize=6)
        axes.annotate(
            f"{at:.1f}", (high, place), (6, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.14)
    axes.grid(visible=False, axis="y")
    axes.set_title(title)
    axes.set_xlabel("x 100, with 95 % interval", fontsize=8)
    return figure


@styled
def curves_figure(name: str, records: Sequence[dict[str, float]]) -> Figure:
    """Loss, held-out loss and learning rate of a stage, by step.

    Args:
        name: of the stage.
        records: lines of its metrics.jsonl.
    """
    figure, (above, below) = new_figure(3.1, 2, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    for axes, key, label, colour, marker in (
        (above, "loss", "training", OURS, ""),
        (above, "eval_token_loss", "held out", PALETTE[1], "o"),
        (above, "eval_loss", "held out", PALETTE[1], "o"),
        (below, "learning_rate", "", PALETTE[2], ""),
    ):
        points = [(r["step"], r[key]) for r in records if key in r]
        if points and not (key == "eval_loss" and any("eval_token_loss" in r for r in records)):
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=3.5)
    above.set_title(f"{name}: loss")
    if above.get_legend_handles_labels()[0]:
        above.legend(loc="upper right", fontsize=8)
    below.set_title("learning rate", fontsize=8)
    below.set_xlabel("step")
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    below.yaxis.get_offset_text().set_fontsize(7)
    return figure


@styled
def heatmap_figure(title: str, similarity: np.ndarray, limits: tuple[float, float]) -> Figure:
    """Cosines of a few texts with one another; each is named by its number, from 1.

    Args:
        title: what is shown.
        similarity: (N, N).
        limits: cosines of the lightest and the darkest colour, the same before and after.
    """
    figure, axes = new_figure(3.9)
    shown = axes.imshow(similarity, cmap="viridis", vmin=limits[0], vmax=limits[1])
    for row, values in enumerate(similarity):
        for column, value in enumerate(values):
            dark = value < (limits[0] + limits[1]) / 2
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5,
                      color="#ffffff" if dark else "#000000")  # fmt: skip
    numbers = [str(number + 1) for number in range(len(similarity))]
    axes.set_xticks(range(len(numbers)), numbers)
    axes.set_yticks(range(len(numbers)), numbers)
    axes.grid(visible=False)
    axes.set_title(title)
    figure.colorbar(shown, ax=axes, shrink=0.8)
    return figure


@styled
def map_figure(title: str, points: np.ndarray, groups: Sequence[str], name: str) -> Figure:
    """Texts as points of the plane, coloured by group; the page adds the texts on hover.

    Args:
        title: what is shown.
        points: (N, 2).
        groups: (N,) what each text belongs to.
        name: the points are ``points-NAME`` in the SVG, in their order.
    """
    colours = group_colours(groups)
    figure, axes = new_figure(4.0)
    axes.scatter(points[:, 0], points[:, 1], s=22, c=[colours.get(g, FAINT) for g in groups],
                 alpha=0.8, linewidths=0, gid=f"points-{name}")  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title)
    return figure


@styled
def layers_figure(layers: Sequence[float], spread: Sequence[tuple[float, float]]) -> Figure:
    """How alike the states with the mask closed and open are, by layer, the embedding first."""
    figure, axes = new_figure(2.6)
    at = range(len(layers))
    low, high = zip(*spread, strict=True)
    axes.fill_between(at, low, high, color=OURS, alpha=0.2, linewidth=0)
    axes.plot(at, layers, color=OURS, marker="o", markersize=3.5)
    axes.set_ylim(min(0.0, *low), 1.03)
    axes.set_xlabel("layer (band: 10 to 90 % of tokens)")
    axes.set_title("cosine of states, mask closed and open")
    return figure


@styled
def bars_figure(shapes: Mapping[str, Mapping[str, float]]) -> Figure:
    """The same measures of several models, one small panel a measure."""
    measures = list(next(iter(shapes.values())))
    figure, panels = new_figure(1.0 + 0.28 * len(shapes) * len(measures), len(measures))
    for axes, measure in zip(panels, measures, strict=True):
        values = [shape[measure] for shape in shapes.values()]
        colours = [CAUSAL if name == "causal" else OURS for name in shapes]
        axes.barh(range(len(values)), values, color=colours, height=0.6)
        for place, value in enumerate(values):
            axes.annotate(f"{value:.3f}", (value, place), (4 if value >= 0 else -4, 0), va="center",
                          ha="left" if value >= 0 else "right", textcoords="offset points",
                          fontsize=8)  # fmt: skip
        axes.set_yticks(range(len(values)), list(shapes))
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.margins(x=0.18)
        axes.set_title(measure.replace("_", " "), fontsize=9)
        axes.grid(visible=False, axis="y")
    return figure


def group_colours(groups: Sequence[str]) -> dict[str, str]:
    """A colour for each of the most frequent groups."""
    names, counts = np.unique(np.array(groups), return_counts=True)
    frequent = [str(names[i]) for i in np.argsort(-counts, kind="stable") if names[i] != OTHER]
    return dict(zip(frequent, PALETTE, strict=False))
