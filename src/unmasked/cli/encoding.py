"""Verbs that make encoders and vectors: convert, encode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmasked.cli.options import DTYPE, MODEL, Dtype, Pooling
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
    dtype: DTYPE = Dtype.auto,
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
        from unmasked.model import LLM2Vec

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


def encode(
    model: MODEL,
    texts: Annotated[
        str,
        typer.Argument(metavar="INPUT", help=".txt, .jsonl or .csv, perhaps .gz; - is stdin."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help=".npy or .parquet file.")],
    text_column: Annotated[str, typer.Option(help="Where .jsonl and .csv hold the text.")] = "text",
    prompt: Annotated[str | None, typer.Option(help="Text put before every input.")] = None,
    prompt_name: Annotated[str | None, typer.Option(help="Prompt of the model, by name.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most texts a forward.", show_default="by tokens")
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Vectors of length 1.")] = False,
    truncate_dim: Annotated[
        int | None, typer.Option(min=1, help="Keep the first numbers of each vector.")
    ] = None,
    dtype: DTYPE = Dtype.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Texts of any number to a file of vectors, row for row."""
    from unmasked.cli import terminal
    from unmasked.corpus import Encoding, check_output, encode_corpus
    from unmasked.source import Source

    check_output(output, overwrite)
    source = Source(texts, text_column)
    with terminal.waiting(f"checking {source.name}"):
        total = source.count() if source.again else None
    with terminal.waiting(f"loading {model}"):
        from unmasked.model import LLM2Vec

        terminal.quiet_libraries()
        encoder = LLM2Vec.from_pretrained(model, dtype=dtype.value)
    with terminal.Line() as line:
        rows, width = encode_corpus(
            encoder,
            source,
            output,
            Encoding(prompt, prompt_name, batch_size, normalize, truncate_dim),
            overwrite=overwrite,
            progress=line.counter("encoding", "texts", total),
        )
    terminal.show(f"{rows:,} vectors of {width} numbers in {output}")


def _check_new(folder: Path) -> None:
    """Refuse to write into a folder that has something in it, before any work is done."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file. Fix: name a new folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"{folder} exists and is not empty. Fix: name a new folder.")
