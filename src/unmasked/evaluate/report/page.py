"""report.html: what a run did, on one page that needs no network.

Scores of every stage with their intervals, loss and learning rate, and three looks at the vectors
before (the decoder as it was, with its best causal pooling) and after: a heatmap, a map, searches.
Here is what the page says; `report.html` is its template, in which jinja2 escapes every text.

Cost: loading two models, encoding a few hundred texts (and up to `samples.SEARCHED` documents) with
each, and about ten figures: half a minute for the bundled decoder on two cores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from unmasked.errors import DataError
from unmasked.evaluate import compare
from unmasked.evaluate.bootstrap import Interval, interval
from unmasked.evaluate.report import figures
from unmasked.evaluate.report.samples import Sample, draw_sample
from unmasked.evaluate.scorer import encode_by_role
from unmasked.evaluate.tasks.task_files import load_task
from unmasked.evaluate.tasks.task_vectors import Encode, encode_once, encoded, most_similar, norms
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
    command = f"unmasked run {run / 'recipe.yaml'} -o {run}"
    if (run / compare.COMMAND).is_file():
        command = (run / compare.COMMAND).read_text(encoding="utf-8").strip()
    columns = [compare.compare_stages(run, metric) for metric in compare.headline_metrics(run)]
    before = (columns[0].best_causal if columns else None) or "causal_mean"
    save: Save = partial(figures.save_figure, output.parent / "figures")
    with figures.style():
        scores = [_intervals(run, column) for column in columns]
        drawn = [figures.stages(c.metric, own) for c, own in zip(columns, scores, strict=True)]
        content = {
            "columns": columns,
            "scores": scores,
            "stages": [save(f"stages-{number}", figure) for number, figure in enumerate(drawn)],
            "curves": [save(f"curves-{name}", figure) for name, figure in _curves(run)],
            "vectors": _vectors(run, recipe, before.removeprefix(compare.CAUSAL), save),
        }
    jinja = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    jinja.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    jinja.filters["short"] = _short
    template = files("unmasked.evaluate.report").joinpath("report.html").read_text(encoding="utf-8")
    written = jinja.from_string(template).render(
        recipe=recipe,
        recipe_text=(run / "recipe.yaml").read_text(encoding="utf-8"),
        command=command,
        environment="\n".join(f"{name}  {value}" for name, value in environment),
        **content,
    )
    write_text(output, written)
    return output


def _intervals(run: Path, column: compare.Comparison) -> dict[str, Interval]:
    """The score of each stage, with its interval."""
    metric = column.metric.rpartition(".")[2]
    results = {stage: compare.read_result(run, stage, column.metric) for stage in column.scores}
    return {stage: interval(result, metric) for stage, result in results.items()}


def _curves(run: Path) -> Iterator[tuple[str, Any]]:
    """Stage and figure of each metrics.jsonl, in the order in which they were written."""
    for path in sorted(run.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime):
        lines = path.read_text(encoding="utf-8").splitlines()
        yield path.parent.name, figures.curves(path.parent.name, [json.loads(x) for x in lines])


def _vectors(run: Path, recipe: Recipe, pooling: str, save: Save) -> dict[str, Any] | None:
    """Heatmaps, maps and searches before and after; None without texts or a finished model."""
    sample = _find_sample(run, recipe.evaluate.tasks)
    if sample is None or not (run / "model" / "config.json").is_file():
        return None
    from unmasked.compat.llm2vec import LLM2Vec

    causal = LLM2Vec.from_pretrained(
        recipe.model.base,
        enable_bidirectional=False,
        pooling_mode=pooling,
        max_length=recipe.model.max_length,
    )
    ours = LLM2Vec.from_pretrained(run / "model", allow_partial=True)
    name, pairs = f"before: causal, {pooling.replace('_', ' ')}", list(chain(*sample.pairs))
    role = "document" if sample.queries else None  # as in searches: encoded once for both
    sides: list[dict[str, Any]] = []
    for place, title, model in (("before", name, causal), ("after", "after", ours)):
        encode = encode_once(encode_by_role(model))
        sides.append({"name": title, "place": place})
        if pairs:
            unit = _unit(encode, pairs)
            sides[-1]["cosines"] = unit @ unit.T
        points = _plane(_unit(encode, sample.texts, role))
        drawn = figures.text_map(title, points, sample.groups, place)
        sides[-1]["map"] = save(f"map-{place}", drawn)
        sides[-1]["found"] = _search(sample, encode) if sample.queries else []
    lowest = min(float(side["cosines"].min()) for side in sides) if pairs else 0.0
    for side in sides if pairs else ():
        heatmap = figures.heatmap(side["name"], side["cosines"], lowest)
        side["heatmap"] = save(f"heatmap-{side['place']}", heatmap)
    texts = zip(sample.groups, sample.texts, strict=True)
    return {
        "sample": sample,
        "sides": sides,
        "pairs": pairs,
        "texts": [f"{group}: {_short(text, 220)}" for group, text in texts],
        "colours": figures.group_colours(sample.groups),
    }


def _search(sample: Sample, encode: Encode) -> list[tuple[int, list[int]]]:
    """For each query the rank of the first wanted document, and the positions of the hits."""
    texts, queries = [text for _, text in sample.documents], [query for query, _ in sample.queries]
    documents, asked = encoded(encode, texts, "document"), encoded(encode, queries, "query")
    ranked = most_similar(asked, documents, len(texts), tie_rank=np.arange(len(texts)))
    return [
        (1 + int(np.isin(found, list(wanted)).argmax()), found[:HITS].tolist())
        for found, (_, wanted) in zip(ranked, sample.queries, strict=True)
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


def _unit(encode: Encode, texts: Sequence[str], role: str | None = None) -> np.ndarray:
    """The unit vectors (N, D) of texts."""
    vectors = encoded(encode, texts, role)
    return np.asarray(vectors / norms(vectors)[:, None])


def _plane(unit: np.ndarray) -> np.ndarray:
    """Unit vectors (N, D) on a plane (N, 2), neighbours near each other."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    near = min(30, max(2, len(unit) // 4))
    with threadpool_limits(1):  # its threads spin: on a busy machine minutes instead of seconds
        placed = TSNE(perplexity=near, init="pca", random_state=0).fit_transform(unit)
    return np.asarray(placed, dtype=np.float32)


def _short(text: str, length: int = 90) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 1].rstrip() + "…"
