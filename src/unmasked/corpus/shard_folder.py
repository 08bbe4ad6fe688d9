"""Encodes a source into a folder of shards on one machine or many; the same call resumes it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unmasked.corpus.local import Local, Progress
from unmasked.corpus.manifest import Manifest, checksum, locked
from unmasked.corpus.ray import OnRay
from unmasked.corpus.shards import CorpusJob, Encoded, Shards, Stream, add_rows, new_digest
from unmasked.corpus.stored_vectors import CALIBRATION, Encoding, read_ranges, save_ranges
from unmasked.errors import DataError, OutputError
from unmasked.files.source import Source

if TYPE_CHECKING:
    from unmasked.model import TextEncoder

logger = logging.getLogger(__name__)

Announce = Callable[[str], AbstractContextManager[None]]
Begin = Callable[[int, "int | None"], Progress]
RANGES = "_ranges.npy"


def encode_folder(
    engine: Local | OnRay,
    source: Source,
    folder: str | Path,
    encoding: Encoding | None = None,
    shards: Shards | None = None,
    *,
    overwrite: bool = False,
    announce: Announce = lambda text: nullcontext(),
    begin: Begin = lambda done, total: lambda rows, tokens: None,
) -> Encoded:
    """Encode every text of a source into a folder of shards; the same call resumes it.

    Args:
        engine: where the model runs.
        folder: a new folder, or one that the same call began.
        overwrite: begin again, and delete the shards that are there once the source and the model
            have been checked.
        announce: called with a description of each step before the first shard; returns a context
            manager that is active during the step.
        begin: called with the number of rows that are done and the total number, if it is known;
            returns the function that is called with the progress.

    Returns:
        The totals of this machine's part of the folder, including shards of earlier calls.

    Raises:
        DataError: see `Source.records`; or a vector is not finite.
        OutputError: the folder has other files in it (the source, for example), was begun with
            other settings or inputs, or another process writes to it.
    """
    encoding, shards = (encoding or Encoding()).of(source), shards or Shards()
    folder = Path(folder)
    shards.check(source.keep, encoding)
    source = replace(source, distinct=encoding.chunks is not None)
    _check_folder(source, folder, overwrite and shards.part[1] > 1)
    with locked(folder, shards.part, overwrite) as manifest:
        _check_inside(source, folder)
        with announce(f"checking {source.name}"):
            inputs, counts = _survey(source, shards.skip, manifest, engine.needs_counts)
        with announce("loading the model"):
            question = partial(_model_settings, encoding=encoding, shards=shards)
            settings, window, loss = engine.ask(question)
        if loss is not None and not isinstance(engine, Local):
            logger.warning("%s", loss)  # the warning in the actor's process is not shown here
        width, stream = settings["dimensions"], Stream(source, counts)
        job = CorpusJob(source, encoding, folder, shards, window, width)
        if encoding.precision == "int8":
            with announce(f"measuring the ranges of int8 on the first {CALIBRATION} rows"):
                job = replace(job, ranges=_shared_ranges(engine, job, stream, manifest))
        if manifest.replacing and not stream.reaches(0):  # standard input may be empty
            raise source.empty()
        manifest.clear()
        manifest.begin(settings | _folder_settings(job), inputs)
        _fill(engine, job, manifest, stream, begin)
        total = manifest.total
        return Encoded(total("rows"), width, total("skipped"), total("cut"))


def _check_folder(source: Source, folder: Path, deletes_others: bool) -> None:
    root = source.root.resolve()
    if source.on_disk and root.is_dir() and folder.resolve().is_relative_to(root):
        raise OutputError(f"{folder} is in the folder that is read. Fix: name one outside it.")
    if deletes_others:
        given = "--overwrite would delete the shards of other machines"
        raise OutputError(f"{given}. Fix: name a new folder.")


def _check_inside(source: Source, folder: Path) -> None:
    """Refuse shards of the output as its source."""
    for file in source.files if source.on_disk else ():
        if Path(file).resolve().is_relative_to(folder.resolve()):
            raise OutputError(f"{file}, which is read, is in {folder}. Fix: name another folder.")


def _survey(
    source: Source, skip: bool, manifest: Manifest, needs_counts: bool
) -> tuple[list[dict[str, Any]], list[int] | None]:
    """The manifest's list of inputs, and the number of rows of each file, if it can be known.

    Files are read twice, once for their checksums and once to check every row: a fault in the last
    line should not be found after days of encoding. A resumed run reads them once.
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
    if known != inputs or not manifest.done:  # without a shard, the settings may be others now
        counts = source.survey(skip)
    return [entry | {"rows": n} for entry, n in zip(inputs, counts, strict=True)], counts


