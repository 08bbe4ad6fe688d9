"""From a source to a folder of shards, which the same call continues, on one machine or many."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from unmasked.corpus.local import CorpusEngine, Local, Progress
from unmasked.corpus.manifest import Manifest, checksum, locked
from unmasked.corpus.shards import (
    CorpusJob,
    Digest,
    Encoded,
    Shards,
    Stream,
    check_request,
    window_of,
)
from unmasked.corpus.vectors import CALIBRATION, Encoding, shared_ranges
from unmasked.errors import DataError, OutputError
from unmasked.files.source import Source

if TYPE_CHECKING:
    from unmasked.model import LLM2Vec

logger = logging.getLogger(__name__)

Announce = Callable[[str], AbstractContextManager[None]]
Begin = Callable[[int, "int | None"], Progress]
RANGES = "_ranges.npy"


def encode_folder(
    engine: CorpusEngine,
    source: Source,
    folder: str | Path,
    encoding: Encoding | None = None,
    shards: Shards | None = None,
    *,
    overwrite: bool = False,
    announce: Announce = lambda text: nullcontext(),
    begin: Begin = lambda done, total: lambda rows, tokens: None,
) -> Encoded:
    """Encode every text of a source into a folder of shards; the same call continues.

    Args:
        engine: where the model runs: `Local` or `OnRay`.
        source: the texts.
        folder: a new folder, or one that the same call began.
        encoding: prompt, normalisation, precision and so on.
        shards: how the folder is divided.
        overwrite: begin again, whatever the folder holds.
        announce: given the name of each step before the first shard; what it returns is entered
            for as long as the step takes.
        begin: called with the number of rows that are done already and that of all rows, if it is
            known; what it returns is told of progress.

    Returns:
        What this machine's part of the folder holds now.

    Raises:
        DataError: see `Source.records`; or a vector is not finite.
        OutputError: the folder holds something else, or another process writes to it.
    """
    encoding, shards, folder = encoding or Encoding(), shards or Shards(), Path(folder)
    check_request(source, encoding, shards)
    if source.on_disk and folder.resolve().is_relative_to(Path(source.path).resolve()):
        raise OutputError(f"{folder} is in the folder that is read. Fix: a folder outside it.")
    if overwrite and shards.part[1] > 1:
        raise OutputError(
            "--overwrite would delete the shards of other machines. Fix: a new folder."
        )
    with locked(folder, shards.part, overwrite) as manifest:
        with announce(f"checking {source.name}"):
            inputs, counts = _survey(source, shards.skip, manifest, engine.needs_counts)
        with announce("loading the model"):
            facts = engine.ask(partial(_facts, encoding=encoding, shards=shards))
        if facts.loss is not None and not isinstance(engine, Local):
            logger.warning("%s", facts.loss)  # nobody hears the warning of a model elsewhere
        width = facts.settings["dimensions"]
        job = CorpusJob(source, encoding, folder, shards, facts.window, width, counts=counts)
        stream = Stream(source, counts)
        if encoding.precision == "int8":
            with announce(f"measuring the ranges of int8 on the first {CALIBRATION} rows"):
                job = replace(job, ranges=_ranges(engine, job, stream))
        manifest.begin(_settings(job, facts), inputs)
        _fill(engine, job, manifest, stream, begin)
        return Encoded(manifest.rows, width, manifest.skipped)


def _survey(
    source: Source, skip: bool, manifest: Manifest, needs_counts: bool
) -> tuple[list[dict[str, Any]], list[int] | None]:
    """What the source is, for the manifest, and how many rows each file has, if that can be known.

    Files are read twice, for their digests and to check every row: a fault in the last line should
    not come to light after days of encoding. A run that continues reads them once.
    """
    if not source.on_disk:
        if needs_counts and not source.again:
            raise DataError("standard input cannot be shared among workers. Fix: give a file.")
        return [{"file": source.files[0]}], source.survey(skip) if needs_counts else None
    inputs: list[dict[str, Any]] = [
        {"file": name, "bytes": Path(file).stat().st_size, "sha256": checksum(Path(file))}
        for name, file in zip(source.names, source.files, strict=True)
    ]
    known = [dict(entry) for entry in manifest.header.get("inputs", [])]
    counts = [entry.pop("rows", 0) for entry in known]
    if known != inputs:
        counts = source.survey(skip)
    return [entry | {"rows": n} for entry, n in zip(inputs, counts, strict=True)], counts


class _Facts(NamedTuple):
    """What is asked where the model is.

    Attributes:
        settings: those that the model and the encoding decide.
        window: rows encoded at a time.
        loss: what 8-bit weights cost, in words.
    """

    settings: dict[str, Any]
    window: int
    loss: str | None


def _facts(model: LLM2Vec, encoding: Encoding, shards: Shards) -> _Facts:
    from unmasked.checkpoint.fingerprint import fingerprint

    encoding.check(model)
    settings = {
        "model": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantize": model.quantization.name if model.quantization else None,
        "prompt": encoding.resolved_prompt(model),
        "batch_size": encoding.batch_size,
        "normalize": encoding.normalize,
        "dimensions": encoding.width(model),
        "precision": encoding.precision,
    }
    window = min(shards.rows, shards.window or window_of(model.device.type))
    return _Facts(settings, window, str(model.quantization) if model.quantization else None)


def _settings(job: CorpusJob, facts: _Facts) -> dict[str, Any]:
    """What a folder is compared by when a run continues."""
    return facts.settings | {
        "ranges": None if job.ranges is None else checksum(job.folder / RANGES),
        "format": job.shards.kind.removeprefix("."),
        "shard_rows": job.shards.rows,
        "window": job.window,
        "machines": job.shards.part[1],
        "text_column": job.source.column,
        "keep": list(job.source.keep),
        "max_bytes": job.source.max_bytes,
    }


def _ranges(engine: CorpusEngine, job: CorpusJob, stream: Stream) -> np.ndarray:
    """The ranges in the folder, measured on the first texts if there are none."""

    def measure() -> np.ndarray:
        texts = stream.head()
        return engine.ask(lambda model: job.encoding.measure_ranges(model, texts, job.window))

    place, machines = job.shards.part
    mine = job.folder / f"._ranges-{place}-of-{machines}.npy"
    return shared_ranges(job.folder / RANGES, mine, job.shards.ranges, job.width, measure)


def _fill(
    engine: CorpusEngine, job: CorpusJob, manifest: Manifest, stream: Stream, begin: Begin
) -> None:
    """Write the shards of this machine that are not there."""
    (place, step), rows = job.shards.part, job.shards.rows
    wanted: range | count[int] = count(place - 1, step)
    total = None
    if job.counts is not None:
        all_rows = sum(job.counts)
        wanted = range(place - 1, -(-all_rows // rows), step)
        total = sum(min(rows, all_rows - shard * rows) for shard in wanted)
    before = manifest.rows + manifest.skipped
    progress = begin(before, total)
    todo = _unwritten(engine, job, manifest, stream, wanted)
    added = False
    for entry in engine.shards(job, stream, todo, lambda n, tokens: progress(before + n, tokens)):
        manifest.add(entry)
        added = True
    if place == 1 and not manifest.done:
        raise DataError(f"{job.source.name}: there is no text in it.")
    if added or not manifest.finished:
        manifest.finish()


def _unwritten(
    engine: CorpusEngine,
    job: CorpusJob,
    manifest: Manifest,
    stream: Stream,
    wanted: range | count[int],
) -> Iterator[int]:
    """The shards to write.

    Where the source is no file, those that are there are read again and compared.
    """
    for shard in wanted:
        first = shard * job.shards.rows
        if engine.needs_counts:  # the rows are read elsewhere
            if shard not in manifest.done:
                yield shard
        elif shard not in manifest.done:
            if not stream.reaches(first):
                return
            yield shard
        elif not job.source.on_disk:
            digest = Digest()
            digest.add(stream.take(first, job.shards.rows))
            if digest.value() != manifest.done[shard].texts:
                raise DataError(
                    f"{job.source.name}: rows {first} to {first + job.shards.rows - 1} are not "
                    f"those that {job.path(shard)} was made of. Fix: give the same texts, or name "
                    "another folder."
                )
