"""Where models run: the engine of this process. `ray` has the one of many processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from unmasked.corpus.shards import CorpusJob, Stream, write_shard

if TYPE_CHECKING:
    from unmasked.model import LLM2Vec

T = TypeVar("T")
Load = Callable[[], "LLM2Vec"]
Progress = Callable[[int, "int | None"], None]
"""Is told how many rows are done, and how many tokens were encoded if that is known."""


class CorpusEngine(Protocol):
    """Where models run and write shards.

    Attributes:
        needs_counts: whether any shard may be written first, so that the rows of every file have
            to be counted beforehand.
    """

    needs_counts: bool

    def ask(self, question: Callable[[LLM2Vec], T]) -> T:
        """What `question` returns for a model, where that model is."""

    def shards(
        self, job: CorpusJob, stream: Stream, todo: Iterable[int], progress: Progress
    ) -> Iterator[dict[str, Any]]:
        """Write shards, and give the line of the manifest for each.

        Args:
            job: what they are made of.
            stream: the rows, for an engine that reads them in this process.
            todo: numbers of the shards, in rising order.
            progress: is told of the rows done so far.
        """


class Local:
    """The engine of one process, whose model is loaded when it is first needed."""

    needs_counts = False

    def __init__(self, load: Load) -> None:
        self._load = load
        self._model: LLM2Vec | None = None

    @property
    def model(self) -> LLM2Vec:
        """The model, loaded once."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def ask(self, question: Callable[[LLM2Vec], T]) -> T:
        return question(self.model)

    def shards(
        self, job: CorpusJob, stream: Stream, todo: Iterable[int], progress: Progress
    ) -> Iterator[dict[str, Any]]:
        model, done = self.model, 0

        def told(seen: int) -> None:
            progress(done + seen, model.tokens_encoded)

        told(0)
        for shard in todo:
            rows = stream.take(shard * job.shards.rows, job.shards.rows)
            entry = write_shard(job, model, shard, rows, told)
            done += entry["rows"] + len(entry["skipped"])
            yield entry
