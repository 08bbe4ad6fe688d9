"""The verb encode: its options, and what it shows while it works.

The work is done in `unmasked.corpus`, which is imported when the verb runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from unmasked.cli import options, terminal
from unmasked.cli.failures import INTERRUPTED, ONE_FILE_KEPT
from unmasked.errors import OutputError

if TYPE_CHECKING:
    from unmasked.compat.llm2vec import LLM2Vec
    from unmasked.corpus import Encoded, Encoding, OnRay, Progress
    from unmasked.corpus.local import Load
    from unmasked.files.source import Source

_ONE_FILE = (
    "{} is one file: its suffix says its format, and one process writes it. "
    "Fix: name a folder, or leave out --format, --shard and --engine ray."
)
WHOLE_TEXT = 1_000_000
"""Texts of this many bytes or more are refused, unless they are split into passages."""

INPUT = Annotated[
    str,
    Argument(
        metavar="INPUT",
        help=".txt, .jsonl, .csv, .tsv (each perhaps .gz or .zst), .parquet; a folder of them; "
        "hf:NAME[:SUBSET[:SPLIT]] for a Hugging Face data set; - for standard input.",
    ),
]
OUTPUT = Annotated[
    str,
    Option("-o", "--output", help="Folder of shards; or one .npy, .parquet or .safetensors file."),
]
KEEP = Annotated[str | None, Option(help="Columns to write beside the vectors: a,b,c.")]
PROMPT = Annotated[str | None, Option(help="Text put before every input.")]
BATCH_SIZE = Annotated[
    int | None,
    Option(min=1, help="Maximum texts per forward pass.", show_default="limited by tokens"),
]
NORMALIZE = Annotated[bool, Option("--normalize", help="Scale vectors to length 1.")]
TRUNCATE = Annotated[int | None, Option(min=1, help="Keep the first N dimensions per vector.")]
PRECISION = Annotated[
    Literal["float32", "float16", "int8", "binary"],
    Option(help="Number type of the stored vectors; binary is one bit per dimension."),
]
RANGES = Annotated[
    Path | None,
    Option(help="For int8: the file _ranges.npy of another run.", show_default="measured"),
]
FORMAT = Annotated[
    Literal["parquet", "npy", "safetensors"] | None,
    Option(help="Format of the shards in a folder.", show_default="parquet"),
]
SHARD_ROWS = Annotated[int, Option(min=1, help="Number of input rows per shard.")]
SHARD = Annotated[str | None, Option(metavar="i/n", help="Encode part i of n, one per machine.")]
ON_ERROR = Annotated[
    Literal["fail", "skip"],
    Option(help="At a row without usable text: stop, or list it and continue."),
]
BYTES = Annotated[
    int | None,
    Option(
        min=1,
        help="Texts of this many bytes or more are refused.",
        show_default="1000000; 64 MiB with --chunk",
    ),
]
ENGINE = Annotated[
    Literal["local", "ray"], Option(help="Run one model in this process, or several with Ray.")
]
WORKERS = Annotated[
    int | None,
    Option(min=1, help="With --engine ray: number of models.", show_default="number of GPUs"),
]
QUANTIZE = Annotated[
    Literal["int8"] | None,
    Option(
        help="Use 8-bit weights, on a CPU only: faster, slightly less exact; the difference is "
        "printed. The stored vectors follow --precision."
    ),
]
COMPILE = Annotated[
    Literal["auto", "always", "never"],
    Option(
        help="Compile the decoder layers, which takes about 20 seconds. auto: on a GPU, if there "
        "is enough text to make up for it."
    ),
]
OVERWRITE = Annotated[bool, Option("--overwrite", help="Replace the output.")]


def encode(
    model: options.MODEL,
    texts: INPUT,
    output: OUTPUT,
    text_column: options.COLUMN = "text",
    keep: KEEP = None,
    whole_files: options.WHOLE = False,
    chunk: options.CHUNK = None,
    overlap: options.OVERLAP = 0,
    late: options.LATE = False,
    prompt: PROMPT = None,
    prompt_name: options.PROMPT_NAME = None,
    batch_size: BATCH_SIZE = None,
    normalize: NORMALIZE = False,
    truncate_dim: TRUNCATE = None,
    precision: PRECISION = "float32",
    ranges: RANGES = None,
    format: FORMAT = None,
    shard_rows: SHARD_ROWS = 32768,
    shard: SHARD = None,
    on_error: ON_ERROR = "fail",
    max_bytes: BYTES = None,
    engine: ENGINE = "local",
    workers: WORKERS = None,
    dtype: options.DTYPE = "auto",
    quantize: QUANTIZE = None,
    compile: COMPILE = "auto",
    overwrite: OVERWRITE = False,
) -> None:
    """Encode any number of texts into vectors on disk, one vector per row.

    The same command continues an interrupted folder: finished shards are kept.
    """
    from unmasked import corpus
    from unmasked.files.readers import LONGEST_LINE
    from unmasked.files.source import Source

    options.check_used("--workers", workers, engine == "ray", "--engine ray")
    chunks, path = options.divided(chunk, overlap, late), options.check_named(Path(output))
    one_file = bool(path.suffix) and not output.endswith("/")
    kept = tuple(word.strip() for word in (keep or "").split(",") if word.strip())
    most = max_bytes or (WHOLE_TEXT if chunks is None else LONGEST_LINE)
    source = Source(options.documents(texts, whole_files), text_column, keep=kept, max_bytes=most)
    encoding = corpus.Encoding(
        prompt, prompt_name, batch_size, normalize, truncate_dim, precision, chunks
    )
    part, skip = corpus.parse_part(shard) if shard else (1, 1), on_error == "skip"
    load = partial(_load, _everywhere(model), dtype, quantize, compile)
    if one_file and (format or part != (1, 1) or engine == "ray"):
        raise OutputError(_ONE_FILE.format(output))
    given: dict[str, Any] = {"source": source, "encoding": encoding, "overwrite": overwrite}
    _say_left_out(source)
    if one_file:
        _check_file(path, overwrite, source, encoding, ranges)
        write = partial(corpus.encode_corpus, output=path, skip=skip, ranges=ranges, **given)
        done, waited = _to_file(load, write, source, skip)
        listed = corpus.skipped_of(path)
    else:
        kind, actors = f".{format or 'parquet'}", (workers or 0) if engine == "ray" else None
        shards = corpus.Shards(kind, shard_rows, part=part, skip=skip, ranges=ranges)
        write = partial(corpus.encode_folder, folder=path, shards=shards, **given)
        done, waited = _to_folder(load, write, path, actors)
        listed = corpus.Manifest(path, part).path
    _say_done(done, waited, path, listed)


def _check_file(
    path: Path, overwrite: bool, source: Source, encoding: Encoding, ranges: Path | None
) -> None:
    """Refuse an output of one file, before the model is loaded."""
    from unmasked import corpus

    corpus.check_output(path, overwrite, source, ranges)
    options.check_folder(path.parent)
    corpus.Shards(path.suffix, ranges=ranges).check(source.keep, encoding)


def _say_done(done: Encoded, waited: float | None, path: Path, listed: Path) -> None:
    left_out = f"; {done.skipped:,} rows skipped, listed in {listed}" if done.skipped else ""
    terminal.show(f"{done.rows:,} vectors of {done.width} numbers in {path}{left_out}")
    if waited is not None:
        terminal.say(f"the device spent {waited:.0%} of the encoding time waiting for texts")
    if done.cut:
        terminal.show(
            f"{done.cut:,} texts are longer than the model's max_length, and only the beginning of "
            "each was encoded. Fix: --chunk 256 splits them into passages."
        )


def _everywhere(model: str) -> str:
    """The model's name as an actor of Ray can use it, which has another working directory."""
    if model == "nano" or not model.strip():  # 'nano' is the bundled decoder, never a local folder
        return model
    return str(Path(model).resolve()) if Path(model).exists() else model


