"""report.html: what a run did, on one page that needs no network.

It has the scores of every stage with their intervals, loss and learning rate, and three views of
the vectors before and after training: a heatmap, a map and searches. "Before" is the untouched
decoder with its best causal pooling or, if no causal decoder was scored, the encoder that the
stages began with. `report.html` is the template, in which jinja2 escapes every text.

Cost: loading two models, encoding up to a thousand texts with each, and about ten figures: half a
minute for the bundled decoder on two cores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from unmasked.compat.llm2vec import LLM2Vec
from unmasked.compat.origin import find_base
from unmasked.errors import DataError
from unmasked.evaluate import compare
from unmasked.evaluate.baselines import causal_encoder
from unmasked.evaluate.bootstrap import Interval, interval
from unmasked.evaluate.published import beside_published
from unmasked.evaluate.report import figures, searches
from unmasked.evaluate.report.glossary import meanings
from unmasked.evaluate.report.samples import Sample, draw_sample
from unmasked.evaluate.scorer import encode_by_role
from unmasked.evaluate.tasks.task_files import load_task
from unmasked.evaluate.tasks.task_vectors import Encode, encode_once, encoded, norms
from unmasked.files.writing import write_text
from unmasked.model import TextEncoder
from unmasked.recipe.files import load_recipe
from unmasked.recipe.schema import BEFORE, CAUSAL, Pairs, Recipe

FEWEST = 10  # minimum number of texts for a map
SECONDS = "steps_runtime"  # key of a line of metrics: the seconds that its steps took

Save = Callable[[str, Any], str]  # writes a figure under a name, and returns its SVG for the page


def write_report(
    run: str | Path,
    output: str | Path | None = None,
    environment: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write the report of a run; returns the file.

    Args:
        run: a run folder, with ``recipe.yaml``.
        output: the file; by default ``report.html`` in the run folder. Figures are written to
            ``figures`` beside it.
        environment: names and values, such as versions, to show on the page.

    Raises:
        DataError: it is not a run folder.
        MissingExtraError: matplotlib is not installed.
    """
    run = Path(run)
    if not (run / "recipe.yaml").is_file():
        raise DataError(
            f"{run} is not a run folder (no recipe.yaml). Fix: give the folder that -o of the run "
            "named."
        )
    output = Path(output) if output else run / "report.html"
    recipe = load_recipe(run / "recipe.yaml")
    samples, metrics = recipe.evaluate.bootstrap, compare.headline_metrics(run)
    columns = [compare.compare_stages(run, metric, samples) for metric in metrics]
    save: Save = partial(figures.save_figure, output.parent / "figures")
    with figures.style():
        scores = [_intervals(run, column, samples) for column in columns]
        drawn = [figures.stages(c.metric, own) for c, own in zip(columns, scores, strict=True)]
        best = columns[0].best_causal if columns else None
        content = {
            "columns": columns,
            "scores": scores,
            "published": beside_published(run, recipe, samples),
            "stages": [save(f"stages-{number}", figure) for number, figure in enumerate(drawn)],
            "curves": [save(f"curves-{name}", figure) for name, figure in _curves(run, recipe)],
            "vectors": _vectors(run, recipe, best, save),
            "meanings": meanings(
                columns[0].scores if columns else [name for name, _ in recipe.stages()],
                [column.metric for column in columns],
            ),
        }
    jinja = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    jinja.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    jinja.filters["short"] = _short
    template = files("unmasked.evaluate.report").joinpath("report.html").read_text(encoding="utf-8")
    model = run / "model"
    written = jinja.from_string(template).render(
        name=run.resolve().name,
        recipe=recipe,
        recipe_text=(run / "recipe.yaml").read_text(encoding="utf-8"),
        command=_read(run / compare.COMMAND, f"unmasked run {run / 'recipe.yaml'} -o {run}"),
        machine=_read(run / compare.MACHINE),
        environment="\n".join(f"{name}  {value}" for name, value in environment),
        facts=_facts(run, recipe),
        trained=[f"{name} {_trained(run, name, stage.steps)}" for name, stage in recipe.stages()],
        model=str(model) if (model / "config.json").is_file() else None,
        **content,
    )
    # A text may have an unpaired surrogate, which cannot be written as UTF-8.
    write_text(output, written.encode("utf-8", "replace").decode("utf-8"))
    return output


def _read(file: Path, otherwise: str = "") -> str:
    """The content of a small file, if it exists."""
    return file.read_text(encoding="utf-8").strip() if file.is_file() else otherwise


def _facts(run: Path, recipe: Recipe) -> list[tuple[str, str]]:
    """Names and values: the base, what each stage was trained on and for how long, the tasks."""
    facts = [("base", recipe.model.base)]
    for name, stage in recipe.stages():
        data = [item.path if isinstance(item, Pairs) else item for item in stage.data]
        seconds = sum(record.get("machine", {}).get(SECONDS, 0) for record in _records(run, name))
        took = f", {timedelta(seconds=round(seconds))} hours" if seconds else ""
        facts.append((name, f"{_trained(run, name, stage.steps)}{took} on {', '.join(data)}"))
    begun = [one.benchmark for one in recipe.published() if (run / one.folder).is_dir()]
    return [*facts, ("scored on", ", ".join([*recipe.evaluate.tasks, *begun]) or "nothing")]


