"""Reads the rows of a file of any kind, before their texts are checked.

A reader yields `Cells`: the number of a row and its columns, or what is wrong with it. A file that
cannot be divided into rows (an open quote in .csv, a truncated .gz, a missing column) raises
`DataError` at once; a problem of a single row is yielded. (pandas names neither file nor line.)

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from unmasked.errors import DataError, nearest
from unmasked.files.content import LOOKED_AT, Fault, file_fault, row_fault, separator
from unmasked.files.hub import HUB, hub_rows, named_hub_errors

KINDS = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
LONGEST_LINE = 1 << 26
"""Bytes (64 MiB). A file without line breaks must not be read into memory as one line."""
Wanted = Iterable[str] | Callable[[Sequence[str]], Iterable[str]]
"""Optional columns, or a function that chooses from the columns of a file."""
_PARQUET_ROWS = 1024
_BOM = b"\xef\xbb\xbf"


class Cells(NamedTuple):
    """A row as it was read."""

    number: int  # its line, or its place in .parquet and data sets, from 1
    values: Mapping[str, Any]  # column → value; empty if there is a fault
    fault: Fault | None = None  # what is wrong with it and how to correct it


def kind_of(path: str) -> str | None:
    """One of `KINDS`; None for a file that cannot be read."""
    bare = path.lower().removesuffix(".gz").removesuffix(".zst")  # A.TXT as well
    kind, packed = Path(bare).suffix, len(bare) < len(path)
    return kind if kind in KINDS and not (kind == ".parquet" and packed) else None


def called(path: str) -> str:
    """The name of a file in errors."""
    return "standard input" if path == "-" else path


def where(path: str, number: int) -> str:
    """``a.txt, line 3``."""
    word = "row" if path.startswith(HUB) or kind_of(path) == ".parquet" else "line"
    return f"{called(path)}, {word} {number}"


def read(path: str, required: Mapping[str, str], wanted: Wanted = ()) -> Iterator[Cells]:
    """Every row of a file, of standard input (``-``), or of a data set (``hf:NAME``).

    Args:
        path: what to read; its suffix says its kind.
        required: columns that must exist, each with the fix for a file without it. A line of .txt
            is the first of them. In .jsonl they are not checked here: a row may lack one.
        wanted: optional columns; every row of .jsonl has all of its own.

    Raises:
        DataError: the file cannot be divided into rows, or its content is of another kind.
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
            if kind == ".jsonl":
                yield from _json(lines, path)
            else:
                yield from (_csv if kind == ".csv" else _tsv)(lines, path, required, wanted)


