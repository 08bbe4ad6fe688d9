"""Texts, one after the other, from a file or standard input, each checked as it is read.

Every fault is told with its line. Blank lines are no rows in .jsonl and .csv; in .txt a line is a
row, so that, in a corpus to encode, a blank one is an error and never shifts the rows behind it.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from unmasked.errors import DataError, nearest

KINDS = (".txt", ".jsonl", ".csv")
ID_COLUMNS = ("id", "_id")

Record = tuple[int, str, str | None]
"""(line, text, id) of a row."""


@dataclass(frozen=True)
class Source:
    """Where texts come from.

    Attributes:
        path: a .txt (a text a line), .jsonl or .csv file, perhaps .gz; ``-`` is standard input,
            a text a line.
        column: which column or key holds the text; .txt has none.
        skip_blank: pass over texts of white space instead of refusing them (for training, where
            no row of a result has to line up).
    """

    path: str
    column: str = "text"
    skip_blank: bool = False

    @property
    def name(self) -> str:
        """What errors call it."""
        return "standard input" if self.path == "-" else self.path

    @property
    def again(self) -> bool:
        """Whether it can be read twice."""
        return self.path != "-"

    def records(self) -> Iterator[Record]:
        """Every row, checked.

        Raises:
            DataError: no such file, another kind of file, not UTF-8, no such column, a text that
                is missing, no string or empty, or no row at all; names file and line.
        """
        read = {".jsonl": self._json_records, ".csv": self._csv_records}.get(
            self._kind(), self._text_records
        )
        empty = True
        with self._open() as file:
            for record in read(self._lines(file)):
                if self.skip_blank and not record[1].strip():
                    continue
                empty = False
                yield record
        if empty:
            raise DataError(f"{self.name}: there is no text in it.")

    def count(self) -> int:
        """Check every row; how many there are."""
        return sum(1 for _ in self.records())

    def _kind(self) -> str:
        if self.path == "-":
            return ".txt"
        kind = Path(self.path.removesuffix(".gz")).suffix
        if kind not in KINDS:
            raise DataError(
                f"{self.path}: unknown kind of file. Allowed: {', '.join(KINDS)}, each perhaps "
                "with .gz behind, or - for standard input."
            )
        return kind

    def _open(self) -> AbstractContextManager[Iterable[bytes]]:
        path = Path(self.path)
        if self.path == "-":
            return nullcontext(sys.stdin.buffer)
        if not path.is_file():
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"{path} is not a file{nearest(path.name, siblings)}")
        return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")

    def _lines(self, file: Iterable[bytes]) -> Iterator[str]:
        number = 0
        try:
            for number, raw in enumerate(file, start=1):
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise self._fault(
                number,
                f"not UTF-8 (byte {error.object[error.start]:#04x} at position {error.start})",
                "convert the file, as with iconv -f latin1 -t utf-8",
            ) from error
        except (gzip.BadGzipFile, EOFError) as error:
            raise DataError(f"{self.name}: not a whole gzip file ({error}).") from error

    def _text_records(self, lines: Iterable[str]) -> Iterator[Record]:
        for number, line in enumerate(lines, start=1):
            yield number, self._checked(number, line.rstrip("\r\n")), None

    def _json_records(self, lines: Iterable[str]) -> Iterator[Record]:
        key, first = None, True
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise self._fault(number, f"not JSON ({error})", "one object a line") from error
            if not isinstance(row, dict):
                raise self._fault(number, f"a {type(row).__name__}", "one object a line")
            if self.column not in row:
                raise self._no_column(number, list(row))
            if first:
                key, first = next((name for name in ID_COLUMNS if name in row), None), False
            text = self._checked(number, row[self.column])
            yield number, text, None if key is None else self._id(number, row.get(key))

    def _csv_records(self, lines: Iterable[str]) -> Iterator[Record]:
        csv.field_size_limit(2**31 - 1)
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
            if self.column not in header:
                raise self._no_column(1, header)
            at = header.index(self.column)
            key = next((header.index(name) for name in ID_COLUMNS if name in header), None)
            for row in reader:
                number = reader.line_num
                if not row:
                    continue
                if len(row) != len(header):
                    given = f"{len(row)} columns instead of {len(header)}"
                    raise self._fault(number, given, "quote texts that hold a comma")
                text = self._checked(number, row[at])
                yield number, text, None if key is None else self._id(number, row[key])
        except csv.Error as error:
            raise self._fault(reader.line_num, f"not CSV ({error})", "mend the quotes") from error

    def _checked(self, number: int, text: object) -> str:
        if not isinstance(text, str):
            given = "null" if text is None else f"a {type(text).__name__}"
            raise self._fault(number, f"'{self.column}' is {given}", "give a string")
        if not text.strip() and not self.skip_blank:
            raise self._fault(number, "an empty text, which has no vector", "remove the row")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            given = f"half a surrogate pair at character {error.start}"
            raise self._fault(number, given, "write the whole character") from error
        return text

    def _id(self, number: int, value: object) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int):
            given = "no id, though the first row has one"
            raise self._fault(number, given, "give every row an id, a string or whole number")
        return str(value)

    def _no_column(self, number: int, columns: list[str]) -> DataError:
        found = f"no column '{self.column}' among {', '.join(columns) or 'none'}"
        hint = nearest(self.column, columns).rstrip("?")
        return self._fault(number, found + hint, "name it with --text-column")

    def _fault(self, number: int, given: str, fix: str) -> DataError:
        return DataError(f"{self.name}, line {number}: {given}. Fix: {fix}.")
