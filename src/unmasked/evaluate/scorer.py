"""Makes a function that scores models on all tasks that a user has named.

A task is a path (`task_files`), ``words:PATH`` (`probe`), or a public name (`public`). Names and
files are checked before a model is loaded or trained. Cost: reading the files; mteb is imported
only for a name that is not a path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from unmasked.errors import DataError
from unmasked.evaluate.bootstrap import TaskResult
from unmasked.evaluate.tasks.task_files import load_task
from unmasked.evaluate.tasks.task_vectors import Encode, encode_once
from unmasked.evaluate.tasks.tested import WORDS, is_path

RESULTS = "mteb"  # the folder inside a run folder that holds results of public tasks

Scorer = Callable[[Any], list[TaskResult]]
_Score = Callable[[Any, Encode], TaskResult]


def encode_by_role(model: Any) -> Encode:
    """A `SentenceTransformer` as an `Encode` function that uses the prompt of each role."""
    methods = {"query": model.encode_query, "document": model.encode_document, None: model.encode}

    def encode(texts: Sequence[str], role: str | None) -> np.ndarray:
        return np.asarray(methods[role](list(texts), show_progress_bar=False), dtype=np.float32)

    return encode


def make_scorer(
    tasks: Iterable[Any], languages: Sequence[str] | None = None, results: str | Path = RESULTS
) -> Scorer:
    """Read tasks, and return a function that scores models on them.

    Args:
        tasks: paths, ``words:PATH``, and names of public tasks and benchmarks.
        languages: languages of the public tasks; all by default.
        results: the folder of mteb's results of public tasks.

    Raises:
        DataError: a file is missing or malformed, or two tasks have one name.
        MissingExtraError: a public task or a word task needs a package that is not installed.
    """
    read: dict[str, tuple[str, _Score]] = {}
    for given in map(str, tasks):
        for name, score in _read(given, languages, Path(results)):
            if name in read:
                both = f"{read[name][0]} and {given}"
                fix = "Fix: rename one, because scores are stored by name."
                raise DataError(f"two tasks are called '{name}': {both}. {fix}")
            read[name] = given, score

    warned: set[int | None] = set()  # the lengths for which truncated texts caused a warning

    def score_all(model: Any) -> list[TaskResult]:
        encode = encode_once(encode_by_role(model))  # shared by all tasks
        found = []
        with _one_warning(model, warned):
            for name, (_, score) in read.items():
                try:
                    found.append(score(model, encode))
                except DataError as error:
                    raise DataError(f"task {name}: {error}") from error
        return found

    return score_all


@contextmanager
def _one_warning(model: Any, warned: set[int | None]) -> Iterator[None]:
    """Let an encoder warn of truncated texts only if no other one of its length has."""
    from unmasked.forward.backbone import Backbone  # imports torch, which a command line need not

    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, Backbone):
        yield
        return
    backbone.warns_of_cuts = backbone.max_seq_length not in warned
    try:
        yield
    finally:
        backbone.warns_of_cuts = True
        if backbone.texts_cut:
            warned.add(backbone.max_seq_length)


def _read(given: str, languages: Sequence[str] | None, results: Path) -> list[tuple[str, _Score]]:
    """Name and scoring function of each task that a user has named: a benchmark has several."""
    if given.startswith(WORDS):
        from unmasked.evaluate.tasks.probe import load_probe

        probe = load_probe(given.removeprefix(WORDS))
        return [(probe.name, lambda model, _: probe.score(model))]
    if is_path(given):
        local = load_task(given)
        return [(local.name, lambda _, encode: local.score(encode))]
    from unmasked.evaluate.tasks.public import find_tasks, score_public

    def public(task: Any) -> _Score:
        return lambda model, _: score_public(task, model, results)

    return [(task.metadata.name, public(task)) for task in find_tasks(given, languages)]
