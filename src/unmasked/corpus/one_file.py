"""Encodes a source into one file of vectors, which appears only when it is complete.

The ranges of int8 and the list of skipped rows are beside it, named after its whole name, and get
their names together with it: an interrupted run leaves the old files as they were. It starts again
from the beginning, so a long corpus belongs in a folder of shards.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmasked.corpus.local import Progress
from unmasked.corpus.manifest import json_line
from unmasked.corpus.shards import CorpusJob, Encoded, Shards, Stream, write_vectors
from unmasked.corpus.stored_vectors import Encoding, ranges_of, read_ranges, save_ranges, skipped_of
from unmasked.corpus.writers import OUTPUTS
from unmasked.errors import OutputError
from unmasked.files.source import Source
from unmasked.files.writing import folder_aside, locked_by_one, written_aside

if TYPE_CHECKING:
    from unmasked.model import TextEncoder


def check_output(
    path: Path, overwrite: bool = False, source: Source | None = None, ranges: Path | None = None
) -> None:
    """Refuse an output file that exists or is of an unknown kind, before any work is done.

    Args:
        path: the output.
        overwrite: whether it may exist.
        source, ranges: what is read, which the output must not replace or be a part of.

    Raises:
        OutputError: it exists (and `overwrite` is False), is a folder, has another suffix, or is
            something that is read, or in the folder that is read.
    """
    if path.suffix not in OUTPUTS:
        named = shlex.quote(str(path.with_suffix(OUTPUTS[0])))
        raise OutputError(
            f"{path}: unknown kind of output. Allowed: {', '.join(OUTPUTS)}; or a folder, whose "
            f"name has no suffix or ends in /. Fix: -o {named}."
        )
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Fix: name a file in it.")
    _check_not_read(path, source, ranges)
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists. Fix: give another name, or --overwrite.")


def _check_not_read(path: Path, source: Source | None, ranges: Path | None) -> None:
    """Refuse an output that would replace what is read, or that the next call would read."""
    files = [] if ranges is None else [str(ranges)]
    if source is not None and source.on_disk:
        root = source.root.resolve()
        # Of any kind: the list of skipped rows beside it is a .jsonl file.
        if root.is_dir() and path.resolve().is_relative_to(root):
            raise OutputError(f"{path} is in the folder that is read. Fix: name one outside it.")
        files += source.files
    written = [path, skipped_of(path)]
    if same := next((file for file in files if _is_one_of(file, written)), None):
        given = f"-o {path} would replace {same}, which is read"
        raise OutputError(f"{given}. Fix: give another name.")


def _is_one_of(file: str, others: Iterable[Path]) -> bool:
    with suppress(OSError):  # one of them is not there
        return any(other.exists() and other.samefile(file) for other in others)
    return False


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
        output: a .npy, .parquet or .safetensors file. The ranges of int8 are written to
            ``OUTPUT.ranges.npy`` beside it (``v.npy.ranges.npy``), and skipped rows are listed in
            ``OUTPUT.skipped.jsonl``.
        window, skip, ranges: see `Shards`.
        progress: called with the numbers of rows and tokens done so far.

    Raises:
        DataError: see `Source.records`; or a vector is not finite.
        OutputError: see `check_output`; or another process writes to the same file, or .npy cannot
            tell the dimensions of bits.
    """
    encoding, output = (encoding or Encoding()).of(source), Path(output)
    shards = Shards(output.suffix, window=window, skip=skip, ranges=ranges)
    check_output(output, overwrite, source, ranges)
    shards.check(source.keep, encoding)
    source = replace(source, distinct=encoding.chunks is not None)
    output.parent.mkdir(parents=True, exist_ok=True)
    lock_file = output.with_name(f".{output.name}.lock")
    with ExitStack() as stack:
        taken = f"{output}: another process is writing to it. Fix: wait for it, or name another."
        stack.enter_context(locked_by_one(lock_file, taken))
        stack.callback(lock_file.unlink, missing_ok=True)
        check_output(output, overwrite)  # again: from here on, no other process can create it
        encoding.check(model)
        stream, width = Stream(source), encoding.width(model)
        _check_bits(output, encoding, width)
        window = shards.window_on(model.device.type, encoding.chunks is not None)
        used = None
        if encoding.precision == "int8":
            if ranges is not None:
                used = read_ranges(ranges, width)
            else:
                used = encoding.measure_ranges(model, stream.head(), window)
        job = CorpusJob(source, encoding, output.parent, shards, window, width, used)
        return _write(replace(job, said=_said(job)), model, stream, output, progress)


def _check_bits(output: Path, encoding: Encoding, width: int) -> None:
    """Refuse bits in .npy that do not fill their bytes: the last ones would count as dimensions."""
    if encoding.precision == "binary" and width % 8 and output.suffix == ".npy":
        given = f"{output} cannot tell that its bits are {width} dimensions, no multiple of 8"
        name = shlex.quote(str(output.with_suffix(".safetensors")))
        fix = f"-o {name}" + (f", or --truncate-dim {width // 8 * 8}" if width > 8 else "")
        raise OutputError(f"{given}. Fix: {fix}.")


def _said(job: CorpusJob) -> dict[str, Any] | None:
    """What a search has to know of the file, as the manifest of a folder says it."""
    if job.shards.kind == ".parquet":
        chunks = job.encoding.chunks
        return {
            "dimensions": job.width,
            "file_column": job.with_files,
            "text_column": job.source.column,
            "keep": list(job.source.keep),
            "chunk": None if chunks is None else asdict(chunks),
        }
    bits = job.encoding.precision == "binary" and job.width % 8
    return {"dimensions": job.width} if bits else None


def _write(
    job: CorpusJob, model: TextEncoder, stream: Stream, output: Path, progress: Progress
) -> Encoded:
    """Write the vectors, their ranges, and the list of rows without one, and then name them all."""

    def report(rows: int) -> None:
        progress(rows, model.tokens_encoded)

    if not stream.reaches(0):
        raise job.source.empty()
    report(0)
    rows = stream.take(0, sys.maxsize)  # all of them
    listed = skipped_of(output)
    # Earlier versions named the list after the stem; an empty list keeps it from being read.
    keeps = output.with_suffix(".skipped.jsonl").exists()
    aside = output.with_name(f".{output.name}.new")
    with folder_aside(output.parent, aside=aside, last=(output.name,)):
        done = write_vectors(job, model, aside / output.name, rows, 0, report)
        if job.ranges is not None:
            save_ranges(aside / ranges_of(output).name, job.ranges)
        if done.skipped or keeps or listed.exists():
            with written_aside(aside / listed.name) as file:
                for fault in done.skipped:
                    file.write(json_line(fault))
    if not done.skipped and not keeps:
        listed.unlink(missing_ok=True)  # that of the file that was replaced; empty now
    return Encoded(done.vectors, job.width, len(done.skipped), done.cut)
