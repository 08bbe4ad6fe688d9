"""The texts of a task's test set, so that training data can be compared with them.

Cost: reading the files; for a public task, the download of its data.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from unmasked.evaluate.tasks import kinds
from unmasked.evaluate.tasks.task_files import load_task

WORDS = "words:"  # prefix of the path of a task on words
_FILE = re.compile(r"[/\\]|\.[a-z]+$")  # a name like this is a path, even if there is no such file
LEFT_OUT = {"id", "_id", "query-id", "corpus-id", "label", "labels", "lang", "language"}
"""Columns of public tasks that have no texts."""


def texts_of_task(task: str) -> list[str]:
    """The distinct texts of a task, without those that its classifiers are trained on.

    Args:
        task: a path, ``words:PATH``, or the name of a public task or benchmark.

    Raises:
        DataError: the task cannot be read, or the data of a public task cannot be loaded.
    """
    if task.startswith(WORDS):
        from unmasked.evaluate.tasks.probe import load_probe

        probe = load_probe(task.removeprefix(WORDS))
        return list(dict.fromkeys(" ".join(words) for words, _ in probe.test))
    if is_path(task):
        local = load_task(task)
        if isinstance(local, kinds.ClassificationTask):
            return list(dict.fromkeys(local.test_texts))
        return list(dict.fromkeys(text for texts in local.texts.values() for text in texts))
    from unmasked.evaluate.tasks.public import find_tasks, loading_data

    found = dict[str, None]()
    for public in find_tasks(task):
        with loading_data(public.metadata.name):
            public.load_data()
        splits = set(public.metadata.eval_splits)
        found.update(dict.fromkeys(_strings(public.dataset, splits)))
    return list(found)


def is_path(task: str) -> bool:
    """Whether the name of a task is a path, not a public name."""
    # `Path.exists` raises an error for a very long name on Python 3.11.
    return os.path.exists(task) or _FILE.search(task) is not None  # noqa: PTH110


def is_local(task: str) -> bool:
    """Whether the texts of a task are in local files; public tasks load theirs for scoring."""
    return task.startswith(WORDS) or is_path(task)


def _strings(data: Any, splits: Iterable[str]) -> Iterator[str]:
    """Every text in the test splits of a public task, whose data are nested mappings and tables."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        kept = set(data) & set(splits) or set(data) - LEFT_OUT - {"train", "validation"}
        for name in data:
            if name in kept and name != "relevant_docs":
                yield from _strings(data[name], splits)
    elif isinstance(data, Iterable):
        for item in data:
            yield from _strings(item, splits)