def read_txt(path: str, column: str) -> Iterator[Cells]:
    """Every line of a file, whatever its suffix, without its line break."""
    with _opened(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            try:
                text = line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield Cells(number, {}, row_fault(path, error))
            else:
                fault = string_fault(column, text)
                yield Cells(number, {} if fault else {column: text}, fault)


def read_tsv(path: str, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Line number and the named columns of each row of a .tsv file with a header.

    Cells are not quoted, so none can hold a tab or a line break. Blank lines are skipped.

    Raises:
        DataError: a line is not UTF-8, a column is missing, a row has more or fewer cells than the
            header, or there is no row; names file, line and fix.
    """
    fix = f"begin with the header {', '.join(columns)}, separated by tabs; rows below"
    number = 0
    with _opened(path) as file:
        rows = _tsv(_lines(file, path), path, dict.fromkeys(columns, fix))
        for number, row in checked(path, rows):
            yield number, [row[column] for column in columns]
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
    elif path.lower().endswith(".zst"):
        import pyarrow as pa

        with pa.OSFile(path) as raw, pa.CompressedInputStream(raw, "zstd") as stream:
            yield io.BufferedReader(stream, 1 << 16)
    else:
        with gzip.open(path) if path.lower().endswith(".gz") else Path(path).open("rb") as file:
            yield file  # type: ignore[misc]


def _lines(file: IO[bytes], path: str) -> Iterator[bytes]:
    number = 0
    try:
        stream = file if hasattr(file, "peek") else io.BufferedReader(file)  # type: ignore[type-var]
        if fault := file_fault(path, stream.peek(LOOKED_AT)[:LOOKED_AT]):
            raise fault_error(called(path), fault)
        for number, line in enumerate(iter(partial(stream.readline, LONGEST_LINE), b""), start=1):
            if len(line) == LONGEST_LINE:
                given = f"longer than {LONGEST_LINE >> 20} MiB"
                raise fault_error(where(path, number), (given, "give one text per line"))
            yield line.removeprefix(_BOM)  # any line: files with a BOM may have been joined
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise half_a_file(path, "gzip", error) from error
    except OSError as error:
        if error.errno is not None:  # the operating system's; pyarrow's for bad zstd have none
            raise
        raise half_a_file(path, "zstd", error) from error


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; refuses a repeated key, of which Python would keep the last value."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice}' is given twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct_keys)


def _json(lines: Iterable[bytes], path: str) -> Iterator[Cells]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _DECODER.decode(line.decode())
        except UnicodeDecodeError as error:
            yield Cells(number, {}, row_fault(path, error))
        except (ValueError, RecursionError) as error:
            yield Cells(number, {}, (f"not JSON ({error})", "write one object per line"))
        else:
            if isinstance(row, dict):
                yield Cells(number, row)
            else:
                yield Cells(number, {}, (f"a {type(row).__name__}", "write one object per line"))


def _csv(
    lines: Iterable[bytes], path: str, required: Mapping[str, str], wanted: Wanted = ()
) -> Iterator[Cells]:
    csv.field_size_limit(2**31 - 1)
    # A row may span lines, so bytes that are not UTF-8 are found only when it is complete.
    decoded = (line.decode("utf-8", "surrogateescape") for line in lines)
    first, between, mark = separator(next(decoded, ""))
    reader = csv.reader(chain([first], decoded), delimiter=between, strict=True)
    try:
        if not (header := next(filter(None, reader), [])):
            raise fault_error(path, ("the file is empty", "begin with a header, rows below"))
        _columns(path, header, required, wanted)
        for cells in filter(None, reader):
            values, fault = _by_name(header, cells, f"quote texts that have {mark} in them")
            try:
                for cell in values.values():
                    if not cell.isascii():
                        cell.encode("utf-8", "surrogateescape").decode()
            except UnicodeDecodeError as error:
                values, fault = {}, row_fault(path, error)
            yield Cells(reader.line_num, values, fault)
    except csv.Error as error:
        fault = f"not CSV ({error})", "correct the quotes"
        raise fault_error(where(path, reader.line_num), fault) from error


def _tsv(
    lines: Iterable[bytes], path: str, required: Mapping[str, str], wanted: Wanted = ()
) -> Iterator[Cells]:
    header: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip(b" \r\n"):
            continue
        try:
            cells = line.decode().rstrip("\r\n").split("\t")
        except UnicodeDecodeError as error:
            if not header:
                raise fault_error(where(path, number), row_fault(path, error)) from error
            yield Cells(number, {}, row_fault(path, error))
            continue
        if not header:
            header = cells
            _columns(path, header, required, wanted)
            continue
        values, fault = _by_name(header, cells, "put one tab between columns, none inside a text")
        if fault is None and b"\0" in line:
            column = next(name for name, cell in values.items() if "\0" in cell)
            values, fault = {}, string_fault(column, values[column])
        yield Cells(number, values, fault)
    if not header:
        fix = next(iter(required.values()), "begin with a header, its columns separated by tabs")
        raise fault_error(path, ("the file is empty", fix))


def _by_name(
    header: Sequence[str], cells: Sequence[str], fix: str
) -> tuple[dict[str, str], Fault | None]:
    """The cells of a row by their columns, or a fault and no cells."""
    if len(cells) != len(header):
        shown = f" in {' '.join(cells)[:60]!r}" if cells else ""
        return {}, (f"{len(cells)} columns instead of {len(header)}{shown}", fix)
    if len(header) > 1 and list(cells) == list(header):
        return {}, ("the header again, probably because files were joined", "remove the line")
    return dict(zip(header, cells, strict=True)), None


def _parquet(path: str, required: Mapping[str, str], wanted: Wanted) -> Iterator[Cells]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow.names, required, wanted)
            batches = file.iter_batches(_PARQUET_ROWS, columns=columns)
            rows = (row for batch in batches for row in _batch_rows(path, batch, columns))
            for number, (values, fault) in enumerate(rows, start=1):
                yield Cells(number, values, fault)
    except pa.ArrowException as error:
        raise half_a_file(path, "Parquet", error) from error


def _batch_rows(
    path: str, batch: Any, columns: list[str]
) -> Iterator[tuple[dict[str, Any], Fault | None]]:
    try:
        yield from ((values, None) for values in batch.to_pylist())
    except (UnicodeDecodeError, OverflowError):  # somewhere in the batch: find the row
        for index in range(batch.num_rows):
            try:
                yield {name: batch.column(name)[index].as_py() for name in columns}, None
            except (UnicodeDecodeError, OverflowError) as error:
                yield {}, row_fault(path, error)


def _hub(path: str, required: Mapping[str, str], wanted: Wanted) -> Iterator[Cells]:
    rows = hub_rows(path)
    with named_hub_errors(path):
        if rows.column_names is not None:
            rows = rows.select_columns(_columns(path, rows.column_names, required, wanted))
        yield from (Cells(number, values) for number, values in enumerate(rows, start=1))


def _columns(
    path: str, there: Sequence[str], required: Mapping[str, str], wanted: Wanted = ()
) -> list[str]:
    """The columns to read; refuses a missing required column, or a repeated one."""
    for column, fix in required.items():
        if column not in there:
            raise fault_error(where(path, 1), absent(column, there, fix))
    if twice := [name for name in dict.fromkeys(there) if name and there.count(name) > 1]:
        given = f"the header has '{twice[0]}' {there.count(twice[0])} times: {', '.join(there)}"
        raise fault_error(where(path, 1), (given, "give every column a name of its own"))
    chosen = wanted(there) if callable(wanted) else wanted
    return [column for column in dict.fromkeys((*required, *chosen)) if column in there]


def string_fault(column: str, value: object) -> Fault | None:
    """What is wrong with a value that must be text; None if it can be used."""
    if not isinstance(value, str):
        given = "null" if value is None else f"a {type(value).__name__}"
        return f"'{column}' is {given}", "give a string"
    if "\0" in value:
        given = f"a NUL character in '{column}' at character {value.index(chr(0))}"
        return given, "remove it; if there are many, the file is not in UTF-8"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        given = f"half a surrogate pair in '{column}' at character {error.start}"
        return given, "write the whole character"
    return None


def absent(column: str, there: Iterable[str], fix: str) -> Fault:
    """The fault of a row or a file that lacks a column."""
    there = list(there)
    hint = nearest(column, there, end="").rstrip("?")
    return f"no column '{column}' among {', '.join(there) or 'none'}{hint}", fix


def fault_error(where: str, fault: Fault) -> DataError:
    """The error for a fault and its place."""
    given, fix = fault
    return DataError(f"{where}: {given}{'' if given.endswith(('.', '?')) else '.'} Fix: {fix}.")


def half_a_file(path: str, kind: str, error: Exception) -> DataError:
    """The error for a file that is incomplete, or is not what its name says."""
    fix = "download it or write it again, or name it as what it is"
    return fault_error(path, (f"not a whole {kind} file ({error})", fix))
