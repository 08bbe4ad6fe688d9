"""Encodes a source into one file of vectors, which appears only when it is complete.

An interrupted run starts again from the beginning, so a long corpus belongs in a folder of shards.
"""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from unmasked.corpus.local import Progress
from unmasked.corpus.manifest import json_line, lock
from unmasked.corpus.shards import CorpusJob, Encoded, Shards, Stream, write_vectors
from unmasked.corpus.stored_vectors import Encoding, read_ranges, save_ranges
from unmasked.corpus.writers import OUTPUTS
from unmasked.errors import OutputError
from unmasked.files.source import Source
from unmasked.files.writing import written_aside

if TYPE_CHECKING:
    from unmasked.model import TextEncoder


def check_output(path: Path, overwrite: bool = False) -> None:
    """Refuse an output file that exists or is of an unknown kind, before any work is done.

    Raises:
        OutputError: it exists (and `overwrite` is False), is a folder, or has another suffix.
    """
    if path.suffix not in OUTPUTS:
        named = shlex.quote(str(path.with_suffix(OUTPUTS[0])))
        raise OutputError(
            f"{path}: unknown kind of output. Allowed: {', '.join(OUTPUTS)}; or a folder, whose "
            f"name has no suffix or ends in /. Fix: -o {named}."
        )
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Fix: name a file in it.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists. Fix: give another name, or --overwrite.")


def encode_corpus(
    model: TextEncoder,
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
    """Encode every text of a source into one file.

    Args:
        model: the encoder.
        source: the texts.
        output: a .npy, .parquet or .safetensors file. The ranges of int8 are written to
            ``NAME.ranges.npy`` beside it, and skipped rows are listed in ``NAME.skipped.jsonl``.
        encoding: prompt, normalisation, precision and so on.
        overwrite: replace the output if it exists.
        window, skip, ranges: see `Shards`.
        progress: called with the numbers of rows and tokens done so far.

    Raises:
        DataError: see `Source.records`; or a vector is not finite.
        OutputError: see `check_output`; or another process writes to the same file.
    """
    encoding, output = (encoding or Encoding()).of(source), Path(output)
    shards = Shards(output.suffix, window=window, skip=skip, ranges=ranges)
    check_output(output, overwrite)
    shards.check(source.keep, encoding.precision, encoding.chunks is not None)
    encoding.check_sizes()
    source = replace(source, distinct=encoding.chunks is not None)
    output.parent.mkdir(parents=True, exist_ok=True)
    lock_file = output.with_name(f".{output.name}.lock")
    with ExitStack() as stack:
        stack.enter_context(lock(lock_file, output, "or name another file"))
        stack.callback(lock_file.unlink, missing_ok=True)
        check_output(output, overwrite)  # again: from here on, no other process can create it
        encoding.check(model)
        stream, width = Stream(source), encoding.width(model)
        window = shards.window_on(model.device.type, encoding.chunks is not None)
        used = None
        if encoding.precision == "int8":
            if ranges is not None:
                used = read_ranges(ranges, width)
            else:
                used = encoding.measure_ranges(model, stream.head(), window)
            save_ranges(output.with_suffix(".ranges.npy"), used)
        job = CorpusJob(source, encoding, output.parent, shards, window, width, used)
        return _write(job, model, stream, output, progress)


def _write(
    job: CorpusJob, model: TextEncoder, stream: Stream, output: Path, progress: Progress
) -> Encoded:
    """Write the vectors, and the list of rows without one."""

    def report(rows: int) -> None:
        progress(rows, model.tokens_encoded)

    if not stream.reaches(0):
        raise job.source.empty()
    report(0)
    rows = stream.take(0, sys.maxsize)  # all of them
    done = write_vectors(job, model, output, rows, 0, report)
    listed = output.with_suffix(".skipped.jsonl")
    listed.unlink(missing_ok=True)  # it belonged to the file that was replaced
    if done.skipped:
        with written_aside(listed) as file:
            for fault in done.skipped:
                file.write(json_line(fault))
    return Encoded(done.vectors, job.width, len(done.skipped), done.cut)
