"""Texts, one after the other, from files, a folder of them, standard input or a data set.

Every row is checked as it is read, and a fault is told with its file and line. What spoils one row
(not UTF-8, not a string, empty, too long) is handed on as a row with a fault, so that the caller
may refuse it or pass over it; what makes the rows uncertain is always an error (see `readers`).
Blank lines are not rows in .jsonl and .csv. In .txt every line is a row, so a blank one is a fault
in a corpus to encode, and never shifts the rows after it. Behind ``documents:`` every file is a row
of its own (see `documents`).
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from unmasked.errors import DataError, no_such_path
from unmasked.files.column_types import column_types
from unmasked.files.content import Fault, by_line
from unmasked.files.documents import PREFIX, find_documents, instead, read_whole, visible
from unmasked.files.hub import HUB
from unmasked.files.readers import (
    KINDS,
    Cells,
    absent,
    called,
    fault_error,
    kind_of,
    read,
    string_fault,
    where,
)

if TYPE_CHECKING:
    import pyarrow as pa

_IDS = ("id", "_id")
_ON_THE_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]*){0,2}")


class Row(NamedTuple):
    """A row of a source.

    Attributes:
        file: the position of its file in `Source.files`.
        number: its line, or its place in .parquet and data sets, from 1.
        text: empty if there is a fault.
        id: its name, if the source names its rows.
        kept: values of the columns in `Source.keep`.
        fault: why it has no text, and how to correct it.
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
        path: a .txt file (one text per line), .jsonl, .csv or .tsv, each also as .gz or .zst, or
            .parquet; a folder of such files; ``hf:NAME``, a Hugging Face data set, which is
            streamed; ``-`` for standard input, one text per line; ``documents:PATH``, a folder (or
            a file) of .txt, .md, .rst, .html, .pdf and .docx, each file one text, its path the id.
        column: the column or key that holds the text (ignored for .txt).
        skip_blank: pass over texts of white space instead of refusing them (for training, where
            no row of a result has to line up).
        keep: columns to hand on beside the text.
        max_bytes: texts of this many bytes or more are a fault; None sets no limit.
        distinct: refuse an id that an earlier row has; costs some 100 bytes per row.
    """

    path: str
    column: str = "text"
    skip_blank: bool = False
    keep: tuple[str, ...] = ()
    max_bytes: int | None = None
    distinct: bool = False

    @property
    def name(self) -> str:
        """Its name in errors."""
        return called(self.path)

    @property
    def again(self) -> bool:
        """Whether it can be read twice."""
        return self.path != "-"

    @property
    def whole(self) -> bool:
        """Whether every file is one text."""
        return self.path.startswith(PREFIX)

    @property
    def root(self) -> Path:
        """The file or folder that its files are in."""
        return Path(self.path.removeprefix(PREFIX))

    def absolute(self) -> Source:
        """The same files, for a process with another working directory."""
        if not self.on_disk:
            return self
        return replace(self, path=f"{PREFIX if self.whole else ''}{self.root.resolve()}")

    @property
    def on_disk(self) -> bool:
        """Whether it is made of files, whose bytes say whether it is still the same."""
        return self.again and not self.files[0].startswith(HUB)

    @cached_property
    def files(self) -> list[str]:
        """What it is made of, in the order it is read: paths, ``-``, or ``hf:NAME``.

        Raises:
            DataError: no such file, another kind of file, or a folder with none in it.
        """
        return find_files(self.path) if self.again else ["-"]

    @property
    def ignored(self) -> list[str]:
        """Files of other kinds in the folder."""
        if not self.again or not self.root.is_dir():
            return []
        read = set(self.files)
        return [str(file) for file in visible(self.root) if str(file) not in read]

    @property
    def left_out(self) -> dict[str, int]:
        """How many files of each other kind are in the folder, the most frequent first."""
        kinds = Counter(Path(file).suffix or "without a suffix" for file in self.ignored)
        return dict(kinds.most_common())

    @cached_property
    def names(self) -> list[str]:
        """The names of the files, the same on every machine: paths inside the folder."""
        if self.again and self.root.is_dir():
            return [Path(file).relative_to(self.root).as_posix() for file in self.files]
        return [Path(file).name if self.on_disk else file for file in self.files]

    def rows(self, first_file: int = 0) -> Iterator[Row]:
        """Every row of the files from `first_file` on, good or with a fault.

        Raises:
            DataError: as `files`, a file cannot be divided into rows, or an id is there twice.
        """
        wanted = self.keep if self.skip_blank else (*_IDS, *self.keep)
        ids: set[str] = set()
        for index in range(first_file, len(self.files)):
            for cells in self._cells(index, wanted):
                row = self._row(index, cells)
                if self.distinct and row.id is not None:
                    if row.id in ids:
                        raise self._twice(row)
                    ids.add(row.id)
                if not (self.skip_blank and row.fault is None and not row.text.strip()):
                    yield row

    def _cells(self, index: int, wanted: Sequence[str]) -> Iterator[Cells]:
        if self.whole:
            return iter([read_whole(self.files[index], self.column, self.names[index])])
        return read(self.files[index], self._required, wanted)

    def _place(self, row: Row) -> str:
        file = self.files[row.file]
        return file if self.whole else where(file, row.number)

    def _twice(self, row: Row) -> DataError:
        given = f"the id {row.id!r:.80} is that of an earlier row too"
        return fault_error(self._place(row), (given, "give every row an id of its own, or none"))

    def records(self) -> Iterator[tuple[int, str, str | None]]:
        """Line, text and id of every row, or an error for the first that has a fault.

        Raises:
            DataError: as `rows`, for a fault, or for no row at all; names file and line.
        """
        for row in self._checked():
            yield row.number, row.text, row.id

    def survey(self, skip: bool = False) -> list[int]:
        """How many rows each file has; refuses a fault unless `skip`.

        Raises:
            DataError: as `records`.
        """
        counts = [0] * len(self.files)
        for row in self._checked(skip):
            counts[row.file] += 1
        return counts

    def error(self, row: Row) -> DataError:
        """The error for a row with a fault."""
        assert row.fault is not None
        given, fix = row.fault
        if self.max_bytes is not None:
            fix += "; or pass over such rows with --on-error skip, which lists them"
        return fault_error(self._place(row), (given, fix))

    @cached_property
    def layout(self) -> tuple[str | None, list[pa.DataType]]:
        """The column of ids, if there is one (training asks for none), and the types to keep.

        The first good row decides whether rows have ids; every other one has to do as it does.
        """
        if self.whole:
            if self.keep:
                given = "whole files have no columns to keep, and their path is their id"
                raise fault_error(self.name, (given, "leave out --keep"))
            return "id", []
        for path in self.files if self.keep else ():
            if path == "-" or kind_of(path) == ".txt":
                given = "lines of text have no columns to keep"
                raise fault_error(called(path), (given, "leave out --keep"))
        types = column_types(self.files, self.keep) if self.keep else []
        if self.skip_blank or self.files[0] == "-" or kind_of(self.files[0]) == ".txt":
            return None, types
        for path in self.files:
            for cells in read(path, self._required, _IDS):
                if cells.fault is None:
                    return next((name for name in _IDS if name in cells.values), None), types
        return None, types

    @property
    def _required(self) -> dict[str, str]:
        # Training has no such option.
        training = f"give {shlex.quote(f'{self.path}:text=NAME')} in place of {self.path}"
        return {self.column: training if self.skip_blank else "name it with --text-column"}

    def _checked(self, skip: bool = False) -> Iterator[Row]:
        """Every row; an error for a fault unless `skip`, and where there is no row."""
        empty = True
        for row in self.rows():
            if row.fault is not None and not skip:
                raise self.error(row)
            empty = False
            yield row
        if empty:
            raise self.empty()

    def empty(self) -> DataError:
        """The error for a source without a row."""
        return DataError(f"{self.name}: there is no text in it. Fix: give another file or column.")

    def _row(self, file: int, cells: Cells) -> Row:
        key, types = self.layout
        values, name = cells.values, None
        fault = cells.fault or self._text_fault(values)
        if cells.fault is None and key is None and not self.skip_blank:
            self._check_no_id(file, cells)
        if fault is None and key is not None:
            name, fault = _id_of(key, values)
        kept: tuple[object, ...] = ()
        if fault is None and self.keep:
            kept = tuple(
                float(value) if type(value) is int and str(kind) == "double" else value
                for value, kind in zip(map(values.get, self.keep), types, strict=True)
            )
            texts = ((c, v) for c, v in zip(self.keep, kept, strict=True) if isinstance(v, str))
            fault = next(filter(None, (string_fault(*text) for text in texts)), None)
        if fault is not None:
            return Row(file, cells.number, "", fault=fault)
        return Row(file, cells.number, str(values[self.column]), name, kept)

    def _check_no_id(self, file: int, cells: Cells) -> None:
        """Refuse the first id behind rows that have none: it would be dropped without a word."""
        for key in _IDS:
            if (given := cells.values.get(key)) is not None:
                raise fault_error(
                    where(self.files[file], cells.number),
                    (f"'{key}' is {given!r:.40}, but rows before have no id", "give all an id"),
                )

    def _text_fault(self, values: Mapping[str, Any]) -> Fault | None:
        if self.column not in values:
            return absent(self.column, values, self._required[self.column])
        text = values[self.column]
        if (fault := string_fault(self.column, text)) is not None:
            return fault
        if not text.strip() and not self.skip_blank:
            unit = "file" if self.whole else "row"
            return "an empty text, which has no vector", f"remove the {unit}"
        if self.max_bytes is not None and (size := len(text.encode())) >= self.max_bytes:
            given = f"a text of {size:,} bytes, and the limit is {self.max_bytes:,}"
            return (
                given,
                f"make passages of it (--chunk 256), or allow it with --max-bytes {size + 1}",
            )
        return None


def find_files(path: str, kinds: Sequence[str] = KINDS) -> list[str]:
    """What a name stands for, in the order it is read: files, or ``hf:NAME``.

    Args:
        path: a file, a folder, ``hf:NAME``, or ``OWNER/NAME`` if there is no such folder.
        kinds: those of `KINDS` that can be used.

    Raises:
        DataError: no such file, another kind of file, or a folder with none in it.
    """
    if path.startswith(PREFIX):
        return find_documents(Path(path.removeprefix(PREFIX)))
    if path.startswith(HUB):
        return [path]
    if (place := Path(path)).is_dir():
        found = [str(file) for file in visible(place) if kind_of(str(file)) in kinds]
        if not found:
            given = f"there is no {', '.join(kinds)} file in this folder"
            raise fault_error(path, (given, instead(place, kinds)))
        return found
    if kind_of(path) is None and not place.exists() and _ON_THE_HUB.fullmatch(path):
        return [HUB + path]
    if path.endswith((".json", ".json.gz")) and place.is_file():
        given = "a .json file is read as .jsonl, one object a line"
        raise fault_error(path, (given, by_line(path)))
    allowed = (
        f"Allowed: {', '.join(kinds)}, all but .parquet also as .gz or .zst; a folder of them; "
        f"hf:NAME for a Hugging Face data set{'; - for standard input' if '.txt' in kinds else ''}."
    )
    if not place.is_file() and path != "-":
        raise DataError(f"{no_such_path(path)} {allowed}")
    if kind_of(path) not in kinds:
        raise DataError(f"{path}: unknown kind of file. {allowed} Fix: {instead(place, kinds)}.")
    return [path]


def _id_of(key: str, values: Mapping[str, Any]) -> tuple[str | None, Fault | None]:
    """The name of a row, or what is wrong with it."""
    value, fix = values.get(key), "give every row an id, a string or whole number"
    if key not in values:
        return None, (f"no id ('{key}'), though the first row has one", fix)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        shown = f"{value!r:.40}, a {type(value).__name__}"
        said = {"None": "null", "''": "empty"}.get(repr(value), shown)
        return None, (f"'{key}' is {said}", fix)
    return str(value), string_fault(key, str(value))
