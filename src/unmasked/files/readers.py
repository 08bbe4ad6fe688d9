"""The rows of one file of any kind as they stand, before anything is asked of their text.

A reader yields `Cells`: the number of a row and its columns, or what is wrong with it. A file that
cannot be divided into rows (an open quote in .csv, half a .gz, a missing column) raises `DataError`
at once; what spoils a single row is yielded, and the caller decides. No library is used where one
exists, as `datasets` and pandas tell neither file nor line of a fault.

Memory: one line, or one batch of rows of .parquet. Speed: about 600 thousand lines of .txt, or 280
thousand of .jsonl, per second.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from unmasked.errors import DataError, nearest

KINDS = (".txt", ".jsonl", ".csv", ".parquet")
HUB = "hf:"
"""Before the name of a Hugging Face data set: ``hf:OWNER/NAME``, ``hf:OWNER/NAME:SUBSET:SPLIT``."""
LONGEST_LINE = 1 << 26
"""Bytes (64 MiB). A file without line breaks must not be read into memory whole."""
_PARQUET_ROWS = 1024

Fault = tuple[str, str]
"""What is wrong with a row, and how to correct it."""


class Cells(NamedTuple):
    """A row as it was read.

    Attributes:
        number: its line, or its place in .parquet and data sets, from 1.
        values: column → value; empty if there is a fault.
        fault: what is wrong with it and how to correct it.
    """

    number: int
    values: Mapping[str, Any]
    fault: Fault | None = None


def kind_of(path: str) -> str | None:
    """``.txt``, ``.jsonl``, ``.csv`` or ``.parquet``; None for what cannot be read."""
    bare = path.removesuffix(".gz").removesuffix(".zst")
    kind = Path(bare).suffix
    return kind if kind in KINDS and not (kind == ".parquet" and bare != path) else None


def called(path: str) -> str:
    """The name of a file in errors."""
    return "standard input" if path == "-" else path


def where(path: str, number: int) -> str:
    """``a.txt, line 3``."""
    word = "row" if path.startswith(HUB) or kind_of(path) == ".parquet" else "line"
    return f"{called(path)}, {word} {number}"


def read(path: str, required: Mapping[str, str], wanted: Iterable[str] = ()) -> Iterator[Cells]:
    """Every row of a file, of standard input (``-``), or of a data set (``hf:NAME``).

    Args:
        path: what to read; its kind is in its name.
        required: columns that must be there, each with the fix for a file without it. A line of
            .txt is the first of them; a row of .jsonl may still lack one.
        wanted: other columns to read where they exist.

    Raises:
        DataError: it cannot be divided into rows.
    """
    kind = ".txt" if path == "-" else kind_of(path)
    if path.startswith(HUB):
        yield from _hub(path, required, wanted)
    elif kind == ".parquet":
        yield from _parquet(path, required, wanted)
    elif kind == ".txt":
        yield from read_txt(path, next(iter(required)))
    else:
        with _opened(path) as file:
            lines = _lines(file, path)
            yield from _csv(lines, path, required) if kind == ".csv" else _json(lines)


def hub_parts(path: str) -> tuple[str, ...]:
    """Name, subset and split of ``hf:NAME:SUBSET:SPLIT``, empty where they are not given."""
    return (*path.removeprefix(HUB).split(":"), "", "")[:3]


def read_txt(path: str, column: str) -> Iterator[Cells]:
    """Every line of a file, whatever its name, without its line break."""
    with _opened(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            try:
                yield Cells(number, {column: line.decode().rstrip("\r\n")})
            except UnicodeDecodeError as error:
                yield Cells(number, {}, not_utf8(error))


def read_tsv(path: str, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Line number and the named columns of each row of a .tsv file with a header.

    Cells are not quoted, so none can hold a tab or a line break. Blank lines are skipped.

    Raises:
        DataError: a line is not UTF-8, a column is missing, a row has more or fewer cells than the
            header, or there is no row; names file, line and fix.
    """
    fix = f"begin with the header {', '.join(columns)}, separated by tabs; rows below"
    rows = checked(path, read_txt(path, "line"))
    lines = ((number, row["line"].split("\t")) for number, row in rows if row["line"].strip(" "))
    header: list[str] = next((cells for _, cells in lines), [])
    if not header:
        raise fault_error(path, ("the file is empty", fix))
    _columns(path, header, dict.fromkeys(columns, fix))
    number = 0
    for number, cells in lines:
        if len(cells) != len(header):
            line = "\t".join(cells)[:60]
            given = f"{len(cells)} columns instead of {len(header)} in {line!r}"
            fix = "put one tab between columns, none inside a text"
            raise fault_error(where(path, number), (given, fix))
        yield number, [cells[header.index(column)] for column in columns]
    if not number:
        raise fault_error(path, ("the file is empty below its header", "add rows"))


