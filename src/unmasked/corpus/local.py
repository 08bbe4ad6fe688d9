"""Where models run: the engine of this process. `ray` holds the one of many processes."""

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
"""Is told how many rows are done, and how many tokens were encoded if that is known."""


class Local:
    """The engine of one process, whose model is loaded when it is first needed.

    Attributes:
        needs_counts: whether an engine reads the rows elsewhere and in any order, so that those of
            every file have to be counted beforehand.
    """

    needs_counts = False

    def __init__(self, load: Load) -> None:
        self._load = cache(load)

    def ask(self, question: Callable[[TextEncoder], T]) -> T:
        """What `question` returns for a model, asked where that model is."""
        return question(self._load())

    def shards(
        self, job: CorpusJob, stream: Stream, todo: Iterable[int], progress: Progress
    ) -> Iterator[dict[str, Any]]:
        """Write the shards `todo`, in rising order; gives the line of the manifest for each."""
        model, done = self._load(), 0

        def told(seen: int) -> None:
            progress(done + seen, model.tokens_encoded)

        told(0)
        for shard in todo:
            entry = write_shard(job, model, shard, stream, told)
            done += entry.get("documents", entry["rows"]) + len(entry["skipped"])
            yield entry
