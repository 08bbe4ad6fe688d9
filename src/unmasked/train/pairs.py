"""Rows of query, positive and negatives, from files and the hub, each checked as it is read.

Every fault is told with its file and line. What was checked is kept in one Arrow file that is
mapped into memory, so that a mix of data sets larger than memory can be trained on.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset

from unmasked.config import Pairs
from unmasked.errors import DataError, nearest

KINDS = (".jsonl", ".csv", ".parquet")
_CHUNK = 8192  # rows written at a time
_STRING = pa.string()
_TYPES = (_STRING, _STRING, pa.list_(_STRING), pa.int32(), pa.int64())

Fields = Iterator[tuple[int, dict[str, Any]]]
"""Number, from 1, and columns of each line or row."""


class Row(NamedTuple):
    """One row of a data set.

    Attributes:
        query, positive: texts.
        negatives: texts that do not answer the query, perhaps none.
        source: which data set of the stage it is from.
        number: which row of it, from 0.
    """

    query: str
    positive: str
    negatives: list[str]
    source: int
    number: int


def read_rows(pairs: Pairs, source: int = 0) -> Iterator[Row]:
    """The rows of a data set, checked.

    Raises:
        DataError: no such file, an unknown kind, no such column, a text that is missing or empty,
            fewer than two rows; names file, line and fix.
    """
    number = -1
    for number, (line, fields) in enumerate(_fields(pairs)):
        if number == pairs.max_rows:
            break
        query = _text(pairs, line, fields, pairs.query)
        positive = _text(pairs, line, fields, pairs.positive)
        yield Row(query, positive, _negatives(pairs, line, fields), source, number)
    if number < 1:
        given = "one row" if number == 0 else "no row"
        raise DataError(
            f"{pairs.path}: {given}, but a query is told to find its document among those of other "
            "rows. Fix: give at least two rows."
        )


def check_rows(data: Sequence[Pairs]) -> None:
    """Read everything once.

    Raises:
        DataError: as `read_rows`, or there is no data set.
    """
    if not data:
        raise DataError("no pairs to train on were given. Fix: supervised.data=FILE.")
    for pairs in data:
        for _ in read_rows(pairs):
            pass


def store_rows(data: Sequence[Pairs], file: Path) -> None:
    """Write the rows of all data sets to an Arrow file, which `Dataset.from_file` maps.

    Raises:
        DataError: as `read_rows`.
    """
    schema = pa.schema(list(zip(Row._fields, _TYPES, strict=True)))
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".tmp")
    rows = (row for index, pairs in enumerate(data) for row in read_rows(pairs, index))
    with pa.ipc.new_stream(str(aside), schema) as writer:
        for chunk in _chunks(rows):
            columns = zip(zip(*chunk, strict=True), _TYPES, strict=True)
            arrays = [pa.array(values, kind) for values, kind in columns]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    aside.replace(file)


def split_rows(rows: Dataset, held_out: int, seed: int) -> tuple[Dataset, Dataset]:
    """Rows to train on, and some (at most a tenth) that never are."""
    count = min(held_out, len(rows) // 10)
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _text(pairs: Pairs, line: int, fields: dict[str, Any], column: str) -> str:
    if column not in fields:
        found = f"no column '{column}' among {', '.join(fields) or 'none'}"
        fix = f"name the column, as with {{path: {pairs.path}, {_setting(pairs, column)}: NAME}}"
        raise _fault(pairs.path, line, found + nearest(column, fields).rstrip("?"), fix)
    return _checked(pairs, line, column, fields[column])


def _negatives(pairs: Pairs, line: int, fields: dict[str, Any]) -> list[str]:
    column = pairs.negative if pairs.negative in fields else "negatives"
    given = fields.get(column)
    if given is None:
        return []
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list):
        raise _fault(pairs.path, line, f"'{column}' is a {type(given).__name__}", "give a list")
    return [_checked(pairs, line, column, text) for text in texts]


def _checked(pairs: Pairs, line: int, column: str, text: object) -> str:
    if not isinstance(text, str):
        given = "null" if text is None else f"a {type(text).__name__}"
        raise _fault(pairs.path, line, f"'{column}' is {given}", "give a string")
    if not text.strip():
        fix = "remove it" if column in (pairs.negative, "negatives") else "remove the row"
        raise _fault(pairs.path, line, f"'{column}' is empty, which has no vector", fix)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        given = f"half a surrogate pair in '{column}' at character {error.start}"
        raise _fault(pairs.path, line, given, "write the whole character") from error
    return text


def _setting(pairs: Pairs, column: str) -> str:
    return "query" if column == pairs.query else "positive"


def _fields(pairs: Pairs) -> Fields:
    path = Path(pairs.path)
    kind = Path(pairs.path.removesuffix(".gz")).suffix
    readers = {".jsonl": _from_jsonl, ".csv": _from_csv, ".parquet": _from_parquet}
    if path.is_file():
        if kind not in KINDS:
            raise DataError(
                f"{path}: unknown kind of file. Allowed: {', '.join(KINDS)}, the first two perhaps "
                "with .gz behind."
            )
        return readers[kind](path)
    if kind in KINDS or path.is_absolute() or pairs.path.count("/") > 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path} is not a file{nearest(path.name, siblings)}")
    return _from_hub(pairs)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file as text; DataError for what is not UTF-8 or not gzip."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        given = f"not UTF-8 (byte {error.object[error.start]:#04x} at position {error.start})"
        fix = "convert the file, as with iconv -f latin1 -t utf-8"
        raise _fault(path, number, given, fix) from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}).") from error


def _from_jsonl(path: Path) -> Fields:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _fault(path, number, f"not JSON ({error})", "one object a line") from error
        if not isinstance(row, dict):
            raise _fault(path, number, f"a {type(row).__name__}", "one object a line")
        yield number, row


def _from_csv(path: Path) -> Fields:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_lines(path), strict=True)
    try:
        header = next(reader, [])
        for row in reader:
            if row and len(row) != len(header):
                given = f"{len(row)} columns instead of {len(header)}"
                fix = "quote texts that hold a comma"
                raise _fault(path, reader.line_num, given, fix)
            if row:
                yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise _fault(path, reader.line_num, f"not CSV ({error})", "mend the quotes") from error


def _from_parquet(path: Path) -> Fields:
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file ({error}).") from error


def _from_hub(pairs: Pairs) -> Fields:
    try:
        rows = load_dataset(pairs.path, pairs.subset, split=pairs.split)
    except Exception as error:  # the library's own range from 404 to a missing configuration
        raise DataError(
            f"{pairs.path} is no file here, and as a data set of the hub it cannot be read: "
            f"{type(error).__name__}: {str(error)[:200]}. Fix: check the name, subset and split."
        ) from error
    yield from enumerate(rows, start=1)


def _fault(path: str | Path, line: int, given: str, fix: str) -> DataError:
    return DataError(f"{path}, line {line}: {given}. Fix: {fix}.")