def checked(path: str, rows: Iterable[Cells]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and columns of each row; the first one with a fault raises `DataError`."""
    for number, values, fault in rows:
        if fault is not None:
            raise fault_error(where(path, number), fault)
        yield number, values


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    if path == "-":
        yield sys.stdin.buffer
    elif path.endswith(".zst"):
        import pyarrow as pa

        with pa.OSFile(path) as raw, pa.CompressedInputStream(raw, "zstd") as stream:
            yield io.BufferedReader(stream, 1 << 16)
    else:
        with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as file:
            yield file  # type: ignore[misc]


def _lines(file: IO[bytes], path: str) -> Iterator[bytes]:
    number = 0
    try:
        for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE), b""), start=1):
            if len(line) == LONGEST_LINE:
                given = f"longer than {LONGEST_LINE >> 20} MiB"
                raise fault_error(where(path, number), (given, "give one text per line"))
            yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}).") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise DataError(f"{path}: not a whole zstd file ({error}).") from error


def not_utf8(error: UnicodeDecodeError) -> Fault:
    """The fault of bytes that are no UTF-8."""
    given = f"not UTF-8 (byte {error.object[error.start]:#04x} at position {error.start})"
    return given, "convert the file, as with iconv -f latin1 -t utf-8"


def _json(lines: Iterable[bytes]) -> Iterator[Cells]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield Cells(number, {}, not_utf8(error))
        except (ValueError, RecursionError) as error:
            yield Cells(number, {}, (f"not JSON ({error})", "one object a line"))
        else:
            if isinstance(row, dict):
                yield Cells(number, row)
            else:
                yield Cells(number, {}, (f"a {type(row).__name__}", "one object a line"))


def _csv(lines: Iterable[bytes], path: str, required: Mapping[str, str]) -> Iterator[Cells]:
    csv.field_size_limit(2**31 - 1)
    # A row may span lines, so a byte that is not UTF-8 is carried along and found in its row.
    reader = csv.reader((line.decode("utf-8", "surrogateescape") for line in lines), strict=True)
    try:
        header = next(reader, [])
        _columns(path, header, required)
        for cells in filter(None, reader):
            values, fault = dict(zip(header, cells, strict=False)), None
            if len(cells) != len(header):
                given = f"{len(cells)} columns instead of {len(header)}"
                fault = (given, "quote texts that hold a comma")
            else:
                try:
                    for cell in values.values():
                        if not cell.isascii():
                            cell.encode("utf-8", "surrogateescape").decode()
                except UnicodeDecodeError as error:
                    fault = not_utf8(error)
            yield Cells(reader.line_num, {} if fault else values, fault)
    except csv.Error as error:
        given = f"not CSV ({error})"
        raise fault_error(where(path, reader.line_num), (given, "correct the quotes")) from error


def _parquet(path: str, required: Mapping[str, str], wanted: Iterable[str]) -> Iterator[Cells]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow.names, required, wanted)
            batches = file.iter_batches(_PARQUET_ROWS, columns=columns)
            rows = (row for batch in batches for row in _batch_rows(batch, columns))
            for number, (values, fault) in enumerate(rows, start=1):
                yield Cells(number, values, fault)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a whole Parquet file ({error}).") from error


def _batch_rows(batch: Any, columns: list[str]) -> Iterator[tuple[dict[str, Any], Fault | None]]:
    try:
        yield from ((values, None) for values in batch.to_pylist())
    except UnicodeDecodeError:  # somewhere in the batch, so cell by cell
        for index in range(batch.num_rows):
            try:
                yield {word: batch.column(word)[index].as_py() for word in columns}, None
            except UnicodeDecodeError as error:
                yield {}, not_utf8(error)


def _hub(path: str, required: Mapping[str, str], wanted: Iterable[str]) -> Iterator[Cells]:
    from datasets import load_dataset

    word, subset, split = hub_parts(path)
    try:
        rows = load_dataset(word, subset or None, split=split or "train", streaming=True)
        if rows.column_names is not None:
            rows = rows.select_columns(_columns(path, rows.column_names, required, wanted))
        yield from (Cells(number, values) for number, values in enumerate(rows, start=1))
    except (OSError, RuntimeError, ValueError) as error:  # its own are of many kinds, below these
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: cannot be read as a Hugging Face data set: {error}. "
            "Fix: check its name, subset and split; a file needs its suffix."
        ) from error


def _columns(
    path: str, there: Sequence[str], required: Mapping[str, str], wanted: Iterable[str] = ()
) -> list[str]:
    """The columns to read; refuses a file without one that is required."""
    for column, fix in required.items():
        if column not in there:
            raise fault_error(where(path, 1), absent(column, there, fix))
    return [column for column in dict.fromkeys((*required, *wanted)) if column in there]


def string_fault(column: str, value: object) -> Fault | None:
    """What is wrong with a value that has to be text, if anything is."""
    if not isinstance(value, str):
        given = "null" if value is None else f"a {type(value).__name__}"
        return f"'{column}' is {given}", "give a string"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        given = f"half a surrogate pair in '{column}' at character {error.start}"
        return given, "write the whole character"
    return None


def absent(column: str, there: Iterable[str], fix: str) -> Fault:
    """The fault of a row or a file without a column."""
    there = list(there)
    hint = nearest(column, there, end="").rstrip("?")
    return f"no column '{column}' among {', '.join(there) or 'none'}{hint}", fix


def fault_error(where: str, fault: Fault) -> DataError:
    """The error for a fault, and for the place where it is."""
    given, fix = fault
    return DataError(f"{where}: {given}{'' if given.endswith(('.', '?')) else '.'} Fix: {fix}.")
