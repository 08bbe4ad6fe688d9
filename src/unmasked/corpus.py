"""From a file of texts to a file of vectors, in windows, so that neither has to fit in memory.

A file is read twice: once to check and count every row, because a fault in the last line should not
come to light after hours of encoding, and once to encode. Standard input is read once. The output
is written aside and moved into place when it is whole.

Cost: the first reading (about a million rows a second), and memory for one window of texts and
vectors. Within a window, texts are sorted by length, so larger windows waste less on padding.

Row i of the output is row i of the input: nothing is skipped, so an empty text is an error.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np

from unmasked.errors import DataError, OutputError, unknown
from unmasked.source import Record, Source

if TYPE_CHECKING:
    from unmasked.model import LLM2Vec

OUTPUTS = (".npy", ".parquet")
WINDOW = {"cpu": 2048}
"""Texts encoded at a time: enough to sort by length, few enough to see progress."""
_WINDOW = 16384


@dataclass(frozen=True)
class Encoding:
    """How texts become vectors: options of `LLM2Vec.encode`; None is the model's own way."""

    prompt: str | None = None
    prompt_name: str | None = None
    batch_size: int | None = None
    normalize: bool = False
    truncate_dim: int | None = None

    def check(self, model: LLM2Vec) -> None:
        """Refuse what the model cannot do; `DataError` names what it can."""
        if self.prompt is not None and self.prompt_name is not None:
            raise DataError("a prompt and the name of one were given. Fix: give one of them.")
        if self.prompt_name is not None and self.prompt_name not in model.prompts:
            raise DataError(unknown("prompt name", self.prompt_name, model.prompts))
        width = model.get_embedding_dimension() or 0
        if self.truncate_dim is not None and not 1 <= self.truncate_dim <= width:
            raise DataError(f"truncate_dim {self.truncate_dim} should be from 1 to {width}.")

    def __call__(self, model: LLM2Vec, texts: list[str]) -> np.ndarray:
        """(N, D) float32 vectors of N texts."""
        vectors = model.encode(
            texts,
            prompt=self.prompt,
            prompt_name=self.prompt_name,
            batch_size=self.batch_size,
            normalize_embeddings=self.normalize,
            truncate_dim=self.truncate_dim,
            show_progress_bar=False,
        )
        return np.ascontiguousarray(vectors, dtype="<f4")


def check_output(path: Path, overwrite: bool = False) -> None:
    """Refuse an output file that exists or is of an unknown kind, before any work is done.

    Raises:
        OutputError: it exists (and `overwrite` is False), is a folder, or has another suffix.
    """
    if path.suffix not in OUTPUTS:
        raise OutputError(f"{path}: unknown kind of output. Allowed: {', '.join(OUTPUTS)}.")
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Fix: name a file in it.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists. Fix: another name, or --overwrite.")


def encode_corpus(
    model: LLM2Vec,
    source: Source,
    output: str | Path,
    encoding: Encoding | None = None,
    *,
    overwrite: bool = False,
    window: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[int, int]:
    """Encode every text of a source into a file.

    Args:
        model: the encoder.
        source: the texts.
        output: ``.npy``, (N, D) float32; or ``.parquet``, with the columns ``row`` (int64, from 0),
            ``id`` (string, where the source has ids) and ``vector`` (D float32).
        encoding: prompt, normalisation and the like.
        overwrite: replace an output that exists.
        window: texts encoded at a time.
        progress: told how many rows are done.

    Returns:
        N and D.

    Raises:
        DataError: see `Source.records`; or a vector is not finite.
        OutputError: see `check_output`.
    """
    encoding = encoding or Encoding()
    output = Path(output)
    check_output(output, overwrite)
    encoding.check(model)
    width = encoding.truncate_dim or model.get_embedding_dimension() or 0
    window = window or WINDOW.get(model.device.type, _WINDOW)
    records, rows = source.records(), 0
    with _written_aside(output) as file:
        writer: _Writer = (_NpyWriter if output.suffix == ".npy" else _ParquetWriter)(file, width)
        while batch := list(islice(records, window)):
            vectors = encoding(model, [text for _, text, _ in batch])
            _check_finite(source, batch, vectors)
            writer.write(rows, [name for _, _, name in batch], vectors)
            rows += len(batch)
            progress(rows)
        writer.close(rows)
    return rows, width


def _check_finite(source: Source, batch: list[Record], vectors: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise DataError(
            f"{source.name}, line {batch[int(bad[0])][0]}: the vector is NaN or infinite. "
            "Fix: --dtype float32 or bfloat16 (float16 overflows), or mend the text."
        )


@contextmanager
def _written_aside(path: Path) -> Iterator[IO[bytes]]:
    """A new file beside `path` that takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    aside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)  # mkstemp makes it private
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


class _Writer(Protocol):
    def write(self, start: int, ids: list[str | None], vectors: np.ndarray) -> None: ...
    def close(self, rows: int) -> None: ...


class _NpyWriter:
    """Vectors one after the other behind a header that learns their number last."""

    def __init__(self, file: IO[bytes], width: int) -> None:
        self.file, self.width = file, width
        self._write_header(0)

    def write(self, start: int, ids: list[str | None], vectors: np.ndarray) -> None:
        self.file.write(vectors.tobytes())

    def close(self, rows: int) -> None:
        self.file.seek(0)
        self._write_header(rows)

    def _write_header(self, rows: int) -> None:
        # numpy pads the header so that the first axis can grow in place.
        shape = {"descr": "<f4", "fortran_order": False, "shape": (rows, self.width)}
        np.lib.format.write_array_header_1_0(self.file, shape)


class _ParquetWriter:
    """A row group a window."""

    def __init__(self, file: IO[bytes], width: int) -> None:
        self.file, self.width = file, width
        self.table_writer: Any = None

    def write(self, start: int, ids: list[str | None], vectors: np.ndarray) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {"row": pa.array(range(start, start + len(vectors)), pa.int64())}
        if ids[0] is not None:
            columns["id"] = pa.array(ids, pa.string())
        columns["vector"] = pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.reshape(-1)), self.width
        )
        table = pa.table(columns)
        if self.table_writer is None:
            self.table_writer = pq.ParquetWriter(self.file, table.schema)
        self.table_writer.write_table(table)

    def close(self, rows: int) -> None:
        self.table_writer.close()
