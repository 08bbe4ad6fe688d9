"""Where the model runs; in this process, here. `cluster` has the other one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from unmasked.corpus.shards import Digest, Job, Stream, write_shard
from unmasked.errors import DataError
from unmasked.files.source import Row

if TYPE_CHECKING:
    from unmasked.compat.llm2vec import LLM2Vec

T = TypeVar("T")
Load = Callable[[], "LLM2Vec"]
Progress = Callable[[int, "int | None"], None]
"""Told how many rows are done, and how many tokens this process has encoded if that is known."""


class Engine(Protocol):
    """Where models run: in this process, or in many."""

    needs_counts: bool

    def ask(self, question: Callable[[LLM2Vec], T]) -> T:
        """The answer of a model."""

    def shards(
        self,
        job: Job,
        stream: Stream,
        wanted: Iterable[int],
        known: dict[int, str],
        progress: Progress,
    ) -> Iterator[dict[str, Any]]:
        """Write the shards that are wanted; their lines of the manifest.

        Args:
            job: what they are made of.
            stream: its rows, for an engine of this process.
            wanted: in rising order, perhaps beyond the end of the rows.
            known: those that are whole, with the digests of their texts.
            progress: told of the rows done here.
        """


class Local:
    """The engine of one process, with a model that is loaded when it is first needed."""

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
        self,
        job: Job,
        stream: Stream,
        wanted: Iterable[int],
        known: dict[int, str],
        progress: Progress,
    ) -> Iterator[dict[str, Any]]:
        before = 0
        told = with_tokens(self.model, progress)
        told(before)
        for shard in wanted:
            if shard in known and job.source.on_disk:
                continue
            rows = stream.take(shard * job.shard_rows, job.shard_rows)
            if shard in known:
                _check_same(job, shard, rows, known[shard])
                continue
            if not stream.reaches(shard * job.shard_rows):
                return
            entry = write_shard(job, self.model, shard, rows, partial(_beyond, told, before))
            before += entry["rows"] + len(entry["skipped"])
            yield entry


def _beyond(told: Callable[[int], None], before: int, seen: int) -> None:
    told(before + seen)


def _check_same(job: Job, shard: int, rows: Iterable[Row], known: str) -> None:
    """Refuse a stream that is not the one whose shards are in the folder."""
    digest = Digest()
    digest.add(rows)
    if digest.value() != known:
        first = shard * job.shard_rows
        raise DataError(
            f"{job.source.name}: rows {first} to {first + job.shard_rows - 1} are not those that "
            f"{job.path(shard)} was made of. Fix: give the same texts, or name another folder."
        )


def with_tokens(model: LLM2Vec, progress: Progress) -> Callable[[int], None]:
    """Tells of the model's tokens beside the rows, where it counts them."""
    return lambda rows: progress(rows, getattr(model, "tokens_encoded", None))
