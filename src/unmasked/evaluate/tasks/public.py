"""Public tasks and benchmarks by their mteb name, with the instructions that LLM2Vec published.

mteb runs them. Its result files stay in the given folder, one per task, under a fingerprint of the
weights: an interrupted evaluation continues, and another model never inherits a score.

Instructions are those of the paper's evaluation (arXiv 2404.05961, appendix; instructions.json),
passed as ``[instruction, text]``, so that they are joined as in training. The file also pins those
of Korean tasks, for which the paper has none: mteb's instruction for the task or, if there is none,
for its type. Other tasks have mteb's own instruction; documents have none. mteb's
`InstructSentenceTransformerModel` would load the model again and pass instructions as prompts.

Cost: importing mteb (seconds), the download of each task's data, and encoding all of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
"""Task name → instruction: first the paper's, then mteb's of Korean tasks."""
PART, AND = ":", "+"  # separate a benchmark from some of its tasks: ``MTEB(eng, v1):STS12+SciFact``
_VARIANT = re.compile(r"(HardNegatives|Retrieval|Summarization)?(\.v\d+)?$")


def find_instruction(name: str, own: str = "") -> str:
    """The instruction before the texts of a task, ending in a colon; empty if there is none.

    Args:
        name: mteb's name; a later variant (``.v2``, ``HardNegatives``) has the instruction of the
            original task.
        own: mteb's instruction, for a task that the paper did not evaluate on.
    """
    known = INSTRUCTIONS.get(name) or INSTRUCTIONS.get(_VARIANT.sub("", name))
    return known or (f"{own.rstrip('.:')}:" if own else "")


def find_tasks(name: str, languages: Sequence[str] | None = None) -> list[Any]:
    """All or some tasks of a public benchmark, or a single task.

    Args:
        name: a benchmark (``MTEB(eng, v2)``), a task in all its languages (``STS17``), or some
            tasks of a benchmark, as it defines them (``MTEB(eng, v1):STS17+SciFact``).
        languages: keep only these (ISO 639-3, such as ``eng``); by default all.

    Raises:
        DataError: there is no such name, or none of the tasks is in these languages.
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
            f"{name}: none of its tasks is in {', '.join(languages)}. "
            "Fix: languages are ISO 639-3 codes, such as eng, kor, deu."
        )
    return [task.filter_languages(list(languages)) for task in kept]


def _some(benchmark: str, tasks: Sequence[Any], part: str) -> list[Any]:
    """The tasks of a benchmark that `part` names, in that order; all if it is empty."""
    by_name = {task.metadata.name: task for task in tasks}
    names = [one.strip() for one in part.split(AND)] if part else list(by_name)
    for one in names:
        if one not in by_name:
            raise DataError(f"{benchmark}: {unknown('task', one, by_name)}")
    return [by_name[one] for one in names]


def score_public(task: Any, model: Any, folder: str | Path) -> TaskResult:
    """Score a model on a public task, or read the score if the folder has it.

    Args:
        folder: the folder of mteb's results: ``results/OWNER__NAME/FINGERPRINT/TASK.json``.

    Returns:
        mteb's main score, averaged over its splits and languages, without items.

    Raises:
        DataError: the data cannot be loaded, or a vector is not finite.
    """
    name = task.metadata.name
    with loading_data(name):
        found = mteb.evaluate(
            Instructed(model),
            task,
            cache=mteb.ResultCache(Path(folder)),
            overwrite_strategy="only-missing",
            show_progress_bar=False,
            co2_tracker=False,
        )
    return TaskResult(name, {task.metadata.main_score: float(found[0].get_score())}, {})


@contextmanager
def loading_data(task: str) -> Iterator[None]:
    """Turn an `OSError` in the block, in which mteb loads a task's data, into a `DataError`."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"mteb task {task}: its data cannot be loaded ({first_line(error)[:200]}). Fix: "
            "connect to the network, or use a machine whose Hugging Face cache has the data."
        ) from error


def public_name(model: str) -> str:
    """The name of a model in mteb's results, always ``OWNER/NAME``.

    It is the name on the hub; for a folder, its parent's name and its own, as the models of all
    runs are called ``model``; ``unmasked/nano`` for the bundled decoder.
    """
    if model == BUNDLED:
        return f"unmasked/{BUNDLED}"
    parts = Path(model).resolve().parts[-2:] if Path(model).is_dir() else model.split("/")[-2:]
    named = [re.sub(r"[^\w.-]+", "-", part).strip("-") for part in parts]
    return "/".join(["unmasked", *filter(None, named)][-2:])


class Instructed(AbsEncoder):  # type: ignore[misc]
    """A `TextEncoder` with mteb's interface, which gives every text its task's instruction."""

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