def _say_left_out(source: Source) -> None:
    if left_out := source.left_out:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())
        first, more = source.ignored[:3], ", ..." if len(source.ignored) > 3 else ""
        terminal.say(f"left out, files of another kind: {counts} ({', '.join(first)}{more})")


def _load(name: str, dtype: str, quantize: str | None, compile: str) -> LLM2Vec:
    """Load the model, in this process or in an actor of Ray, which imports this function."""
    from unmasked.compat.llm2vec import LLM2Vec

    terminal.quiet_libraries()
    return LLM2Vec.from_pretrained(name, dtype=dtype, quantize=quantize, compile=compile)


def _to_file(
    load: Load, write: Callable[..., Encoded], source: Source, skip: bool
) -> tuple[Encoded, float | None]:
    """Encode into one file; see `_to_folder` for what is returned."""
    try:
        with terminal.waiting(f"checking {source.name}"):
            total = sum(source.survey(skip)) if source.on_disk else None
        with terminal.waiting("loading the model"):
            model = load()
        with terminal.Line() as line:
            done = write(model, progress=_counter(line, 0, total))
        return done, model.backbone.device_time.waited
    except KeyboardInterrupt:
        terminal.say(f"interrupted: {ONE_FILE_KEPT}")
        raise typer.Exit(INTERRUPTED) from None


def _to_folder(
    load: Load, write: Callable[..., Encoded], path: Path, actors: int | None
) -> tuple[Encoded, float | None]:
    """Encode into a folder of shards.

    Args:
        load, write: load the model; and encode and write, given an engine.
        path: the folder.
        actors: number of models on Ray, 0 for one per GPU; None for one model in this process.

    Returns:
        What was written, and the share of the time that the device waited, if it is known.
    """
    from unmasked.corpus import Local, OnRay

    try:
        with ExitStack() as stack:
            engine: Local | OnRay = Local(load)
            if actors is not None:
                with terminal.waiting("starting Ray"):
                    engine = stack.enter_context(OnRay(load, actors))

            def begin(done: int, total: int | None) -> Progress:
                return _counter(stack.enter_context(terminal.Line()), done, total)

            done = write(engine, announce=terminal.waiting, begin=begin)
        if isinstance(engine, Local):
            return done, engine.ask(lambda model: model.backbone.device_time.waited)
        return done, None
    except KeyboardInterrupt:
        terminal.say(f"interrupted: {path} has whole shards only; run the same command to continue")
        raise typer.Exit(INTERRUPTED) from None


def _counter(line: terminal.Line, before: int, total: int | None) -> Progress:
    """Shows the rows done, `before` of them by earlier runs, and the speed of this run."""
    begun, tokens_before = time.monotonic(), 0
    line.begin("encoding")
    line.advance(before, total)

    def told(rows: int, tokens: int | None) -> None:
        nonlocal tokens_before
        if rows == before:  # no row is written yet: these tokens were for the ranges of int8
            tokens_before = tokens or 0
            return
        seconds = max(time.monotonic() - begun, 1e-9)
        notes = [f"{(rows - before) / seconds:,.0f} texts/s"]
        if tokens is not None:
            notes.append(f"{(tokens - tokens_before) / seconds:,.0f} tokens/s")
        line.advance(rows, total, *notes)

    return told
