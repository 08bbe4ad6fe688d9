"""report.html: what a run did, on one page that needs no network.

Scores of every stage with their intervals, loss and learning rate, and three looks at the vectors
before (the decoder as it was, its best causal pooling) and after: a heatmap, a map, searches. The
page is one file, readable on a phone and in the dark; `figures` says how it is drawn.

Cost: loading two models, encoding a few hundred texts (and up to `samples.SEARCHED` documents) with
each, and about ten figures: half a minute for the bundled decoder on two cores.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from unmasked.errors import DataError
from unmasked.evaluate.bootstrap import Interval, interval
from unmasked.evaluate.compare import (
    CAUSAL,
    COMMAND,
    Comparison,
    compare_stages,
    headline_metrics,
    read_result,
)
from unmasked.evaluate.report import figures
from unmasked.evaluate.report.samples import Sample, draw_sample
from unmasked.evaluate.scorer import encode_by_role
from unmasked.evaluate.tasks.files import load_task
from unmasked.evaluate.tasks.vectors import Encode, encode_once, encoded, norms, search
from unmasked.files.writing import write_text
from unmasked.recipe.files import load_recipe

HITS = 3
SHORT = 90  # characters of a text in a list


def write_report(
    run: str | Path,
    output: str | Path | None = None,
    environment: Sequence[tuple[str, str]] = (),
) -> Path:
    """Draw the report of a finished run.

    Args:
        run: a run folder, with ``recipe.yaml``.
        output: where to write; by default ``report.html`` in the run folder. Figures go into
            ``figures`` beside it.
        environment: what the run was made with, name and value.

    Returns:
        The file written.

    Raises:
        DataError: it is no run folder.
        MissingExtraError: matplotlib is not installed.
    """
    run = Path(run)
    if not (run / "recipe.yaml").is_file():
        raise DataError(f"{run} is no run folder (no recipe.yaml). Fix: name what -o named.")
    output = Path(output) if output else run / "report.html"
    recipe = load_recipe(run / "recipe.yaml")
    page = _Page(run, output.parent / "figures")
    page.scores()
    page.curves()
    texts = page.vectors(recipe)
    page.facts(environment)
    template = files("unmasked.evaluate.report").joinpath("report.html").read_text(encoding="utf-8")
    stages = ", ".join(f"{name} {stage.steps:,} steps" for name, stage in recipe.stages())
    written = Template(template).substitute(
        title=f"{_text(recipe.name)}: report",
        name=_text(recipe.name),
        subtitle=_text(f"base {recipe.model.base}; {stages or 'converted only'}"),
        body="\n".join(page.parts),
        texts=json.dumps(texts, ensure_ascii=False).replace("</", "<\\/"),
    )
    write_text(output, written)
    return output


class _Page:
    """The parts of the page, in order."""

    def __init__(self, run: Path, folder: Path) -> None:
        self.run = run
        self.folder = folder
        self.parts: list[str] = []
        self.before = "causal_mean"

    def scores(self) -> None:
        """The gains in large, the table of all stages, a figure a task."""
        metrics = headline_metrics(self.run)
        if not metrics:
            return
        columns = [compare_stages(self.run, metric) for metric in metrics]
        self.before = columns[0].best_causal or self.before
        rows = {
            metric: [
                (stage, _score(self.run, stage, metric, value), stage.startswith(CAUSAL))
                for stage, value in column.scores.items()
            ]
            for metric, column in zip(metrics, columns, strict=True)
        }
        self.parts += ["<h2>Gain over the best causal pooling</h2>", '<div class="headline">']
        self.parts += [_gain(column) for column in columns]
        self.parts += ["</div>", "<h2>Every stage</h2>", _table(columns, rows)]
        drawn = [
            self._figure(figures.stages_figure(metric, rows[metric]), f"stages-{number}")
            for number, metric in enumerate(metrics)
        ]
        self._figures(drawn)

    def curves(self) -> None:
        """Loss and learning rate of each stage that left its metrics."""
        found = sorted(self.run.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
        drawn = []
        for path in found:
            lines = path.read_text(encoding="utf-8").splitlines()
            figure = figures.curves_figure(path.parent.name, [json.loads(line) for line in lines])
            drawn.append(self._figure(figure, f"curves-{path.parent.name}"))
        if drawn:
            self.parts.append("<h2>Training</h2>")
            self._figures(drawn)

    def vectors(self, recipe: Any) -> list[str]:
        """Heatmaps, maps and searches before and after; returns the texts of the map."""
        sample = _find_sample(self.run, recipe.evaluate.tasks)
        if sample is None or not (self.run / "model" / "config.json").is_file():
            return []
        from unmasked.compat.llm2vec import LLM2Vec

        pooling = self.before.removeprefix(CAUSAL)
        models = {
            f"before: causal, {pooling.replace('_', ' ')}": LLM2Vec.from_pretrained(
                recipe.model.base,
                enable_bidirectional=False,
                pooling_mode=pooling,
                max_length=recipe.model.max_length,
            ),
            "after": LLM2Vec.from_pretrained(self.run / "model", allow_partial=True),
        }
        encoders = {name: encode_once(encode_by_role(model)) for name, model in models.items()}
        self._heatmaps(sample, encoders)
        self._maps(sample, encoders)
        self._searches(sample, encoders)
        return [f"{g}: {_short(t, 220)}" for g, t in zip(sample.groups, sample.texts, strict=True)]

    def facts(self, environment: Sequence[tuple[str, str]]) -> None:
        """The command, the recipe as it was resolved, the environment."""
        kept = self.run / COMMAND
        command = f"unmasked run {self.run / 'recipe.yaml'} -o {self.run}"
        if kept.is_file():
            command = kept.read_text(encoding="utf-8").strip()
        recipe = (self.run / "recipe.yaml").read_text(encoding="utf-8")
        told = "\n".join(f"{name}  {value}" for name, value in environment)
        self.parts.append(f"<h2>How it was made</h2><pre>{_text(command)}</pre>")
        self.parts.append(_folded("Recipe, as resolved", recipe))
        if told:
            self.parts.append(_folded("Environment", told))

    def _heatmaps(self, sample: Sample, encoders: Mapping[str, Encode]) -> None:
        texts = [text for pair in sample.pairs for text in pair]
        if not texts:
            return
        cosines = {name: _cosines(encoded(encode, texts)) for name, encode in encoders.items()}
        low = min(float(values.min()) for values in cosines.values())
        self.parts.append(
            "<h2>Similarity of a few texts</h2><p>Cosines times 100. 1 and 2 belong together, "
            "3 and 4, and so on: bright squares along the diagonal and dark ones elsewhere are "
            "what is wanted.</p>"
        )
        self._figures(
            self._figure(figures.heatmap_figure(name, values, (low, 1.0)), f"heatmap-{place}")
            for place, (name, values) in zip(("before", "after"), cosines.items(), strict=True)
        )
        listed = "".join(f"<li>{_text(_short(text))}</li>" for text in texts)
        self.parts.append(f"<details><summary>The texts</summary><ol>{listed}</ol></details>")

    def _maps(self, sample: Sample, encoders: Mapping[str, Encode]) -> None:
        colours = figures.group_colours(sample.groups)
        legend = "".join(
            f'<span><i style="background:{colour}"></i>{_text(name)}</span>'
            for name, colour in colours.items()
        )
        self.parts.append(
            f"<h2>A map of {len(sample.texts)} texts</h2><p>Texts that are near each other here "
            "have similar vectors (t-SNE: neighbourhoods mean something, distances and directions "
            "do not). Point at one, or touch it, to read it; it is marked in both.</p>"
            f'<div class="legend">{legend}</div>'
        )
        drawn = []
        for place, (name, encode) in zip(("before", "after"), encoders.items(), strict=True):
            role = "document" if sample.queries else None  # as in searches: encoded once for both
            points = _plane(encoded(encode, sample.texts, role))
            figure = figures.map_figure(name, points, sample.groups, place)
            drawn.append(self._figure(figure, f"map-{place}"))
        self._figures(drawn)

    def _searches(self, sample: Sample, encoders: Mapping[str, Encode]) -> None:
        if not sample.queries:
            return
        count = len(sample.documents)
        self.parts.append(
            f"<h2>Searches among {count:,} documents</h2><p>Wanted documents are green; of each "
            "side the rank of the first wanted one.</p>"
        )
        for query, wanted in sample.queries:
            sides = []
            for name, encode in encoders.items():
                found = search(encode, sample.documents, query, count)
                rank = next(place for place, (hit, _) in enumerate(found, 1) if hit in wanted)
                hits = "".join(
                    f"<li{' class=hit' if hit in wanted else ''}>{_text(sample.ids[hit])}: "
                    f"{_text(_short(sample.documents[hit]))}</li>"
                    for hit, _ in found[:HITS]
                )
                sides.append(f"<div><b>{_text(name)}</b>: rank {rank:,}<ol>{hits}</ol></div>")
            self.parts.append(
                f'<div class="search"><p><b>{_text(_short(query, 200))}</b></p>'
                f'<div class="sides">{"".join(sides)}</div></div>'
            )

    def _figure(self, figure: Any, name: str) -> str:
        return f"<figure>{figures.save_figure(figure, self.folder, name)}</figure>"

    def _figures(self, drawn: Any) -> None:
        self.parts.append(f'<div class="figures">{"".join(drawn)}</div>')


def _find_sample(run: Path, tasks: Sequence[str]) -> Sample | None:
    """What to show of the first task whose files are there and have texts for a map."""
    for given in tasks:
        for path in (Path(given), run / "data" / Path(given).name):
            if path.exists():
                sample = draw_sample(load_task(path))
                if len(sample.texts) >= 10:
                    return sample
    return None


def _score(run: Path, stage: str, metric: str, value: float) -> Interval:
    result = read_result(run, stage, metric)
    if not result.items:
        return Interval(value, value, value)
    return interval(result, metric.rpartition(".")[2])


def _gain(column: Comparison) -> str:
    value = _text(column.metric)
    if column.gain is None or column.last is None:
        best = max(column.scores.values())
        return f"<div>{value}<b>{100 * best:.1f}</b><span class=soft>highest stage</span></div>"
    gain = column.gain
    kind = ("good" if gain.low > 0 else "bad") if gain.clear else "soft"
    sure = "clear of zero" if gain.clear else "may be chance"
    return (
        f'<div>{value}<b class="{kind}">{100 * gain.difference:+.1f}</b><span class="soft">'
        f"{_text(column.last)}, 95 % interval [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}], "
        f"{sure}</span></div>"
    )


def _table(
    columns: Sequence[Comparison], rows: Mapping[str, Sequence[tuple[str, Interval, bool]]]
) -> str:
    head = "".join(f"<th>{_text(column.metric)}</th>" for column in columns)
    lines = []
    for number, stage in enumerate(columns[0].scores):
        cells = []
        for column in columns:
            _, score, _ = rows[column.metric][number]
            mark = " *" if column.best_causal == stage else ""
            around = f"[{100 * score.low:.1f}, {100 * score.high:.1f}]"
            known = around if score.low < score.high else ""
            cells.append(f"<td>{100 * score.difference:.2f}{mark}<small>{known}</small></td>")
        best = ' class="best"' if stage == columns[0].last else ""
        name = _text(stage.replace("_", " "))
        lines.append(f"<tr{best}><td>{name}</td>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table><thead><tr><th>stage</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        '<p class="soft">Times 100, 95 % bootstrap intervals. * best causal baseline.</p>'
    )


def _plane(vectors: np.ndarray) -> np.ndarray:
    """Texts on a plane (N, 2), neighbours near each other."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    near = min(30, max(2, len(vectors) // 4))
    unit = vectors / norms(vectors)[:, None]
    with threadpool_limits(1):  # its threads spin: on a busy machine minutes instead of seconds
        placed = TSNE(perplexity=near, init="pca", random_state=0).fit_transform(unit)
    return np.asarray(placed, dtype=np.float32)


def _cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors / norms(vectors)[:, None]
    return np.asarray(unit @ unit.T)


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{_text(title)}</summary><pre>{_text(text)}</pre></details>"


def _short(text: str, length: int = SHORT) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 1].rstrip() + "…"


def _text(given: object) -> str:
    return html.escape(str(given), quote=True)
