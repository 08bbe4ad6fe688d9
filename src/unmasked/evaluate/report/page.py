"""report.html: what a run did, on one page that needs no network.

Scores of every stage with their intervals, loss and learning rate, and three looks at the vectors
before (the decoder as it was, with its best causal pooling) and after: a heatmap, a map, searches.
The page is one file, readable on a phone and in the dark. Here is what it says; `report.html` is
its template (jinja2 escapes every text) and `figures` says how it is drawn.

Cost: loading two models, encoding a few hundred texts (and up to `samples.SEARCHED` documents) with
each, and about ten figures: half a minute for the bundled decoder on two cores.

Shapes: N texts, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from unmasked.errors import DataError
from unmasked.evaluate.bootstrap import Interval, interval
from unmasked.evaluate.compare import (
    CAUSAL,
    COMMAND,
    compare_stages,
    headline_metrics,
    read_result,
)
from unmasked.evaluate.report import figures
from unmasked.evaluate.report.samples import Sample, draw_sample
from unmasked.evaluate.scorer import encode_by_role
from unmasked.evaluate.tasks.task_files import load_task
from unmasked.evaluate.tasks.vectors import Encode, encode_once, encoded, most_similar, norms
from unmasked.files.writing import write_text
from unmasked.recipe.files import load_recipe
from unmasked.recipe.schema import Recipe

HITS = 3

Save = Callable[[str, Any], str]
"""Writes a figure under a name; returns its SVG for the page."""


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
        DataError: it is not a run folder.
        MissingExtraError: matplotlib is not installed.
    """
    run = Path(run)
    if not (run / "recipe.yaml").is_file():
        raise DataError(f"{run} is not a run folder (no recipe.yaml). Fix: name what -o named.")
    output = Path(output) if output else run / "report.html"
    recipe = load_recipe(run / "recipe.yaml")
    save: Save = partial(figures.save, output.parent / "figures")
    columns = [compare_stages(run, metric) for metric in headline_metrics(run)]
    before = (columns[0].best_causal if columns else None) or "causal_mean"
    with figures.style():
        rows = [_stages(run, column.metric, column.scores) for column in columns]
        drawn = [figures.stages(column.metric, r) for column, r in zip(columns, rows, strict=True)]
        content = {
            "columns": columns,
            "rows": rows,
            "stages": [save(f"stages-{number}", figure) for number, figure in enumerate(drawn)],
            "curves": [save(f"curves-{name}", figures.curves(name, r)) for name, r in _logs(run)],
            "vectors": _vectors(run, recipe, before.removeprefix(CAUSAL), save),
        }
    command = f"unmasked run {run / 'recipe.yaml'} -o {run}"
    if (run / COMMAND).is_file():
        command = (run / COMMAND).read_text(encoding="utf-8").strip()
    written = _template().render(
        recipe=recipe,
        recipe_text=(run / "recipe.yaml").read_text(encoding="utf-8"),
        command=command,
        environment="\n".join(f"{name}  {value}" for name, value in environment),
        **content,
    )
    write_text(output, written)
    return output


def _template() -> Any:
    jinja = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    jinja.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    jinja.filters["short"] = _short
    text = files("unmasked.evaluate.report").joinpath("report.html").read_text(encoding="utf-8")
    return jinja.from_string(text)


def _stages(run: Path, metric: str, stages: Iterable[str]) -> list[tuple[str, Interval, bool]]:
    """Stage, score with its interval, and whether it is a causal baseline."""
    name = metric.rpartition(".")[2]
    results = ((stage, read_result(run, stage, metric)) for stage in stages)
    return [(stage, interval(found, name), stage.startswith(CAUSAL)) for stage, found in results]


def _logs(run: Path) -> list[tuple[str, list[dict[str, float]]]]:
    """Stage and the lines of its metrics, in the order in which they were written."""
    found = sorted(run.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = [(path.parent.name, path.read_text(encoding="utf-8").splitlines()) for path in found]
    return [(name, [json.loads(line) for line in rows]) for name, rows in lines]


def _vectors(run: Path, recipe: Recipe, pooling: str, save: Save) -> dict[str, Any] | None:
    """Heatmaps, maps and searches before and after; None without texts or a finished model."""
    sample = _find_sample(run, recipe.evaluate.tasks)
    if sample is None or not (run / "model" / "config.json").is_file():
        return None
    from unmasked.model import LLM2Vec

    causal = LLM2Vec.from_pretrained(
        recipe.model.base,
        enable_bidirectional=False,
        pooling_mode=pooling,
        max_length=recipe.model.max_length,
    )
    ours = LLM2Vec.from_pretrained(run / "model", allow_partial=True)
    names = (f"before: causal, {pooling.replace('_', ' ')}", "after")
    encoders = [encode_once(encode_by_role(model)) for model in (causal, ours)]
    places, pair_texts = ("before", "after"), [text for pair in sample.pairs for text in pair]
    cosines = [_cosines(encoded(encode, pair_texts)) for encode in encoders if pair_texts]
    role = "document" if sample.queries else None  # as in searches: encoded once for both
    heatmaps, maps = [], []
    for place, name, encode in zip(places, names, encoders, strict=True):
        points = _plane(encoded(encode, sample.texts, role))
        maps.append(save(f"map-{place}", figures.text_map(name, points, sample.groups, place)))
    for place, name, similarity in zip(places, names, cosines, strict=False):
        lowest = float(min(each.min() for each in cosines))
        heatmaps.append(save(f"heatmap-{place}", figures.heatmap(name, similarity, lowest)))
    return {
        "heatmaps": heatmaps,
        "pair_texts": pair_texts,
        "maps": maps,
        "colours": figures.group_colours(sample.groups),
        "texts": [
            f"{g}: {_short(t, 220)}" for g, t in zip(sample.groups, sample.texts, strict=True)
        ],
        "names": names,
        "documents": sample.documents,
        "searches": _searches(sample, encoders),
    }


def _searches(sample: Sample, encoders: Sequence[Encode]) -> list[dict[str, Any]]:
    """Each query with, for each encoder, the rank of the first wanted document and the hits."""
    if not sample.queries:
        return []
    texts, count = [text for _, text in sample.documents], len(sample.documents)
    queries = [query for query, _ in sample.queries]
    ranked = []
    for encode in encoders:
        documents, asked = encoded(encode, texts, "document"), encoded(encode, queries, "query")
        ranked.append(most_similar(asked, documents, count, tie_rank=np.arange(count)))
    return [
        {
            "query": query,
            "wanted": wanted,
            "ranks": [1 + int(np.isin(found[q], list(wanted)).argmax()) for found in ranked],
            "hits": [found[q, :HITS].tolist() for found in ranked],
        }
        for q, (query, wanted) in enumerate(sample.queries)
    ]


def _find_sample(run: Path, tasks: Sequence[str]) -> Sample | None:
    """What to show of the first task whose files are there and have texts for a map."""
    for given in tasks:
        for path in (Path(given), run / "data" / Path(given).name):
            if path.exists():
                sample = draw_sample(load_task(path))
                if len(sample.texts) >= 10:
                    return sample
    return None


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


def _short(text: str, length: int = 90) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 1].rstrip() + "…"
