"""Texts, one after the other, from files, a folder of them, standard input or a data set.

Every row is checked as it is read, and a fault is told with its file and line. What spoils one row
(no UTF-8, no string, empty, too long) is handed on as a row with a fault, so that whoever reads may
refuse it or pass over it; what leaves the rows uncertain is always an error (see `readers`). Blank
lines are no rows in .jsonl and .csv; in .txt a line is a row, so that, in a corpus to encode, a
blank one is a fault and never shifts the rows behind it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from unmasked.errors import DataError, nearest
from unmasked.files.readers import (
    HUB,
    KINDS,
    Cells,
    Fault,
    absent,
    called,
    fault_error,
    kind_of,
    read,
    string_fault,
    where,
)

ID_COLUMNS = ("id", "_id")
_ON_THE_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]*){0,2}")

Record = tuple[int, str, str | None]
"""(line, text, id) of a row."""


class Row(NamedTuple):
    """A row of a source.

    Attributes:
        file: its place in `Source.files`.
        number: its line, or its place in .parquet and data sets, from 1.
        text: empty where there is a fault.
        id: what the source calls it, if it calls its rows anything.
        kept: values of the columns in `Source.keep`.
        fault: why it has no text, and how to mend it.
    """

    file: int
    number: int
    text: str
    id: str | None = None
    kept: tuple[object, ...] = ()
    fault: Fault | None = None


@dataclass(frozen=True)
class Source:
    """Where texts come from.

    Attributes:
        path: a .txt (a text a line), .jsonl or .csv file, each perhaps .gz or .zst, or .parquet; a
            folder of such files; ``hf:NAME``, a Hugging Face data set, streamed; ``-`` is standard
            input, a text a line.
        column: which column or key holds the text; .txt has none.
        skip_blank: pass over texts of white space instead of refusing them (for training, where
            no row of a result has to line up).
        keep: columns to hand on beside the text.
        max_bytes: a text of so many bytes or more is a fault; None for no limit.
    """

    path: str
    column: str = "text"
    skip_blank: bool = False
    keep: tuple[str, ...] = ()
    max_bytes: int | None = None

    @property
    def name(self) -> str:
        """What errors call it."""
        return called(self.path)

    @property
    def again(self) -> bool:
        """Whether it can be read twice."""
        return self.path != "-"

    @property
    def on_disk(self) -> bool:
        """Whether it is made of files, whose bytes say whether it is still the same."""
        return self.path != "-" and not self.files[0].startswith(HUB)

    @cached_property
    def files(self) -> list[str]:
        """What it is made of, in the order it is read: paths, ``-``, or ``hf:NAME``.

        Raises:
            DataError: no such file, another kind of file, or a folder with none in it.
        """
        return ["-"] if self.path == "-" else find_files(self.path)

    @property
    def ignored(self) -> list[str]:
        """Files of other kinds in the folder."""
        path = Path(self.path)
        return [str(f) for f in _visible(path) if not kind_of(str(f))] if path.is_dir() else []

    @cached_property
    def names(self) -> list[str]:
        """What the files are called, the same on every machine: paths inside the folder."""
        root = Path(self.path)
        if root.is_dir():
            return [Path(file).relative_to(root).as_posix() for file in self.files]
        return [Path(file).name if self.on_disk else file for file in self.files]

    def rows(self, first_file: int = 0) -> Iterator[Row]:
        """Every row of the files from `first_file` on, good or at fault.

        Raises:
            DataError: what `files` raises, or a file cannot be told apart into rows.
        """
        key, _ = self.layout
        wanted = self.keep if key is None else (key, *self.keep)
        for index in range(first_file, len(self.files)):
            for cells in read(self.files[index], self._required, wanted):
                row = self._row(index, cells)
                if not (self.skip_blank and row.fault is None and not row.text.strip()):
                    yield row

    def records(self) -> Iterator[Record]:
        """Every row, or an error for the first that has a fault.

        Raises:
            DataError: what `rows` raises, a fault, or no row at all; names file and line.
        """
        empty = True
        for row in self.rows():
            if row.fault is not None:
                raise self.error(row)
            empty = False
            yield row.number, row.text, row.id
        if empty:
            raise DataError(f"{self.name}: there is no text in it.")

    def count(self) -> int:
        """Check every row; how many there are."""
        return sum(1 for _ in self.records())

    def survey(self, skip: bool = False) -> list[int]:
        """How many rows each file has; refuses a fault unless `skip`.

        Raises:
            DataError: as `records`.
        """
        counts = [0] * len(self.files)
        for row in self.rows():
            if row.fault is not None and not skip:
                raise self.error(row)
            counts[row.file] += 1
        if not sum(counts):
            raise DataError(f"{self.name}: there is no text in it.")
        return counts

    def error(self, row: Row) -> DataError:
        """What is said of a row with a fault."""
        assert row.fault is not None
        given, fix = row.fault
        if self.max_bytes is not None:
            fix += "; or pass over such rows with --on-error skip, which lists them"
        return fault_error(self.where(row), (given, fix))

    def where(self, row: Row) -> str:
        """``a.txt, line 3``."""
        return where(self.files[row.file], row.number)

    @property
    def _required(self) -> dict[str, str]:
        training = f"call it '{self.column}'"  # which has no such option
        return {self.column: training if self.skip_blank else "name it with --text-column"}

    @cached_property
    def layout(self) -> tuple[str | None, list[str]]:
        """The column of ids, if there is one, and the types (Arrow's names) of those to keep.

        The first good row decides, so that every part of the result has the same columns.
        """
        path = self.files[0]
        if path == "-" or kind_of(path) == ".txt":
            if self.keep:
                raise DataError(f"{self.name}: lines of text have no columns to keep.")
            return None, []
        wanted = (*ID_COLUMNS, *self.keep)
        for path in self.files:
            for cells in read(path, self._required, wanted):
                if cells.fault is None:
                    there = list(cells.values)
                    for name in self.keep:
                        if name not in there:
                            raise fault_error(path, absent(name, there, "name it with --keep"))
                    key = next((name for name in ID_COLUMNS if name in there), None)
                    return key, [_type_name(cells.values[name]) for name in self.keep]
        return None, ["string"] * len(self.keep)

    def _row(self, file: int, cells: Cells) -> Row:
        key, types = self.layout
        fault, values = cells.fault, cells.values
        if fault is None and self.column not in values:
            fault = absent(self.column, values, self._required[self.column])
        text = values.get(self.column)
        if fault is None:
            fault = self._text_fault(text)
        name = None
        if fault is None and key is not None:
            value = values.get(key)
            if isinstance(value, bool) or not isinstance(value, str | int):
                fault = (
                    "no id, though the first row has one",
                    "give every row an id, a string or whole number",
                )
            name = str(value)
            fault = fault or string_fault(key, name)
        kept: tuple[object, ...] = ()
        if fault is None and self.keep:
            kept, fault = _kept_values(values, self.keep, types)
        if fault is not None:
            return Row(file, cells.number, "", fault=fault)
        assert isinstance(text, str)
        return Row(file, cells.number, text, name, kept)

    def _text_fault(self, text: object) -> Fault | None:
        if (fault := string_fault(self.column, text)) is not None:
            return fault
        assert isinstance(text, str)
        if not text.strip() and not self.skip_blank:
            return "an empty text, which has no vector", "remove the row"
        size = len(text.encode()) if self.max_bytes is not None else 0
        if self.max_bytes is not None and size >= self.max_bytes:
            given = f"a text of {size:,} bytes, of which only the beginning would count"
            return given, f"cut it into passages, or allow it with --max-bytes {size + 1}"
        return None


def find_files(path: str, kinds: Sequence[str] = KINDS) -> list[str]:
    """What a name stands for, in the order it is read: files, or ``hf:NAME``.

    Args:
        path: a file, a folder, ``hf:NAME``, or ``OWNER/NAME`` where there is no such folder.
        kinds: suffixes of `KINDS` that can be used.

    Raises:
        DataError: no such file, another kind of file, or a folder with none in it.
    """
    place = Path(path)
    if path.startswith(HUB):
        return [path]
    if place.is_dir():
        found = [str(file) for file in _visible(place) if kind_of(str(file)) in kinds]
        if not found:
            raise DataError(f"{path}: there is no {', '.join(kinds)} file in this folder.")
        return found
    if kind_of(path) is None and not place.exists() and _ON_THE_HUB.fullmatch(path):
        return [HUB + path]
    if kind_of(path) not in kinds:
        raise DataError(
            f"{path}: unknown kind of file. Allowed: {', '.join(kinds)}, all but .parquet perhaps "
            "with .gz or .zst behind; a folder of them; hf:NAME for a Hugging Face data set"
            f"{'; - for standard input' if '.txt' in kinds else ''}."
        )
    if not place.is_file():
        siblings = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        raise DataError(f"{path} is not a file{nearest(place.name, siblings)}")
    return [path]


def _visible(folder: Path) -> list[Path]:
    """Files at any depth, sorted, without hidden ones and markers such as ``_SUCCESS``."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    )


_TYPES: dict[type, str] = {bool: "bool", int: "int64", float: "float64"}


def _type_name(value: object) -> str:
    return _TYPES.get(type(value), "string")


def _kept_values(
    values: Mapping[str, object], keep: Sequence[str], types: Sequence[str]
) -> tuple[tuple[object, ...], Fault | None]:
    """The values in the types of their columns; in one of strings, other things become JSON."""
    kept: list[object] = []
    for name, wanted in zip(keep, types, strict=True):
        value = values.get(name)
        if value is None:
            pass
        elif wanted == "string":
            if not isinstance(value, str):
                value = json.dumps(value, ensure_ascii=False, default=str)
            if (fault := string_fault(name, value)) is not None:
                return (), fault
        elif wanted == "float64" and type(value) is int:
            value = float(value)
        elif _type_name(value) != wanted or (type(value) is int and value.bit_length() > 63):
            given = f"'{name}' is {value!r:.40}, though the first row has a {wanted}"
            return (), (given, "give every row the same type")
        kept.append(value)
    return tuple(kept), None
