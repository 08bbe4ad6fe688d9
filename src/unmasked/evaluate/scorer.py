"""From what a user names as tasks to a function that scores any model on all of them.

A task is a path (see `files`), ``words:PATH`` (see `probe`), or a public name (see `public`).
Names and files are checked before any model is loaded or trained.

Cost: reading the files; mteb is imported only for a name that is no path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unmasked.errors import DataError
from unmasked.evaluate.bootstrap import TaskResult
from unmasked.evaluate.tasks.files import load_task
from unmasked.evaluate.tasks.kinds import evaluate
from unmasked.evaluate.tasks.vectors import Encode, encode_once

WORDS = "words:"
RESULTS = "mteb"
"""The folder below a run's where results of public tasks lie."""
_FILE = re.compile(r"[/\\]|\.[a-z]+$")  # what looks like a path is one, even if it is not there

Score = Callable[[Any], list[TaskResult]]


def encode_by_role(model: Any) -> Encode:
    """A `SentenceTransformer` as tasks call it: each role behind its own prompt."""
    methods = {"query": model.encode_query, "document": model.encode_document, None: model.encode}

    def encode(texts: Sequence[str], role: str | None) -> np.ndarray:
        return np.asarray(methods[role](list(texts), show_progress_bar=False), dtype=np.float32)

    return encode


def make_scorer(
    tasks: Sequence[str | Path],
    languages: Sequence[str] | None = None,
    results: str | Path = RESULTS,
) -> Score:
    """Reads tasks now, so that a fault in them is known before any training; scores models later.

    Args:
        tasks: paths, ``words:PATH``, and names of public tasks and benchmarks.
        languages: of the public tasks; all by default.
        results: where mteb's results of public tasks are kept.

    Raises:
        DataError: a file is missing or malformed, or two tasks have one name.
        MissingExtraError: a public task or a word task needs a package that is not there.
    """
    makers: list[tuple[str, str, Callable[[Any, Encode], TaskResult]]] = []
    for given in map(str, tasks):
        makers += [(name, given, score) for name, score in _read(given, languages, Path(results))]
    seen: dict[str, str] = {}
    for name, given, _ in makers:
        if name in seen:
            raise DataError(
                f"two tasks are called '{name}': {seen[name]} and {given}. "
                "Fix: rename one, scores are kept by name."
            )
        seen[name] = given

    def score(model: Any) -> list[TaskResult]:
        encode = encode_once(encode_by_role(model))  # shared: a text is encoded once for all tasks
        return [of_task(model, encode) for _, _, of_task in makers]

    return score


def _read(
    given: str, languages: Sequence[str] | None, results: Path
) -> list[tuple[str, Callable[[Any, Encode], TaskResult]]]:
    """Name and scoring function of each task behind what was given."""
    if given.startswith(WORDS):
        from unmasked.evaluate.tasks.probe import load_probe

        probe = load_probe(given.removeprefix(WORDS))
        return [(probe.name, lambda model, _: probe.score(model))]
    if Path(given).exists() or _FILE.search(given):
        local = load_task(given)
        return [(local.name, lambda _, encode: evaluate([local], encode)[0])]
    from unmasked.evaluate.tasks.public import find_tasks, score_public

    def public(task: Any) -> Callable[[Any, Encode], TaskResult]:
        return lambda model, _: score_public(task, model, results)

    return [(task.metadata.name, public(task)) for task in find_tasks(given, languages)]
