"""The whole way from a source to one file of vectors or to a folder of shards."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from unmasked.corpus.checks import check_apart, check_keep, check_output, check_ranges, survey
from unmasked.corpus.encoding import CALIBRATION, Encoding
from unmasked.corpus.engines import Engine, Local, Progress, with_tokens
from unmasked.corpus.manifest import Manifest, Part, alone, checksum, locked
from unmasked.corpus.ranges import RANGES, head_texts, read_ranges, save_ranges, shared_ranges
from unmasked.corpus.shards import Job, Stream, write_file
from unmasked.errors import DataError, OutputError
from unmasked.files.source import Source
from unmasked.files.writing import written_aside

if TYPE_CHECKING:
    from unmasked.compat.llm2vec import LLM2Vec
    from unmasked.forward.quantization import Quantization

logger = logging.getLogger(__name__)

Announce = Callable[[str], AbstractContextManager[None]]

WINDOW = {"cpu": 2048}
"""Texts encoded at a time: enough to sort by length, few enough to see progress."""
_WINDOW = 16384
SHARD_ROWS = 32768


class Encoded(NamedTuple):
    """What was written: vectors, D, and rows of the source that have none."""

    rows: int
    width: int
    skipped: int


@dataclass(frozen=True)
class Shards:
    """How a folder is cut, and what becomes of rows with a fault.

    Attributes:
        kind: ``.parquet``, ``.npy`` or ``.safetensors``.
        rows: rows of the source in a shard.
        window: rows encoded at a time; by the device when None.
        part: (i, n) for the i-th of n machines; it writes every n-th shard.
        skip: pass over rows with a fault and list them.
        ranges: (2, D) .npy of another run, for int8.
    """

    kind: str = ".parquet"
    rows: int = SHARD_ROWS
    window: int | None = None
    part: Part = (1, 1)
    skip: bool = False
    ranges: Path | None = None


def encode_corpus(
    model: LLM2Vec,
    source: Source,
    output: str | Path,
    encoding: Encoding | None = None,
    *,
    overwrite: bool = False,
    window: int | None = None,
    skip: bool = False,
    ranges: Path | None = None,
    progress: Progress = lambda rows, tokens: None,
) -> Encoded:
    """Encode every text of a source into one file; an interrupted run begins anew.

    Args:
        model: the encoder.
        source: the texts.
        output: ``.npy``, (N, D); ``.safetensors``, the same as ``vectors``; or ``.parquet``, with
            the columns ``row`` (int64, from 0), ``id`` (string, where the source has ids), those
            kept, and ``vector`` (fixed-size list of D). The ranges of int8 are written to
            ``NAME.ranges.npy``, rows left out to ``NAME.skipped.jsonl``.
        encoding: prompt, normalisation, precision and the like.
        overwrite: replace an output that exists.
        window: texts encoded at a time.
        skip: leave out rows with a fault; by default they are errors.
        ranges: those of another run, for int8.
        progress: told how much is done.

    Raises:
        DataError: see `Source.records`; or a vector is not finite.
        OutputError: see `check_output`.
    """
    encoding, output = encoding or Encoding(), Path(output)
    check_output(output, overwrite)
    check_keep(source, output.suffix)
    check_ranges(ranges, encoding.precision)
    with alone(output):
        check_output(output, overwrite)  # nobody else can make it from here on
        window = window or WINDOW.get(model.device.type, _WINDOW)
        shards = Shards(output.suffix, window=window, skip=skip, ranges=ranges)
        return _one_file(model, source, output, encoding, shards, progress)


def _one_file(
    model: LLM2Vec,
    source: Source,
    output: Path,
    encoding: Encoding,
    shards: Shards,
    progress: Progress,
) -> Encoded:
    encoding.check(model)
    stream = Stream(source)
    job = _job(source, encoding, output.parent, shards, encoding.width(model))
    if encoding.precision == "int8":
        saved = read_ranges(shards.ranges, job.width) if shards.ranges else None
        if saved is None:
            saved = encoding.calibrate(model, head_texts(stream), job.window)
        job = replace(job, ranges=saved)
        save_ranges(output.with_suffix(".ranges.npy"), saved)
    told = with_tokens(model, progress)
    if not stream.peek(1):
        raise DataError(f"{source.name}: there is no text in it.")
    told(0)
    rows = stream.take(0, 1 << 62)
    written = write_file(job, model, output, rows, 0, told)
    listed = output.with_suffix(".skipped.jsonl")
    listed.unlink(missing_ok=True)  # of the file that was replaced
    if written.skipped:
        with written_aside(listed) as file:
            for fault in written.skipped:
                file.write(json.dumps(fault, ensure_ascii=False).encode() + b"\n")
    return Encoded(written.rows, job.width, len(written.skipped))


def encode_folder(
    engine: Engine,
    source: Source,
    folder: str | Path,
    encoding: Encoding | None = None,
    shards: Shards | None = None,
    *,
    overwrite: bool = False,
    announce: Announce = lambda text: nullcontext(),
    begin: Callable[[int, int | None], Progress] = lambda done, total: lambda rows, tokens: None,
) -> Encoded:
    """Encode every text of a source into a folder of shards; the same call continues.

    Args:
        engine: where the model runs: `Local`, or `cluster.OnRay`.
        source: the texts.
        folder: a new one, or one that the same call began.
        encoding: prompt, normalisation, precision and the like.
        shards: how the folder is cut.
        overwrite: begin anew, whatever the folder holds.
        announce: shown around what takes a while before the first shard.
        begin: called with the rows that are done already and the number of all, if it is known;
            returns what is told of progress.

    Returns:
        What this machine's part of the folder holds now.

    Raises:
        DataError: see `Source.records`; or a vector is not finite.
        OutputError: the folder holds something else, or another process writes to it.
    """
    encoding, shards, folder = encoding or Encoding(), shards or Shards(), Path(folder)
    check_keep(source, shards.kind)
    check_ranges(shards.ranges, encoding.precision)
    check_apart(source, folder)
    if overwrite and shards.part[1] > 1:
        raise OutputError(
            "--overwrite would delete the shards of other machines. Fix: a new folder"
        )
    with locked(folder, shards.part, overwrite) as manifest:
        with announce(f"checking {source.name}"):
            inputs, counts = survey(source, shards.skip, manifest, engine.needs_counts)
        with announce("loading the model"):
            facts = engine.ask(partial(_facts, encoding=encoding, shards=shards))
        if facts.quantization is not None and not isinstance(engine, Local):
            logger.warning("%s", facts.quantization)  # where it was loaded nobody hears it
        shards = replace(shards, window=facts.window)
        job = _job(source, encoding, folder, shards, facts.width, counts)
        stream = Stream(source, counts)
        if encoding.precision == "int8":
            with announce(f"measuring the ranges of int8 on the first {CALIBRATION} rows"):
                job = replace(
                    job, ranges=shared_ranges(job, engine, stream, shards.part, shards.ranges)
                )
        manifest.begin(_settings(job, shards, facts), inputs)
        _fill(engine, job, shards, manifest, stream, begin)
        return Encoded(manifest.rows, job.width, manifest.skipped)


def _fill(
    engine: Engine,
    job: Job,
    shards: Shards,
    manifest: Manifest,
    stream: Stream,
    begin: Callable[[int, int | None], Progress],
) -> None:
    first, step = shards.part[0] - 1, shards.part[1]
    total = None if job.counts is None else sum(job.counts)
    if total is None:
        wanted: Iterable[int] = count(first, step)
    else:
        wanted = range(first, -(-total // job.shard_rows), step)
        total = sum(min(job.shard_rows, total - shard * job.shard_rows) for shard in wanted)
    before = manifest.rows + manifest.skipped
    progress = begin(before, total)
    known = {shard: done.texts for shard, done in manifest.done.items()}
    told: Progress = lambda rows, tokens: progress(before + rows, tokens)  # noqa: E731
    added = False
    for entry in engine.shards(job, stream, wanted, known, told):
        manifest.add(entry)
        added = True
    if first == 0 and not manifest.done:
        raise DataError(f"{job.source.name}: there is no text in it.")
    if added or not manifest.finished:
        manifest.finish()


class _Facts(NamedTuple):
    """What a folder records of a model, asked where the model is."""

    model: str
    dtype: str
    quantization: Quantization | None
    prompt: str | None
    width: int
    window: int


def _facts(model: LLM2Vec, encoding: Encoding, shards: Shards) -> _Facts:
    encoding.check(model)
    return _Facts(
        model.fingerprint(),
        str(model.dtype).removeprefix("torch."),
        model.quantization,
        encoding.resolved_prompt(model),
        encoding.width(model),
        min(shards.rows, shards.window or WINDOW.get(model.device.type, _WINDOW)),
    )


def _job(
    source: Source,
    encoding: Encoding,
    folder: Path,
    shards: Shards,
    width: int,
    counts: list[int] | None = None,
) -> Job:
    assert shards.window is not None
    return Job(
        source,
        encoding,
        folder,
        shards.kind,
        shards.rows,
        shards.window,
        shards.skip,
        width,
        counts=counts,
    )


def _settings(job: Job, shards: Shards, facts: _Facts) -> dict[str, Any]:
    """What a folder is compared by when a run continues."""
    return {
        "model": facts.model,
        "dtype": facts.dtype,
        "quantize": facts.quantization.name if facts.quantization else None,
        "prompt": facts.prompt,
        "batch_size": job.encoding.batch_size,
        "normalize": job.encoding.normalize,
        "dimensions": job.width,
        "precision": job.encoding.precision,
        "ranges": None if job.ranges is None else checksum(job.folder / RANGES),
        "format": job.kind.removeprefix("."),
        "shard_rows": job.shard_rows,
        "window": job.window,
        "machines": shards.part[1],
        "text_column": job.source.column,
        "keep": list(job.source.keep),
        "max_bytes": job.source.max_bytes,
    }