def _model_settings(
    model: TextEncoder, encoding: Encoding, shards: Shards
) -> tuple[dict[str, Any], int, str | None]:
    """Settings that depend on the model, the rows of a window, and the loss by 8-bit weights."""
    encoding.check(model)
    quantization = model.quantization
    settings: dict[str, Any] = {
        "model": model.fingerprint(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantize": quantization.name if quantization else None,
        "prompt": encoding.resolved_prompt(model),
        "batch_size": encoding.batch_size,
        "normalize": encoding.normalize,
        "dimensions": encoding.width(model),
        "precision": encoding.precision,
    }
    chunks = encoding.chunks
    if chunks is not None:
        settings |= {"chunk": asdict(chunks)}
    if encoding.compiled(model):  # absent if False, so folders of earlier versions can be resumed
        settings["compiled"] = True
    window = min(shards.rows, shards.window_on(model.device.type, chunks is not None))
    return settings, window, str(quantization) if quantization else None


def _folder_settings(job: CorpusJob) -> dict[str, Any]:
    """The other settings that have to be the same when a folder is resumed."""
    flags = {"file_column": job.with_files, "whole_files": job.source.whole}
    return {name: True for name, given in flags.items() if given} | {
        "ranges": None if job.ranges is None else checksum(job.folder / RANGES),
        "format": job.shards.kind.removeprefix("."),
        "shard_rows": job.shards.rows,
        "window": job.window,
        "machines": job.shards.part[1],
        "text_column": job.source.column,
        "keep": list(job.source.keep),
        "max_bytes": job.source.max_bytes,
    }


def _shared_ranges(
    engine: Local | OnRay, job: CorpusJob, stream: Stream, manifest: Manifest
) -> np.ndarray:
    """The ranges in the folder, which all machines share; the first machine saves them."""
    path, chosen, (place, machines) = job.folder / RANGES, job.shards.ranges, job.shards.part
    given = None if chosen is None else read_ranges(chosen, job.width)
    own = job.folder / f"._ranges-{place}-of-{machines}.npy"
    own.unlink(missing_ok=True)  # left by a run that was killed
    if manifest.replacing or not path.is_file():
        measured = given
        if measured is None:
            texts, window = stream.head(), job.window
            measured = engine.ask(lambda model: job.encoding.measure_ranges(model, texts, window))
        manifest.clear()
        save_ranges(own, measured)
        try:
            os.link(own, path)  # unlike a rename, it fails if another machine was first
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            own.replace(path)
        own.unlink(missing_ok=True)
    shared = read_ranges(path, job.width)
    if given is not None and not np.array_equal(given, shared):
        raise OutputError(f"{path} holds other ranges than {chosen}. Fix: name a new folder.")
    return shared


def _fill(
    engine: Local | OnRay, job: CorpusJob, manifest: Manifest, stream: Stream, begin: Begin
) -> None:
    """Write the shards of this machine that are missing."""
    (place, step), size, total = job.shards.part, job.shards.rows, None
    wanted: range | count[int] = count(place - 1, step)  # to the end of a stream of unknown length
    if stream.counts is not None:
        rows = sum(stream.counts)
        wanted = range(place - 1, -(-rows // size), step)
        total = sum(min(size, rows - shard * size) for shard in wanted)
    before, added = manifest.total("documents") + manifest.total("skipped"), False
    progress = begin(before, total)
    todo = _unwritten(job, manifest, stream, wanted, reads_here=not engine.needs_counts)
    for entry in engine.shards(job, stream, todo, lambda n, tokens: progress(before + n, tokens)):
        manifest.add(entry)
        added = True
    if place == 1 and not manifest.done:
        raise job.source.empty()
    if added or not manifest.finished:
        manifest.finish()


def _unwritten(
    job: CorpusJob, manifest: Manifest, stream: Stream, wanted: range | count[int], reads_here: bool
) -> Iterator[int]:
    """The shards to write.

    Standard input and data sets of the hub have no checksum. If this process reads them, the rows
    of every finished shard are compared with those that it was made of.
    """
    for shard in wanted:
        first = shard * job.shards.rows
        if shard not in manifest.done:
            if reads_here and not stream.reaches(first):
                return
            yield shard
        elif reads_here and not job.source.on_disk:
            digest = new_digest()
            add_rows(digest, stream.take(first, job.shards.rows))
            if digest.hexdigest() != manifest.done[shard].texts:
                raise DataError(
                    f"{job.source.name}: rows {first} to {first + job.shards.rows - 1} are not "
                    f"those that {job.path(shard)} was made from. Fix: give the same texts, or "
                    "name another folder."
                )
