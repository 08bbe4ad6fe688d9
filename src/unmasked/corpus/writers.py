"""Files of vectors, written window by window, so that none has to fit in memory.

Cost: one window in memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import IO, Any, Protocol

import numpy as np

OUTPUTS = (".npy", ".parquet", ".safetensors")


class Writer(Protocol):
    """Takes windows of vectors in order."""

    def write(self, window: Window) -> None: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...


class Window:
    """Some rows and their vectors.

    Attributes:
        rows: (N,) places in the source, from 0.
        ids: N names, or Nones.
        kept: for each of the N rows, a value for each column kept.
        vectors: (N, D), as stored.
    """

    def __init__(
        self,
        rows: Sequence[int],
        ids: Sequence[str | None],
        kept: Sequence[tuple[object, ...]],
        vectors: np.ndarray,
    ) -> None:
        self.rows, self.ids, self.kept, self.vectors = rows, ids, kept, vectors


def make_writer(
    kind: str,
    file: IO[bytes],
    dtype: np.dtype[Any],
    width: int,
    has_ids: bool = False,
    keep: Sequence[tuple[str, str]] = (),
) -> Writer:
    """A writer of one of `OUTPUTS`.

    Args:
        kind: its suffix.
        file: where to.
        dtype: of the stored vectors.
        width: how many numbers each has.
        has_ids: whether rows have names.
        keep: names and Arrow types of the columns kept; only .parquet holds them.
    """
    if kind == ".parquet":
        return _ParquetWriter(file, dtype, width, has_ids, keep)
    return (_NpyWriter if kind == ".npy" else _SafetensorsWriter)(file, dtype, width)


class _NpyWriter:
    """Vectors one after the other behind a header that learns their number last."""

    def __init__(self, file: IO[bytes], dtype: np.dtype[Any], width: int) -> None:
        self.file, self.dtype, self.width, self.rows = file, dtype, width, 0
        self.write_header()

    def write(self, window: Window) -> None:
        self.file.write(window.vectors.tobytes())
        self.rows += len(window.vectors)

    def close(self) -> None:
        self.file.seek(0)
        self.write_header()

    def abandon(self) -> None:
        pass

    def write_header(self) -> None:
        # numpy pads the header so that the first axis can grow in place.
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.rows, self.width),
        }
        np.lib.format.write_array_header_1_0(self.file, header)


class _SafetensorsWriter(_NpyWriter):
    """The same, as the tensor ``vectors``: 8 bytes of length, JSON padded with spaces, the data."""

    HEADER = 256
    NAMES = {"f4": "F32", "f2": "F16", "i1": "I8", "u1": "U8"}  # noqa: RUF012

    def write_header(self) -> None:
        header = {
            "vectors": {
                "dtype": self.NAMES[self.dtype.str[1:]],
                "shape": [self.rows, self.width],
                "data_offsets": [0, self.rows * self.width * self.dtype.itemsize],
            }
        }
        text = json.dumps(header, separators=(",", ":")).encode().ljust(self.HEADER)
        self.file.write(len(text).to_bytes(8, "little") + text)


class _ParquetWriter:
    """A row group a window: ``row``, ``id``, the columns kept, ``vector``."""

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

        self.width, self.has_ids = width, has_ids
        fields = [("row", pa.int64())]
        if has_ids:
            fields.append(("id", pa.string()))
        fields += [(name, pa.type_for_alias(kind)) for name, kind in keep]
        fields.append(("vector", pa.list_(pa.from_numpy_dtype(dtype), width)))
        self.schema = pa.schema(fields)
        words = [name for name, _ in fields[:-1]]
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

        columns: list[Any] = [window.rows]
        if self.has_ids:
            columns.append(window.ids)
        columns += zip(*window.kept, strict=True) if window.kept else ()
        arrays = [
            pa.array(list(values), field.type)
            for values, field in zip(columns, self.schema, strict=False)
        ]
        flat = pa.array(window.vectors.reshape(-1))
        arrays.append(pa.FixedSizeListArray.from_arrays(flat, self.width))
        self.table_writer.write_table(pa.table(arrays, schema=self.schema))

    def close(self) -> None:
        self.table_writer.close()

    def abandon(self) -> None:
        self.table_writer.is_open = False  # or it would close itself later, and complain
