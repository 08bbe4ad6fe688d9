"""Files of vectors (.npy, .safetensors, .parquet), written window by window.

The libraries of the first two formats write a file only if all vectors are in memory. Here the
header is written first, and again when the number of rows is known. Cost: one window in memory.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import IO, Any

import numpy as np

from unmasked.errors import DataError

OUTPUTS = (".npy", ".parquet", ".safetensors")
SAID = "unmasked"  # key of the settings that one file has in its metadata, as JSON
Columns = Sequence[Sequence[object]]  # values of the columns beside the vectors, N per column


def make_writer(
    kind: str,
    file: IO[bytes],
    dtype: np.dtype[Any],
    width: int,
    columns: Sequence[tuple[str, Any]] = (),
    said: Mapping[str, Any] | None = None,
) -> FlatWriter | ParquetWriter:
    """A writer that takes windows in order; the file is complete once the writer is closed.

    Args:
        kind: the suffix of the output, one of `OUTPUTS`.
        dtype, width: type of the stored numbers, and how many of them a vector has.
        columns: names and Arrow types (or their names) of the columns beside the vector; only
            .parquet has them, and the first is the row number.
        said: settings to write into the file; .npy has no place for them.
    """
    if kind == ".parquet":
        return ParquetWriter(file, dtype, width, columns, said)
    if kind == ".npy":
        return FlatWriter(file, partial(_npy, dtype, width))
    return FlatWriter(file, partial(_safetensors, dtype, width, said))


class FlatWriter:
    """Writes vectors one after the other, after a header that is rewritten on closing.

    The header must have the same length for every number of rows.
    """

    def __init__(self, file: IO[bytes], header: Callable[[int], bytes]) -> None:
        self.file, self.header, self.rows = file, header, 0
        file.write(header(0))

    def write(self, columns: Columns, vectors: np.ndarray) -> None:
        self.file.write(vectors.tobytes())
        self.rows += len(vectors)

    def close(self) -> None:
        self.file.seek(0)
        self.file.write(self.header(self.rows))


def _npy(dtype: np.dtype[Any], width: int, rows: int) -> bytes:
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    # numpy pads the header, so its length is the same for any number of rows.
    said = {"descr": descr, "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(header, said)
    return header.getvalue()


def _safetensors(
    dtype: np.dtype[Any], width: int, given: Mapping[str, Any] | None, rows: int
) -> bytes:
    """8 bytes of length, then JSON padded with spaces; the tensor is called ``vectors``."""
    kind = {"f4": "F32", "f2": "F16", "i1": "I8", "u1": "U8"}[dtype.str[1:]]
    place = [0, rows * width * dtype.itemsize]
    said: dict[str, Any] = {} if given is None else {"__metadata__": {SAID: json.dumps(given)}}
    said["vectors"] = {"dtype": kind, "shape": [rows, width], "data_offsets": place}
    text = json.dumps(said, separators=(",", ":")).encode().ljust(256)
    return len(text).to_bytes(8, "little") + text


class ParquetWriter:
    """Writes the columns, then ``vector``, a fixed-size list; each window is a row group."""

    def __init__(
        self,
        file: IO[bytes],
        dtype: np.dtype[Any],
        width: int,
        columns: Sequence[tuple[str, Any]],
        said: Mapping[str, Any] | None = None,
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        fields = [
            (name, pa.type_for_alias(kind) if isinstance(kind, str) else kind)
            for name, kind in columns
        ]
        vector = pa.list_(pa.from_numpy_dtype(dtype), width)
        metadata = None if said is None else {SAID: json.dumps(said)}
        self.schema = pa.schema([*fields, ("vector", vector)], metadata)
        names = [name for name, _ in columns]
        # Vectors do not compress; everything beside them does.
        self.table_writer = pq.ParquetWriter(
            file,
            self.schema,
            compression=dict.fromkeys(names, "zstd"),
            use_dictionary=names[1:],
            write_statistics=names[:1],
        )

    def write(self, columns: Columns, vectors: np.ndarray) -> None:
        import pyarrow as pa

        *fields, vector = self.schema
        arrays = [_array(columns[0], *pair) for pair in zip(columns, fields, strict=True)]
        flat = pa.array(vectors.reshape(-1))
        arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=vector.type))
        self.table_writer.write_table(pa.table(arrays, schema=self.schema))

    def close(self) -> None:
        self.table_writer.close()


def _array(numbers: Sequence[object], values: Sequence[object], field: Any) -> Any:
    """An Arrow column; if a value cannot have its type, the error names the row."""
    import pyarrow as pa

    wrong = (pa.ArrowException, OverflowError, TypeError, UnicodeEncodeError)
    try:
        return pa.array(list(values), field.type)
    except wrong:
        for number, value in zip(numbers, values, strict=True):  # finds the row
            try:
                pa.array([value], field.type)
            except wrong as error:
                raise DataError(
                    f"row {number} (from 0): '{field.name}' is {value!r:.40}, which the type "
                    f"{field.type} of the column cannot hold. Fix: correct the row, or leave "
                    f"'{field.name}' out of --keep."
                ) from error
        raise
