"""The engine of many processes: Ray Data, one model an actor, every shard written where it is made.

Numbers of shards go out, lines of the manifest come back; texts and vectors never cross the
cluster. So input and output have to be on paths that every node sees. ``RAY_ADDRESS`` says which
cluster to join; without it one is started on this machine, on the loopback interface, without
dashboard, and ended afterwards. Usage statistics are never sent.

Cost: each actor loads the model, and reads on from where it was through the files its shards are
in. A vector's last bits depend on the number of threads, as they do everywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from unmasked import errors
from unmasked.corpus.engines import Load, Progress
from unmasked.corpus.shards import Job, Stream, write_shard
from unmasked.errors import MissingExtraError, UnmaskedError

if TYPE_CHECKING:
    from unmasked.compat.llm2vec import LLM2Vec

T = TypeVar("T")
_STORE = 128 << 20  # bytes of shared memory; only numbers and lines pass through it


class OnRay:
    """Encodes on a Ray cluster; use as a context manager, which starts and ends a local one.

    Args:
        load: gives a model, in the actor that asks for it.
        workers: actors; 0 for one a GPU, or one where there is none.
        threads: CPU threads of each; by default the CPUs are divided among the workers.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    needs_counts = True

    def __init__(self, load: Load, workers: int = 0, threads: int | None = None) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            import ray.data
        except ImportError as error:
            raise MissingExtraError("ray", "corpus") from error
        self._ray = ray
        self._load, self._workers, self._threads = load, workers, threads

    def __enter__(self) -> OnRay:
        address = os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"logging_level": "warning", "log_to_driver": False}
        if not address:
            options |= {
                "address": "local",
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
                "object_store_memory": _STORE,
            }
        self._ray.init(**options)
        resources = self._ray.cluster_resources()
        self.gpus = int(resources.get("GPU", 0))
        self.workers = self._workers or self.gpus or 1
        self.threads = self._threads or max(1, int(resources.get("CPU", 1)) // self.workers)
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def _resources(self) -> dict[str, float]:
        # Fewer GPUs than workers: they share them.
        share = min(1.0, self.gpus / self.workers)
        return {"num_cpus": self.threads, "num_gpus": share}

    def ask(self, question: Callable[[LLM2Vec], T]) -> T:
        remote = self._ray.remote(**self._resources(), max_retries=0)(_answer)
        answer = self._ray.get(remote.remote(self._load, question, self.threads))
        if isinstance(answer, _Refusal):
            raise answer.error()
        result: T = answer
        return result

    def shards(
        self,
        job: Job,
        stream: Stream,
        wanted: Iterable[int],
        known: dict[int, str],
        progress: Progress,
    ) -> Iterator[dict[str, Any]]:
        missing = [shard for shard in wanted if shard not in known]
        if not missing:
            return
        with _quiet_data(self._ray):
            numbers = self._ray.data.from_items(
                [{"shard": shard} for shard in missing], override_num_blocks=len(missing)
            )
            lines = numbers.map_batches(
                _Worker,
                batch_size=1,
                compute=self._ray.data.ActorPoolStrategy(size=min(self.workers, len(missing))),
                fn_constructor_args=(self._load, _absolute(job), self.threads),
                **self._resources(),
            )
            rows = tokens = 0
            for answer in lines.iter_rows():
                said = json.loads(answer["line"])
                if "kind" in said:
                    raise _Refusal(said["kind"], said["message"]).error()
                rows += said["rows"] + len(said["skipped"])
                tokens += answer["tokens"]
                progress(rows, tokens or None)
                yield said


class _Worker:
    """An actor: a model, and where it is in the source."""

    def __init__(self, load: Load, job: Job, threads: int) -> None:
        self.job, self.stream = job, Stream(job.source, job.counts)
        self.model: LLM2Vec | _Refusal = _loaded(load, threads)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """The line of one shard, and the tokens in it."""
        shard = int(batch["shard"][0])
        if isinstance(self.model, _Refusal):
            return {"line": [json.dumps(vars(self.model))], "tokens": [0]}
        before = getattr(self.model, "tokens_encoded", 0)
        rows = self.stream.take(shard * self.job.shard_rows, self.job.shard_rows)
        try:
            said = write_shard(self.job, self.model, shard, rows, lambda seen: None)
        except UnmaskedError as error:
            said = vars(_Refusal.of(error))
        tokens = getattr(self.model, "tokens_encoded", 0) - before
        return {"line": [json.dumps(said)], "tokens": [tokens]}


class _Refusal:
    """What the user can mend, on its way back: Ray would wrap the error in its own."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind, self.message = kind, message

    @classmethod
    def of(cls, error: UnmaskedError) -> _Refusal:
        return cls(type(error).__name__, str(error))

    def error(self) -> UnmaskedError:
        kinds = {"DataError": errors.DataError, "OutputError": errors.OutputError}
        return kinds.get(self.kind, errors.ModelError)(self.message)


def _loaded(load: Load, threads: int) -> LLM2Vec | _Refusal:
    import torch

    torch.set_num_threads(threads)
    try:
        return load()
    except UnmaskedError as error:
        return _Refusal.of(error)


def _answer(load: Load, question: Callable[[LLM2Vec], T], threads: int) -> T | _Refusal:
    model = _loaded(load, threads)
    if isinstance(model, _Refusal):
        return model
    try:
        return question(model)
    except UnmaskedError as error:
        return _Refusal.of(error)


def _absolute(job: Job) -> Job:
    """Workers have their own working directories."""
    source = job.source
    if source.on_disk:
        source = replace(source, path=str(Path(source.path).resolve()))
    return replace(job, source=source, folder=job.folder.resolve())


@contextmanager
def _quiet_data(ray: Any) -> Iterator[None]:
    import logging

    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        yield
    finally:
        context.enable_progress_bars = before
