"""The engine that runs the model in this process; `ray` has the one for many processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from unmasked.corpus.shards import CorpusJob, Stream, write_shard

if TYPE_CHECKING:
    from unmasked.model import TextEncoder

T = TypeVar("T")
Load = Callable[[], "TextEncoder"]
Progress = Callable[[int, "int | None"], None]
"""Called with the number of rows done and the number of tokens encoded, if that is known."""


class Local:
    """The engine of one process; the model is loaded when it is first needed.

    Attributes:
        needs_counts: whether the engine reads rows in other processes and in any order, so that the
            rows of every file must be counted beforehand.
    """

    needs_counts = False

    def __init__(self, load: Load) -> None:
        self._load = cache(load)

    def ask(self, question: Callable[[TextEncoder], T]) -> T:
        """Call `question` with the model, in the process that has it, and return the result."""
        return question(self._load())

    def shards(
        self, job: CorpusJob, stream: Stream, todo: Iterable[int], progress: Progress
    ) -> Iterator[dict[str, Any]]:
        """Write the shards `todo`, in rising order, and yield the manifest entry of each."""
        model, done = self._load(), 0

        def report(seen: int) -> None:
            progress(done + seen, model.tokens_encoded)

        report(0)
        for shard in todo:
            entry = write_shard(job, model, shard, stream, report)
            done += entry.get("documents", entry["rows"]) + len(entry["skipped"])
            yield entry
