"""Where models run: the engine of many processes, on Ray Data, with one model per actor.

Numbers of shards go out, and lines of the manifest come back; texts and vectors never cross the
cluster, because each actor writes its shards itself. So input and output must be on paths that
every node sees. ``RAY_ADDRESS`` names the cluster to join; without it one is started on this
machine, on the loopback interface and without a dashboard, and ended afterwards. Usage statistics
are never sent.

Cost: each actor loads the model and reads on, from where it was, through the files its shards are
in. The last bits of a vector depend on the number of threads, as they do everywhere.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from unmasked import errors
from unmasked.corpus.local import Load, Progress
from unmasked.corpus.shards import CorpusJob, Stream, write_shard
from unmasked.errors import MissingExtraError, UnmaskedError

if TYPE_CHECKING:
    from unmasked.model import TextEncoder

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

    def ask(self, question: Callable[[TextEncoder], T]) -> T:
        """What `question` returns for a model, asked where that model is."""
        remote = self._ray.remote(**self._resources, max_retries=0)(_ask)
        answer: T = _answer(self._ray.get(remote.remote(self._load, question, self.threads)))
        return answer

    def shards(
        self, job: CorpusJob, stream: Stream, todo: Iterable[int], progress: Progress
    ) -> Iterator[dict[str, Any]]:
        """Write the shards `todo`, in any order; gives the line of the manifest for each."""
        numbers = [{"shard": shard} for shard in todo]
        if not numbers:
            return
        # Actors have other working directories.
        job = replace(job, source=job.source.absolute(), folder=job.folder.resolve())
        context = self._ray.data.DataContext.get_current()
        bars, context.enable_progress_bars = context.enable_progress_bars, False
        try:
            blocks = self._ray.data.from_items(numbers, override_num_blocks=len(numbers))
            answers = blocks.map_batches(
                _Actor,
                batch_size=1,
                compute=self._ray.data.ActorPoolStrategy(size=min(self.workers, len(numbers))),
                fn_constructor_args=(self._load, job, stream.counts, self.threads),
                **self._resources,
            )
            rows = tokens = 0
            for said in answers.iter_rows():
                entry, more = _answer(json.loads(said["json"]))
                rows += entry.get("documents", entry["rows"]) + len(entry["skipped"])
                tokens += more
                progress(rows, tokens or None)
                yield entry
        finally:
            context.enable_progress_bars = bars


class _Actor:
    """A model, and where it is in the source."""

    def __init__(self, load: Load, job: CorpusJob, counts: list[int], threads: int) -> None:
        self.load, self.threads = cache(load), threads
        self.job, self.stream = job, Stream(job.source, counts)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """The line of one shard and the number of tokens in it, as JSON."""
        write = partial(self._write, shard=int(batch["shard"][0]))
        return {"json": [json.dumps(_ask(self.load, write, self.threads))]}

    def _write(self, model: TextEncoder, shard: int) -> tuple[dict[str, Any], int]:
        before = model.tokens_encoded
        entry = write_shard(self.job, model, shard, self.stream, lambda seen: None)
        return entry, model.tokens_encoded - before


def _ask(load: Load, question: Callable[[TextEncoder], object], threads: int) -> dict[str, object]:
    """A model's answer, or an error that the user can correct: Ray would wrap it in its own."""
    import torch

    torch.set_num_threads(threads)
    try:
        return {"answer": question(load())}
    except UnmaskedError as error:
        return {"error": type(error).__name__, "message": str(error)}


def _answer(said: dict[str, Any]) -> Any:
    if "error" in said:
        kinds = {"DataError": errors.DataError, "OutputError": errors.OutputError}
        raise kinds.get(said["error"], errors.ModelError)(said["message"])
    return said["answer"]
