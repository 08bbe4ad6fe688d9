"""Files of vectors (.npy, .parquet, .safetensors), written window by window.

Cost: one window in memory. The libraries that write .npy and .safetensors want all vectors at once;
here the header is written first, and once more when the number of rows is known.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import IO, Any, NamedTuple

import numpy as np

from unmasked.errors import OutputError

OUTPUTS = (".npy", ".parquet", ".safetensors")
Header = Callable[[np.dtype[Any], int, int], bytes]
"""Gives the header of a file for a type, a width and a number of rows, of the same length for any.
"""


class Window(NamedTuple):
    """Some rows and their vectors.

    Attributes:
        rows: N positions in the source, from 0.
        ids: N names, or Nones.
        kept: for each of the N rows, one value per kept column.
        vectors: (N, D), as stored.
    """

    rows: Sequence[int]
    ids: Sequence[str | None]
    kept: Sequence[tuple[object, ...]]
    vectors: np.ndarray


def check_columns(keep: Sequence[str], kind: str) -> None:
    """Refuse kept columns that a file of this kind cannot hold."""
    if keep and kind != ".parquet":
        raise OutputError(f"{kind} holds vectors only. Fix: .parquet, or no --keep.")
    own = {"row", "id", "vector"} & set(keep)
    if own or len(set(keep)) < len(keep):
        word = f"'{own.pop()}' is a column of the output already" if own else "a column is repeated"
        raise OutputError(f"--keep {','.join(keep)}: {word}. Fix: leave it out.")


def make_writer(
    kind: str,
    file: IO[bytes],
    dtype: np.dtype[Any],
    width: int,
    has_ids: bool = False,
    keep: Sequence[tuple[str, str]] = (),
) -> FlatWriter | ParquetWriter:
    """A writer that takes windows in order; the file is complete once the writer is closed.

    Args:
        kind: the suffix of the output, one of `OUTPUTS`.
        file: the open file to write to.
        dtype: type of the stored numbers.
        width: how many numbers a stored vector has.
        has_ids: whether the rows have names.
        keep: names and Arrow types of the kept columns; only .parquet holds them.
    """
    if kind == ".parquet":
        return ParquetWriter(file, dtype, width, has_ids, keep)
    return FlatWriter(file, dtype, width, _npy_header if kind == ".npy" else _safetensors_header)


class FlatWriter:
    """One vector after the other, behind a header that is rewritten when their number is known."""

    def __init__(self, file: IO[bytes], dtype: np.dtype[Any], width: int, header: Header) -> None:
        self.file, self.rows = file, 0
        self._header = partial(header, dtype, width)
        file.write(self._header(0))

    def write(self, window: Window) -> None:
        self.file.write(window.vectors.tobytes())
        self.rows += len(window.vectors)

    def close(self) -> None:
        self.file.seek(0)
        self.file.write(self._header(self.rows))


def _npy_header(dtype: np.dtype[Any], width: int, rows: int) -> bytes:
    descr = np.lib.format.dtype_to_descr(dtype)
    header = io.BytesIO()
    # numpy pads the header so that the first axis can grow in place.
    np.lib.format.write_array_header_1_0(
        header, {"descr": descr, "fortran_order": False, "shape": (rows, width)}
    )
    return header.getvalue()


def _safetensors_header(dtype: np.dtype[Any], width: int, rows: int) -> bytes:
    """8 bytes of length and JSON padded with spaces; the vectors are the tensor ``vectors``."""
    kind = {"f4": "F32", "f2": "F16", "i1": "I8", "u1": "U8"}[dtype.str[1:]]
    offsets = [0, rows * width * dtype.itemsize]
    tensor = {"dtype": kind, "shape": [rows, width], "data_offsets": offsets}
    text = json.dumps({"vectors": tensor}, separators=(",", ":")).encode().ljust(256)
    return len(text).to_bytes(8, "little") + text


class ParquetWriter:
    """One row group per window: ``row``, ``id``, the kept columns, ``vector``."""

    def __init__(
        self,
        file: IO[bytes],
        dtype: np.dtype[Any],
        width: int,
        has_ids: bool,
        keep: Sequence[tuple[str, str]],
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.has_ids, ids = has_ids, [("id", pa.string())] if has_ids else []
        beside = [("row", pa.int64()), *ids, *((n, pa.type_for_alias(kind)) for n, kind in keep)]
        self.vector = pa.list_(pa.from_numpy_dtype(dtype), width)
        self.schema = pa.schema([*beside, ("vector", self.vector)])
        words = [name for name, _ in beside]
        # Vectors do not compress; everything beside them does.
        self.table_writer = pq.ParquetWriter(
            file,
            self.schema,
            compression=dict.fromkeys(words, "zstd"),
            use_dictionary=words[1:],
            write_statistics=words[:1],
        )

    def write(self, window: Window) -> None:
        import pyarrow as pa

        columns: list[Any] = [window.rows, *([window.ids] if self.has_ids else [])]
        columns += zip(*window.kept, strict=True) if window.kept else ()
        types = self.schema.types[:-1]
        arrays = [pa.array(list(column), kind) for column, kind in zip(columns, types, strict=True)]
        flat = pa.array(window.vectors.reshape(-1))
        arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=self.vector))
        self.table_writer.write_table(pa.table(arrays, schema=self.schema))

    def close(self) -> None:
        self.table_writer.close()
