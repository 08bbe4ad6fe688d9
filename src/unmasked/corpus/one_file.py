"""From a source to one file of vectors, which exists once it is whole.

An interrupted run begins again, so a long corpus belongs in a folder of shards.
"""

from __future__ import annotations

import json
import shlex
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from unmasked.corpus.local import Progress
from unmasked.corpus.manifest import lock
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
            f"{path}: unknown kind of output. Allowed: {', '.join(OUTPUTS)}; or a folder, which is "
            f"a name without a suffix or with a / at its end. Fix: -o {named}."
        )
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Fix: name a file in it.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists. Fix: another name, or --overwrite.")


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
        model: encodes the texts.
        source: the texts.
        output: a .npy, .parquet or .safetensors file. The ranges of int8 go to
            ``NAME.ranges.npy`` beside it, the rows that were skipped to ``NAME.skipped.jsonl``.
        encoding: prompt, normalisation, precision and so on.
        overwrite: replace the output if it exists.
        window, skip, ranges: see `Shards`.
        progress: is told of the rows done so far.

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
    held = output.with_name(f".{output.name}.lock")
    with ExitStack() as stack:
        stack.enter_context(lock(held, output, "or name another file"))
        stack.callback(held.unlink, missing_ok=True)
        check_output(output, overwrite)  # nobody else can make it from here on
        encoding.check(model)
        stream, width = Stream(source), encoding.width(model)
        window = shards.window_on(model.device.type, encoding.chunks is not None)
        found = None
        if encoding.precision == "int8":
            found = None if ranges is None else read_ranges(ranges, width)
            if found is None:
                found = encoding.measure_ranges(model, stream.head(), window)
            save_ranges(output.with_suffix(".ranges.npy"), found)
        job = CorpusJob(source, encoding, output.parent, shards, window, width, found)
        return _write(job, model, stream, output, progress)


def _write(
    job: CorpusJob, model: TextEncoder, stream: Stream, output: Path, progress: Progress
) -> Encoded:
    """Write the vectors, and the list of the rows that have none."""

    def told(rows: int) -> None:
        progress(rows, model.tokens_encoded)

    if not stream.reaches(0):
        raise job.source.empty()
    told(0)
    every = stream.take(0, 1 << 62)
    done = write_vectors(job, model, output, every, 0, told)
    listed = output.with_suffix(".skipped.jsonl")
    listed.unlink(missing_ok=True)  # it belonged to the file that was replaced
    if done.skipped:
        with written_aside(listed) as file:
            for fault in done.skipped:
                file.write(json.dumps(fault, ensure_ascii=False).encode() + b"\n")
    return Encoded(done.vectors, job.width, len(done.skipped), done.cut)