def _trained(run: Path, stage: str, steps: int) -> str:
    """How many steps of a stage were trained; a finished one has its adapter or whole encoder."""
    if any((run / stage / name).is_file() for name in ("adapter_config.json", "config.json")):
        return f"{steps:,} steps"
    last = max((record.get("step", 0) for record in _records(run, stage)), default=0)
    return f"{last:,} of {steps:,} steps so far"


def _records(run: Path, stage: str) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.jsonl, without one that was not written to its end."""
    file = run / stage / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _intervals(run: Path, column: compare.Comparison, samples: int) -> dict[str, Interval]:
    """The score of each stage, with its interval."""
    metric = column.metric.rpartition(".")[2]
    results = {stage: compare.read_result(run, stage, column.metric) for stage in column.scores}
    return {stage: interval(result, metric, samples) for stage, result in results.items()}


def _curves(run: Path, recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Name and figure of each stage that has logged a loss, in order."""
    for name, _ in recipe.stages():
        records = _records(run, name)
        if any(key in record for record in records for key in figures.LOSSES):
            yield name, figures.curves(name, records)


def _vectors(run: Path, recipe: Recipe, best: str | None, save: Save) -> dict[str, Any] | None:
    """Heatmaps, maps and searches before and after; None without texts or a finished model."""
    tasks = [*recipe.evaluate.tasks, *chain(*(anchor.tasks for anchor in recipe.published()))]
    sample = _find_sample(run, tasks)
    if sample is None or not (run / "model" / "config.json").is_file():
        return None
    name = f"before: {best.replace('_', ', ', 1).replace('_', ' ')}" if best else BEFORE
    before = _before(recipe, best)
    after = LLM2Vec.from_pretrained(run / "model", allow_partial=True)
    pairs = [*chain(*sample.pairs)]
    role = "document" if sample.queries else None  # as in searches, which use the same vectors
    sides: list[dict[str, Any]] = []
    for place, title, model in (("before", name, before), ("after", "after", after)):
        encode = encode_once(encode_by_role(model))
        sides.append({"name": title, "place": place})
        if pairs:
            unit = _unit(encode, pairs)
            sides[-1]["cosines"] = unit @ unit.T
        if len(sample.texts) >= FEWEST:
            points = _plane(_unit(encode, sample.texts, role))
            drawn = figures.text_map(title, points, sample.groups, place)
            sides[-1]["map"] = save(f"map-{place}", drawn)
        sides[-1]["found"] = searches.search(sample, encode) if sample.queries else []
    lowest = min(float(side["cosines"].min()) for side in sides) if pairs else 0.0
    for side in sides if pairs else ():
        heatmap = figures.heatmap(side["name"], side["cosines"], lowest)
        side["heatmap"] = save(f"heatmap-{side['place']}", heatmap)
    texts = zip(sample.groups, sample.texts, strict=True)
    found = [side["found"] for side in sides]
    return {
        "sample": sample,
        "sides": sides,
        "pairs": pairs,
        "texts": [f"{group}: {_short(text, 220)}" for group, text in texts],
        "colours": figures.group_colours(sample.groups),
        "examples": list(zip(sample.queries, *found, strict=False))[: searches.SHOWN],
        "shares": searches.shares(*found) if sample.queries else None,
    }


def _before(recipe: Recipe, best: str | None) -> TextEncoder:
    """The best causal baseline, or the encoder that the stages began with."""
    model, pools_all = recipe.model, recipe.model.include_instruction
    if best is not None:
        decoder = find_base(model.base, model.revision)
        return causal_encoder(decoder, best.removeprefix(CAUSAL), model.max_length)
    return LLM2Vec.from_pretrained(
        model.base,
        [*model.adapters],
        enable_bidirectional=model.bidirectional,
        pooling_mode=model.pooling,
        max_length=model.max_length,
        skip_instruction=None if pools_all is None else not pools_all,
        attn_implementation=model.attention,
        allow_partial=True,
        revision=model.revision,
        layers=model.layers,
    )


def _find_sample(run: Path, tasks: Sequence[str]) -> Sample | None:
    """A sample of the first task whose files exist and have texts to show."""
    for given in tasks:
        for path in (Path(given), run / "data" / Path(given).name):
            if path.exists():
                sample = draw_sample(load_task(path))
                if len(sample.texts) >= FEWEST or sample.queries or sample.pairs:
                    return sample
    return None


def _unit(encode: Encode, texts: Sequence[str], role: str | None = None) -> np.ndarray:
    """The unit vectors (N, D) of texts."""
    vectors = encoded(encode, texts, role)
    return np.asarray(vectors / norms(vectors)[:, None])


def _plane(unit: np.ndarray) -> np.ndarray:
    """A map (N, 2) of unit vectors (N, D), by t-SNE."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    near = min(30, max(2, len(unit) // 4))
    with threadpool_limits(1):  # its threads busy-wait: on a busy machine it would take minutes
        placed = TSNE(perplexity=near, init="pca", random_state=0).fit_transform(unit)
    return np.asarray(placed, dtype=np.float32)


def _short(text: str, length: int = 90) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 1].rstrip() + "…"
