"""The engine that runs models in many processes: Ray Data, with one model per actor.

The numbers of shards are sent out, and their manifest entries come back. Texts and vectors never
pass through the cluster, because each actor writes its shards itself, so input and output must be
on paths that every node can reach. ``RAY_ADDRESS`` names the cluster to join; without it, one is
started on this machine, on the loopback interface and without a dashboard, and ended afterwards.
Usage statistics are never sent.

Cost: each actor loads the model once, and reads forward through the files of its shards. The last
bits of a vector depend on the number of threads, as they do in one process.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
_STORE = 128 << 20  # bytes of shared memory; only numbers and manifest entries pass through it
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray reads this variable when it is imported; 0 keeps a local cluster on 127.0.0.1, as on macOS.

`ray.init(_node_ip_address="127.0.0.1")` has no such effect: Ray replaces it with the machine's
address.
"""


class OnRay:
    """Encodes on a Ray cluster; a context manager, which starts and ends a local cluster.

    Args:
        load: loads the model, in the actor.
        workers: number of actors; 0 for one per GPU, or one if there is no GPU.
        threads: CPU threads per actor; by default the CPUs are divided among the actors.

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
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self.workers = self._workers or sum(int(node.get("GPU", 0)) for node in nodes) or 1
        threads, share = share_of_worker(nodes, self.workers)
        self.threads = self._threads or threads
        self._resources = {"num_cpus": self.threads, "num_gpus": share}
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def ask(self, question: Callable[[TextEncoder], T]) -> T:
        """Call `question` with a model, in a process of the cluster, and return the result."""
        remote = self._ray.remote(**self._resources, max_retries=0)(_ask)
        answer: T = _answer(self._ray.get(remote.remote(self._load, question, self.threads)))
        return answer

    def shards(
        self, job: CorpusJob, stream: Stream, todo: Iterable[int], progress: Progress
    ) -> Iterator[dict[str, Any]]:
        """Write the shards `todo`, in any order, and yield the manifest entry of each."""
        numbers = [{"shard": shard} for shard in todo]
        if not numbers:
            return
        # Actors have another working directory.
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
            for row in answers.iter_rows():
                entry, more = _answer(json.loads(row["json"]))
                rows += entry.get("documents", entry["rows"]) + len(entry["skipped"])
                tokens += more
                progress(rows, tokens or None)
                yield entry
        finally:
            context.enable_progress_bars = bars


def share_of_worker(nodes: Sequence[Mapping[str, float]], workers: int) -> tuple[int, float]:
    """CPU threads and part of a GPU per worker, such that all workers can run at once.

    Ray starts an actor only where one node has all its CPUs, and one GPU has all its part.
    """
    cpus, gpus = ([int(node.get(kind, 0)) for node in nodes] for kind in ("CPU", "GPU"))
    per_gpu = -(-workers // sum(gpus)) if any(gpus) else 0
    for threads in range(max(cpus), 1, -1):
        fitting = [cpu // threads for cpu in cpus]
        if per_gpu:
            fitting = [min(n, gpu * per_gpu) for n, gpu in zip(fitting, gpus, strict=True)]
        if sum(fitting) >= workers:
            return threads, 1 / per_gpu if per_gpu else 0
    return 1, 1 / per_gpu if per_gpu else 0


class _Actor:
    """The process of a worker: a model, and a position in the source."""

    def __init__(self, load: Load, job: CorpusJob, counts: list[int], threads: int) -> None:
        self.load, self.threads = cache(load), threads
        self.job, self.stream = job, Stream(job.source, counts)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Write one shard; returns its manifest entry and its number of tokens, as JSON."""
        write = partial(self._write, shard=int(batch["shard"][0]))
        return {"json": [json.dumps(_ask(self.load, write, self.threads))]}

    def _write(self, model: TextEncoder, shard: int) -> tuple[dict[str, Any], int]:
        before = model.tokens_encoded
        entry = write_shard(self.job, model, shard, self.stream, lambda seen: None)
        return entry, model.tokens_encoded - before


def _ask(load: Load, question: Callable[[TextEncoder], object], threads: int) -> dict[str, object]:
    """The result of `question`, or a user's error as data: Ray would wrap the exception."""
    import torch

    torch.set_num_threads(threads)
    try:
        return {"answer": question(load())}
    except UnmaskedError as error:
        return {"error": type(error).__name__, "message": str(error)}


def _answer(returned: dict[str, Any]) -> Any:
    """The result that `_ask` returned; raises the error if it returned one."""
    if "error" in returned:
        kinds = {"DataError": errors.DataError, "OutputError": errors.OutputError}
        raise kinds.get(returned["error"], errors.ModelError)(returned["message"])
    return returned["answer"]
