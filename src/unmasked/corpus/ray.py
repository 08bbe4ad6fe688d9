"""Where models run: the engine of many processes, on Ray Data, with one model per actor.

Numbers of shards go out, and lines of the manifest come back; texts and vectors never cross the
cluster, because each actor writes its shards itself. So input and output must be on paths that every
node sees. ``RAY_ADDRESS`` names the cluster to join; without it one is started on this machine, on
the loopback interface and without a dashboard, and ended afterwards. Usage statistics are never sent.

Cost: each actor loads the model and reads on, from where it was, through the files its shards are
in. The last bits of a vector depend on the number of threads, as they do everywhere.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from unmasked import errors
from unmasked.corpus.local import Load, Progress
from unmasked.corpus.shards import CorpusJob, Stream, write_shard
from unmasked.errors import MissingExtraError, UnmaskedError

if TYPE_CHECKING:
    from unmasked.model import LLM2Vec

T = TypeVar("T")
_STORE = 128 << 20  # bytes of shared memory; only numbers and lines pass through it
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray reads this variable when it is imported; 0 keeps a local cluster on 127.0.0.1, as on macOS.

`ray.init(_node_ip_address="127.0.0.1")` does not: Ray replaces it by the address of the machine.
"""


class OnRay:
    """Encodes on a Ray cluster; use it as a context manager, which starts and ends a local one.

    Args:
        load: gives a model, in the actor that asks for it.
        workers: number of actors; 0 for one per GPU, or one where there is none.
        threads: CPU threads of each; by default the CPUs are divided among the workers.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    needs_counts = True

    def __init__(self, load: Load, workers: int = 0, threads: int | None = None) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        self._local = not os.environ.get("RAY_ADDRESS")
        if self._local:
            os.environ.setdefault(_LOOPBACK, "0")
        try:
            import ray.data
        except ImportError as error:
            raise MissingExtraError("ray", "corpus") from error
        self._ray = ray
        self._load, self._workers, self._threads = load, workers, threads

    def __enter__(self) -> OnRay:
        options: dict[str, Any] = {"logging_level": "warning", "log_to_driver": False}
        if self._local:
            local = {"include_dashboard": False, "object_store_memory": _STORE}
            options |= {"address": "local", **local}
        self._ray.init(**options)
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        resources = self._ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        self.workers = self._workers or gpus or 1
        self.threads = self._threads or max(1, int(resources.get("CPU", 1)) // self.workers)
        # Workers that are more than the GPUs share them.
        share = min(1.0, gpus / self.workers)
        self._resources = {"num_cpus": self.threads, "num_gpus": share}
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def ask(self, question: Callable[[LLM2Vec], T]) -> T:
        remote = self._ray.remote(**self._resources, max_retries=0)(_answer)
        answer = self._ray.get(remote.remote(self._load, question, self.threads))
        if isinstance(answer, _Refusal):
            raise answer.error()
        result: T = answer
        return result

    def shards(
        self, job: CorpusJob, stream: Stream, todo: Iterable[int], progress: Progress
    ) -> Iterator[dict[str, Any]]:
        numbers = [{"shard": shard} for shard in todo]
        if not numbers:
            return
        context = self._ray.data.DataContext.get_current()
        bars, context.enable_progress_bars = context.enable_progress_bars, False
        try:
            lines = self._ray.data.from_items(
                numbers, override_num_blocks=len(numbers)
            ).map_batches(
                _Actor,
                batch_size=1,
                compute=self._ray.data.ActorPoolStrategy(size=min(self.workers, len(numbers))),
                fn_constructor_args=(self._load, _absolute(job), self.threads),
                **self._resources,
            )
            rows = tokens = 0
            for answer in lines.iter_rows():
                said = json.loads(answer["line"])
                if "kind" in said:
                    raise _Refusal(**said).error()
                rows += said["rows"] + len(said["skipped"])
                tokens += answer["tokens"]
                progress(rows, tokens or None)
                yield said
        finally:
            context.enable_progress_bars = bars


class _Actor:
    """A model, and where it is in the source."""

    def __init__(self, load: Load, job: CorpusJob, threads: int) -> None:
        self.job, self.stream = job, Stream(job.source, job.counts)
        self.model = _answer(load, lambda model: model, threads)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """The line of one shard, and the tokens in it."""
        model, shard, tokens = self.model, int(batch["shard"][0]), 0
        rows = self.stream.take(shard * self.job.shards.rows, self.job.shards.rows)
        said: dict[str, Any] | _Refusal
        if isinstance(model, _Refusal):
            said = model
        else:
            before = model.tokens_encoded
            said = _told(lambda: write_shard(self.job, model, shard, rows, lambda seen: None))
            tokens = model.tokens_encoded - before
        line = json.dumps(said._asdict() if isinstance(said, _Refusal) else said)
        return {"line": [line], "tokens": [tokens]}


class _Refusal(NamedTuple):
    """An error that the user can correct, on its way back: Ray would wrap it in one of its own."""

    kind: str
    message: str

    def error(self) -> UnmaskedError:
        kinds = {"DataError": errors.DataError, "OutputError": errors.OutputError}
        return kinds.get(self.kind, errors.ModelError)(self.message)


def _told(work: Callable[[], T]) -> T | _Refusal:
    try:
        return work()
    except UnmaskedError as error:
        return _Refusal(type(error).__name__, str(error))


def _answer(load: Load, question: Callable[[LLM2Vec], T], threads: int) -> T | _Refusal:
    import torch

    torch.set_num_threads(threads)
    return _told(lambda: question(load()))


def _absolute(job: CorpusJob) -> CorpusJob:
    """The job with whole paths: actors have their own working directories."""
    source = job.source
    if source.on_disk:
        source = replace(source, path=str(Path(source.path).resolve()))
    return replace(job, source=source, folder=job.folder.resolve())
