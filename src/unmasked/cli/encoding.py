"""Verbs that make encoders and vectors: convert, encode."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from unmasked.cli.options import DTYPE, MODEL, Dtype, Pooling, Quantize
from unmasked.errors import OutputError


def convert(
    model: MODEL,
    output: Annotated[Path, typer.Option("-o", "--output", help="New folder.")],
    peft: Annotated[
        list[str] | None, typer.Option(help="Adapter to merge; repeat for more, in order.")
    ] = None,
    pooling: Annotated[
        Pooling | None, typer.Option(help="By default what the folder says, else mean.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Longest input, in tokens.", show_default="512")
    ] = None,
    dtype: DTYPE = Dtype.checkpoint,
    attention: Annotated[
        str | None, typer.Option(help="sdpa, eager, ...; transformers chooses by default.")
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Accept layers that stay causal (hybrids).")
    ] = False,
) -> None:
    """Take the causal mask off, prove it, save an encoder; no training.

    Stock sentence-transformers loads the folder to the same vectors.
    """
    from unmasked.cli import running, terminal

    _check_new(output)
    with terminal.waiting(f"loading {model}"):
        from unmasked.compat.llm2vec import LLM2Vec

        terminal.quiet_libraries()
        encoder = LLM2Vec.from_pretrained(
            model,
            list(peft or []),
            pooling_mode=pooling.value if pooling else None,
            max_length=max_length,
            dtype=dtype.value,
            attn_implementation=attention,
            allow_partial=allow_partial,
        )
    terminal.show(encoder.report.summary())
    with terminal.waiting("saving"):
        encoder.save(output)
    running.close(output)


class Format(str, Enum):
    """What shards are."""

    parquet = "parquet"
    npy = "npy"
    safetensors = "safetensors"


class Precision(str, Enum):
    """What a stored number is."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"
    binary = "binary"


class OnError(str, Enum):
    """What a row without a vector is."""

    fail = "fail"
    skip = "skip"


class Engine(str, Enum):
    """Where models run."""

    local = "local"
    ray = "ray"


def encode(
    model: MODEL,
    texts: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help=".txt, .jsonl, .csv (each perhaps .gz or .zst) or .parquet; a folder of them; "
            "hf:NAME[:SUBSET[:SPLIT]], a Hugging Face data set; - is stdin.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "-o", "--output", help="Folder of shards; or one .npy, .parquet or .safetensors file."
        ),
    ],
    text_column: Annotated[str, typer.Option(help="What holds the text, but in .txt.")] = "text",
    keep: Annotated[
        str | None, typer.Option(help="Columns to put beside the vectors: a,b,c.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text put before every input.")] = None,
    prompt_name: Annotated[str | None, typer.Option(help="Prompt of the model, by name.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most texts a forward.", show_default="by tokens")
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Vectors of length 1.")] = False,
    truncate_dim: Annotated[
        int | None, typer.Option(min=1, help="Keep the first numbers of each vector.")
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Of the stored numbers; binary is a bit each.")
    ] = Precision.float32,
    ranges: Annotated[
        Path | None,
        typer.Option(help="_ranges.npy of another run, for int8.", show_default="measured"),
    ] = None,
    format: Annotated[
        Format | None, typer.Option(help="Of the shards in a folder.", show_default="parquet")
    ] = None,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows of the input in a shard.")] = 32768,
    shard: Annotated[
        str | None, typer.Option(metavar="i/n", help="This is the i-th of n machines.")
    ] = None,
    on_error: Annotated[
        OnError, typer.Option(help="Rows without a usable text: stop, or list and pass over.")
    ] = OnError.fail,
    max_bytes: Annotated[int, typer.Option(min=1, help="A text so long is an error.")] = 1_000_000,
    engine: Annotated[Engine, typer.Option(help="ray: one model an actor.")] = Engine.local,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Models at a time, with ray.", show_default="GPUs")
    ] = None,
    dtype: DTYPE = Dtype.auto,
    quantize: Annotated[
        Quantize | None,
        typer.Option(
            help="8-bit weights of the model, faster and a little off, which is measured: int8 on "
            "a CPU, fp8 on a GPU. What is stored is --precision.",
            show_default="none",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Texts of any number to vectors on disk, row for row.

    A folder is continued by the same command: what is whole in it is kept.
    """
    from unmasked.cli import encoding_run

    name = Path(output)
    if format is not None and name.suffix and not output.endswith("/"):
        raise OutputError(f"{output} is one file, whose suffix says its kind. Fix: no --format.")
    from unmasked.corpus import Encoding, Shards, parse_part
    from unmasked.files.source import Source

    encoding_run.encode(
        encoding_run.Loader(model, dtype.value, quantize.value if quantize else None),
        Source(texts, text_column, keep=_words(keep), max_bytes=max_bytes),
        output,
        Encoding(prompt, prompt_name, batch_size, normalize, truncate_dim, precision.value),
        Shards(
            f".{(format or Format.parquet).value}",
            shard_rows,
            part=parse_part(shard) if shard else (1, 1),
            skip=on_error is OnError.skip,
            ranges=ranges,
        ),
        workers=(workers or 0) if engine is Engine.ray else None,
        overwrite=overwrite,
    )


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _check_new(folder: Path) -> None:
    """Refuse to write into a folder that has something in it, before any work is done."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file. Fix: name a new folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"{folder} exists and is not empty. Fix: name a new folder.")
