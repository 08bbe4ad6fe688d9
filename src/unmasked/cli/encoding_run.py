"""What `encode` shows while it works."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from unmasked.cli import terminal
from unmasked.cli.failures import INTERRUPTED
from unmasked.corpus import (
    Encoded,
    Encoding,
    Local,
    Shards,
    check_output,
    encode_corpus,
    encode_folder,
)
from unmasked.errors import OutputError
from unmasked.files.source import Source

if TYPE_CHECKING:
    from unmasked.compat.llm2vec import LLM2Vec
    from unmasked.corpus import OnRay, Progress


def encode(
    load: Loader,
    source: Source,
    output: str,
    encoding: Encoding,
    shards: Shards,
    workers: int | None,
    overwrite: bool,
) -> None:
    """Encode into a file or a folder, as the name says, and tell of it.

    Args:
        load: gives the model.
        source: the texts.
        output: a folder where it has no suffix, or ends in a slash.
        encoding: how texts become vectors.
        shards: how a folder is cut.
        workers: models at a time on Ray, 0 for as many as there are GPUs; None for this process.
        overwrite: replace what is there.
    """
    path = Path(output)
    if source.ignored:
        terminal.say(f"not read, of another kind: {', '.join(source.ignored[:5])}")
    if path.suffix and not output.endswith("/"):
        check_output(path, overwrite)
        if shards.part != (1, 1) or workers is not None:
            raise OutputError(
                f"{output} is one file. Fix: name a folder for --shard and --engine ray."
            )
        _tell(_one_file(load, source, path, encoding, shards, overwrite), path)
        return
    try:
        _tell(_folder(load, source, path, encoding, shards, workers, overwrite), path)
    except KeyboardInterrupt:
        terminal.say(f"interrupted: {path} has whole shards only; run the same command to continue")
        raise typer.Exit(INTERRUPTED) from None


class Loader:
    """Loads the model when it is called, here or on another machine.

    Args:
        name: hub name or folder.
        dtype: of its weights.
        quantize: 8-bit numbers in its linear layers; see `LLM2Vec.from_pretrained`.
    """

    def __init__(self, name: str, dtype: str, quantize: str | None = None) -> None:
        # Another machine's working directory is another one.
        self.name = str(Path(name).resolve()) if Path(name).exists() else name
        self.dtype, self.quantize = dtype, quantize

    def __call__(self) -> LLM2Vec:
        from unmasked.compat.llm2vec import LLM2Vec

        terminal.quiet_libraries()
        return LLM2Vec.from_pretrained(self.name, dtype=self.dtype, quantize=self.quantize)


def _one_file(
    load: Loader,
    source: Source,
    path: Path,
    encoding: Encoding,
    shards: Shards,
    overwrite: bool,
) -> Encoded:
    with terminal.waiting(f"checking {source.name}"):
        total = sum(source.survey(shards.skip)) if source.on_disk else None
    with terminal.waiting(f"loading {load.name}"):
        encoder = load()
    with terminal.Line() as line:
        return encode_corpus(
            encoder,
            source,
            path,
            encoding,
            overwrite=overwrite,
            skip=shards.skip,
            ranges=shards.ranges,
            progress=_counter(line, 0, total),
        )


def _folder(
    load: Loader,
    source: Source,
    path: Path,
    encoding: Encoding,
    shards: Shards,
    workers: int | None,
    overwrite: bool,
) -> Encoded:
    with ExitStack() as stack:
        engine: Local | OnRay = Local(load)
        if workers is not None:
            from unmasked.corpus import OnRay

            with terminal.waiting("starting Ray"):
                engine = stack.enter_context(OnRay(load, workers))

        def begin(done: int, total: int | None) -> Progress:
            return _counter(stack.enter_context(terminal.Line()), done, total)

        return encode_folder(
            engine,
            source,
            path,
            encoding,
            shards,
            overwrite=overwrite,
            announce=terminal.waiting,
            begin=begin,
        )


def _counter(line: terminal.Line, before: int, total: int | None) -> Progress:
    """Shows rows, and what this run does in a second; the time left follows from that."""
    begun, tokens_before = time.monotonic(), 0
    line.begin("encoding")
    line.advance(before, total)

    def told(rows: int, tokens: int | None) -> None:
        nonlocal tokens_before
        if rows == before:  # nothing done yet but, perhaps, the ranges of int8
            tokens_before = tokens or 0
            return
        seconds = max(time.monotonic() - begun, 1e-9)
        notes = [f"{(rows - before) / seconds:,.0f} texts/s"]
        if tokens is not None:
            notes.append(f"{(tokens - tokens_before) / seconds:,.0f} tokens/s")
        line.advance(rows, total, *notes)

    return told


def _tell(done: Encoded, path: Path) -> None:
    numbers = f"{done.rows:,} vectors of {done.width} numbers in {path}"
    listed = path / "_manifest.jsonl" if path.is_dir() else path.with_suffix(".skipped.jsonl")
    left_out = f"; {done.skipped:,} rows skipped, listed in {listed}" if done.skipped else ""
    terminal.show(numbers + left_out)
