"""Public tasks and benchmarks by their mteb name, each with the published instruction of LLM2Vec.

mteb runs them, and its result files stay in the given folder, one per task, under a fingerprint of
the weights: an interrupted run goes on, and another model never inherits a score.

Instructions: those the paper evaluated with (arXiv 2404.05961, appendix; instructions.json), given
as ``[instruction, text]``, so that they are joined as the model was trained. The file also pins
those of Korean tasks, which the paper has none for: what mteb publishes for the task or, where it
has nothing for that task alone, for its type. Other tasks have mteb's own; documents have none.
mteb's `InstructSentenceTransformerModel` would load the model anew and pass them as prompts.

Cost: importing mteb (seconds), the download of each task's data, and encoding all of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from unmasked.checkpoint.location import BUNDLED
from unmasked.compat.origin import training_data
from unmasked.errors import DataError, MissingExtraError, first_line, nearest, unknown
from unmasked.evaluate.bootstrap import TaskResult
from unmasked.evaluate.tasks.task_vectors import finite

try:
    import mteb
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
except ImportError as error:
    raise MissingExtraError("mteb", "eval") from error

INSTRUCTIONS: dict[str, str] = json.loads(
    (files("unmasked.evaluate.tasks") / "instructions.json").read_text(encoding="utf-8")
)
"""Task name → instruction: the paper's, and below them mteb's of Korean tasks."""
PART, AND = ":", "+"
"""Between a benchmark and some of its tasks: ``MTEB(eng, v1):STS12+SciFact``."""
_VARIANT = re.compile(r"(HardNegatives|Retrieval|Summarization)?(\.v\d+)?$")


def find_instruction(name: str, own: str = "") -> str:
    """The instruction put before the texts of a task, with a colon; empty if there is none.

    Args:
        name: mteb's name; a later variant (``.v2``, ``HardNegatives``) has that of the first.
        own: mteb's instruction, for a task that the paper did not evaluate on.
    """
    known = INSTRUCTIONS.get(name) or INSTRUCTIONS.get(_VARIANT.sub("", name))
    return known or (f"{own.rstrip('.:')}:" if own else "")


def find_tasks(name: str, languages: Sequence[str] | None = None) -> list[Any]:
    """The tasks of a public benchmark, some of them, or the one task of that name.

    Args:
        name: of a benchmark (``MTEB(eng, v2)``), of a task in all its languages (``STS17``), or of
            some tasks of a benchmark, as they are in it (``MTEB(eng, v1):STS17+SciFact``).
        languages: keep only these (ISO 639-3, such as ``eng``); by default all.

    Raises:
        DataError: there is no such name, or nothing of it is in these languages.
    """
    benchmarks = {benchmark.name: benchmark for benchmark in mteb.get_benchmarks()}
    whole, _, part = name.partition(PART)
    try:
        if whole in benchmarks:
            tasks = _some(whole, benchmarks[whole].tasks, part)
        else:
            tasks = [mteb.get_task(name)]
    except KeyError as error:
        known = [*benchmarks, *(task.metadata.name for task in mteb.get_tasks())]
        raise DataError(
            f"{name}: no such file or folder, and mteb has no task or benchmark of that name"
            f"{nearest(name, known)} Fix: check the path or the name."
        ) from error
    if not languages:
        return list(tasks)
    wanted = {language.partition("-")[0] for language in languages}
    kept = [task for task in tasks if wanted & set(task.metadata.languages)]
    if not kept:
        raise DataError(
            f"{name}: nothing of it is in {', '.join(languages)}. "
            "Fix: languages are ISO 639-3 codes, such as eng, kor, deu."
        )
    return [task.filter_languages(list(languages)) for task in kept]


def _some(benchmark: str, tasks: Sequence[Any], part: str) -> list[Any]:
    """The tasks of a benchmark that are named in `part`, in that order; all if it is empty."""
    by_name = {task.metadata.name: task for task in tasks}
    names = [one.strip() for one in part.split(AND)] if part else list(by_name)
    for one in names:
        if one not in by_name:
            raise DataError(f"{benchmark}: {unknown('task', one, by_name)}")
    return [by_name[one] for one in names]


def score_public(task: Any, model: Any, folder: str | Path) -> TaskResult:
    """Score a model on a public task, or read the score that lies in the folder.

    Args:
        task: as `find_tasks` returns them.
        model: a `TextEncoder`.
        folder: where mteb's results are kept: ``results/OWNER__NAME/FINGERPRINT/TASK.json``.

    Returns:
        mteb's main score, averaged over its splits and languages; no items, so no interval.

    Raises:
        DataError: the data cannot be loaded, or a vector is not finite.
    """
    name = task.metadata.name
    try:
        found = mteb.evaluate(
            Instructed(model),
            task,
            cache=mteb.ResultCache(Path(folder)),
            overwrite_strategy="only-missing",
            show_progress_bar=False,
            co2_tracker=False,
        )
    except OSError as error:
        raise DataError(
            f"mteb task {name}: its data cannot be loaded ({first_line(error)[:200]}). Fix: "
            "connect to the network, or use a machine whose Hugging Face cache has the data."
        ) from error
    return TaskResult(name, {task.metadata.main_score: float(found[0].get_score())}, {})


def public_name(model: str) -> str:
    """What mteb calls a model, always ``OWNER/NAME``.

    That is its name on the hub; for a folder, its own name behind that of the one it is in, as the
    models of all runs are called ``model``; ``unmasked/nano`` for the bundled decoder.

    Args:
        model: hub name, folder, or ``nano``.
    """
    if model == BUNDLED:
        return f"unmasked/{BUNDLED}"
    parts = Path(model).resolve().parts[-2:] if Path(model).is_dir() else model.split("/")[-2:]
    named = [re.sub(r"[^\w.-]+", "-", part).strip("-") for part in parts]
    return "/".join(["unmasked", *filter(None, named)][-2:])


class Instructed(AbsEncoder):  # type: ignore[misc]
    """A `TextEncoder` as mteb calls it, every text behind its task's instruction."""

    def __init__(self, model: Any) -> None:
        self.model = model
        name = public_name(str(model.base_name))
        facts: dict[str, Any] = {"name": name, "revision": model.fingerprint()[:12]}
        if data := training_data(str(getattr(model, "base_name", "") or "nano")):
            facts["training_datasets"] = set(data)
        self.mteb_model_meta = ModelMeta.create_empty(overwrites=facts)

    def encode(
        self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any
    ) -> np.ndarray:
        texts = [text for batch in inputs for text in batch["text"]]
        role, instruction = prompt_type and prompt_type.value, ""
        if role != "document":
            own = self.get_instruction(task_metadata, prompt_type)
            instruction = find_instruction(task_metadata.name, own)
        given: list[Any] = [[instruction, text] for text in texts] if instruction else texts
        vectors = self.model.encode(given, show_progress_bar=False)
        return finite(np.asarray(vectors, dtype=np.float32), texts, role)
