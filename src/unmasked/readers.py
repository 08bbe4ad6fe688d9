"""Rows of one file of any kind, as they stand, before anything is asked of their text.

A reader yields `Cells`: the number of the row and its columns, or what is wrong with it. What
cannot be told apart into rows (broken quotes in .csv, half a .gz, no such column) raises
`DataError` at once; what spoils one row only is yielded, and the caller decides.

Memory: one line, or one batch of rows of .parquet. Cost: about 600 thousand lines of .txt, or 280
thousand of .jsonl, a second.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from unmasked.errors import DataError, nearest

KINDS = (".txt", ".jsonl", ".csv", ".parquet")
PACKED = (".gz", ".zst")
HUB = "hf:"
"""Before the name of a Hugging Face data set: ``hf:OWNER/NAME``, ``hf:OWNER/NAME:SUBSET:SPLIT``."""
LONGEST_LINE = 1 << 26
"""Bytes (64 MiB). A file without line breaks must not be read into memory whole."""
_PARQUET_ROWS = 1024

Fault = tuple[str, str]
"""What is wrong with a row, and how to mend it."""


class Cells(NamedTuple):
    """A row as it was read.

    Attributes:
        number: its line, or its place in .parquet, from 1.
        values: column → value.
        fault: what is wrong with it and how to mend it; then it has no values.
    """

    number: int
    values: Mapping[str, object]
    fault: Fault | None = None


def kind_of(path: str) -> str | None:
    """``.txt``, ``.jsonl``, ``.csv`` or ``.parquet``; None for what cannot be read."""
    bare = path
    for suffix in PACKED:
        bare = bare.removesuffix(suffix)
    kind = Path(bare).suffix
    return kind if kind in KINDS and not (kind == ".parquet" and bare != path) else None


def read(path: str, name: str, column: str, wanted: Iterable[str]) -> Iterator[Cells]:
    """Every row of a file, of standard input (``-``), or of a data set (``hf:NAME``).

    Args:
        path: what to read; its kind is in its name.
        name: what errors call it.
        column: what the text is called; it has to be there.
        wanted: other columns to read where they exist.

    Raises:
        DataError: it cannot be told apart into rows.
    """
    if path.startswith(HUB):
        yield from _hub(path, name, column, wanted)
        return
    kind = ".txt" if path == "-" else kind_of(path)
    if kind == ".parquet":
        yield from _parquet(path, name, column, wanted)
        return
    with _opened(path) as file:
        lines = _lines(file, name)
        if kind == ".csv":
            yield from _csv(lines, name, column)
        elif kind == ".jsonl":
            yield from _json(lines)
        else:
            yield from _text(lines, column)


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    if path == "-":
        yield sys.stdin.buffer
    elif path.endswith(".zst"):
        import pyarrow as pa

        with pa.OSFile(path) as raw, pa.CompressedInputStream(raw, "zstd") as stream:
            yield io.BufferedReader(stream, 1 << 16)
    elif path.endswith(".gz"):
        with gzip.open(path, "rb") as file:
            yield file  # type: ignore[misc]
    else:
        with Path(path).open("rb") as file:
            yield file


def _lines(file: IO[bytes], name: str) -> Iterator[bytes]:
    number = 0
    try:
        for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE), b""), start=1):
            if len(line) == LONGEST_LINE:
                given = f"longer than {LONGEST_LINE >> 20} MiB"
                raise fault_error(f"{name}, line {number}", (given, "give one text a line"))
            yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name}: not a whole gzip file ({error}).") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise DataError(f"{name}: not a whole zstd file ({error}).") from error


def _not_utf8(error: UnicodeDecodeError) -> Fault:
    given = f"not UTF-8 (byte {error.object[error.start]:#04x} at position {error.start})"
    return given, "convert the file, as with iconv -f latin1 -t utf-8"


def _text(lines: Iterable[bytes], column: str) -> Iterator[Cells]:
    for number, line in enumerate(lines, start=1):
        try:
            yield Cells(number, {column: line.decode().rstrip("\r\n")})
        except UnicodeDecodeError as error:
            yield Cells(number, {}, _not_utf8(error))


def _json(lines: Iterable[bytes]) -> Iterator[Cells]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield Cells(number, {}, _not_utf8(error))
        except (ValueError, RecursionError) as error:
            yield Cells(number, {}, (f"not JSON ({error})", "one object a line"))
        else:
            if isinstance(row, dict):
                yield Cells(number, row)
            else:
                yield Cells(number, {}, (f"a {type(row).__name__}", "one object a line"))


def _csv(lines: Iterable[bytes], name: str, column: str) -> Iterator[Cells]:
    csv.field_size_limit(2**31 - 1)
    # A row may span lines, so a byte that is no UTF-8 is carried along and found in its row.
    reader = csv.reader((line.decode("utf-8", "surrogateescape") for line in lines), strict=True)
    try:
        header = next(reader, [])
        if column not in header:
            raise fault_error(f"{name}, line 1", absent(column, header))
        for cells in reader:
            number = reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                given = f"{len(cells)} columns instead of {len(header)}"
                yield Cells(number, {}, (given, "quote texts that hold a comma"))
            else:
                yield _decoded(number, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        where = f"{name}, line {reader.line_num}"
        raise fault_error(where, (f"not CSV ({error})", "mend the quotes")) from error


def _decoded(number: int, values: dict[str, str]) -> Cells:
    for cell in values.values():
        if not cell.isascii():
            try:
                cell.encode("utf-8", "surrogateescape").decode()
            except UnicodeDecodeError as error:
                return Cells(number, {}, _not_utf8(error))
    return Cells(number, values)


def _parquet(path: str, name: str, column: str, wanted: Iterable[str]) -> Iterator[Cells]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            if column not in there:
                raise fault_error(f"{name}, row 1", absent(column, there))
            columns = [word for word in dict.fromkeys((column, *wanted)) if word in there]
            number = 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=columns):
                for values in _batch_rows(batch, columns):
                    number += 1
                    if isinstance(values, UnicodeDecodeError):
                        yield Cells(number, {}, _not_utf8(values))
                    else:
                        yield Cells(number, values)
    except pa.ArrowException as error:
        raise DataError(f"{name}: not a whole Parquet file ({error}).") from error


def _batch_rows(batch: Any, columns: list[str]) -> Iterator[dict[str, object] | UnicodeDecodeError]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # somewhere in the batch: cell by cell, then
        for index in range(batch.num_rows):
            try:
                yield {word: batch.column(word)[index].as_py() for word in columns}
            except UnicodeDecodeError as error:
                yield error


def _hub(path: str, name: str, column: str, wanted: Iterable[str]) -> Iterator[Cells]:
    from datasets import load_dataset

    word, subset, split = (*path.removeprefix(HUB).split(":"), "", "")[:3]
    try:
        rows = load_dataset(word, subset or None, split=split or "train", streaming=True)
        there = rows.column_names
        if there is not None:
            if column not in there:
                raise fault_error(f"{name}, row 1", absent(column, there))
            rows = rows.select_columns([w for w in dict.fromkeys((column, *wanted)) if w in there])
        for number, values in enumerate(rows, start=1):
            yield Cells(number, values)
    except (OSError, ValueError) as error:  # its own errors are of many kinds, below these two
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name}: cannot be read as a Hugging Face data set: {error}") from error


def absent(column: str, columns: Iterable[str], option: str = "--text-column") -> Fault:
    """What is wrong where a column is not there, and how to mend it."""
    columns = list(columns)
    hint = nearest(column, columns).rstrip("?")
    return (
        f"no column '{column}' among {', '.join(columns) or 'none'}{hint}",
        f"name it with {option}",
    )


def fault_error(where: str, fault: Fault) -> DataError:
    """The error for a fault."""
    return DataError(f"{where}: {fault[0]}. Fix: {fault[1]}.")
