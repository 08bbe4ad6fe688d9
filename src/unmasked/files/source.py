"""Reads texts, one at a time, from files, folders, standard input or data sets.

Every row is checked as it is read, and a fault is reported with its file and line. A problem of one
row (not UTF-8, not a string, empty, too long) is returned as a row with a fault, which the caller
may refuse or skip; a problem that makes the division into rows uncertain is always an error (see
`readers`). Blank lines are not rows in .jsonl and .csv. In .txt every line is a row, so a blank
line in a corpus to encode is a fault, and never shifts the rows after it. With ``documents:``,
every file is a row (see `documents`).
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
    """A row of a source."""

    file: int  # the position of its file in `Source.files`
    number: int  # its line, or its place in .parquet and data sets, from 1
    text: str  # empty if there is a fault
    id: str | None = None  # its id, if the source has ids
    kept: tuple[object, ...] = ()  # values of the columns in `Source.keep`
    fault: Fault | None = None  # why the row has no text, and how to correct it


@dataclass(frozen=True)
class Source:
    """Where texts come from."""

    path: str
    """A .txt file (one text per line), .jsonl, .csv or .tsv, each also as .gz or .zst, or .parquet;
    a folder of such files; ``hf:NAME``, a Hugging Face data set, which is streamed; ``-`` for
    standard input, one text per line; ``documents:PATH``, a folder (or a file) of .txt, .md, .rst,
    .html, .pdf and .docx; each file is a text, and its path the id."""
    column: str = "text"  # the column or key of the text (ignored for .txt)
    skip_blank: bool = False
    """Skip texts of white space instead of refusing them (for training, where rows need not
    correspond to rows of a result). Ids are not read then."""
    keep: tuple[str, ...] = ()  # columns to read beside the text
    max_bytes: int | None = None  # a text of this many bytes or more is a fault; None sets no limit
    distinct: bool = False  # refuse an id that an earlier row has; takes about 100 bytes per row

    @property
    def name(self) -> str:
        """The name of the source in errors."""
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
        """Whether it consists of files, whose checksums show whether it has changed."""
        return self.again and not self.files[0].startswith(HUB)

    @cached_property
    def files(self) -> list[str]:
        """What is read, in this order: paths, ``-``, or ``hf:NAME``.

        Raises:
            DataError: there is no such file, or no file of a known kind.
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
        """The names of the files, which are the same on every machine: paths inside the folder."""
        if self.again and self.root.is_dir():
            return [Path(file).relative_to(self.root).as_posix() for file in self.files]
        return [Path(file).name if self.on_disk else file for file in self.files]

    def rows(self, first_file: int = 0) -> Iterator[Row]:
        """Every row of the files from `first_file` on, good or with a fault.

        Raises:
            DataError: as `files`; or a file cannot be divided into rows, or two rows have one id.
        """
        wanted = self.keep if self.skip_blank else (*_IDS, *self.keep)
        ids: set[str] = set()
        for index in range(first_file, len(self.files)):
            for cells in self._cells(index, wanted):
                row = self._row(index, cells)
                if self.distinct and row.id is not None:
                    if row.id in ids:
                        raise self._repeated_id(row)
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

    def _repeated_id(self, row: Row) -> DataError:
        given = f"the id {row.id!r:.80} is also the id of an earlier row"
        return fault_error(self._place(row), (given, "give every row an id of its own, or none"))

    def records(self) -> Iterator[tuple[int, str, str | None]]:
        """Line, text and id of every row.

        Raises:
            DataError: as `rows`; or a row has a fault, or there is no row. Names file and line.
        """
        for row in self._checked():
            yield row.number, row.text, row.id

    def survey(self, skip: bool = False) -> list[int]:
        """How many rows each file has; a fault is an error unless `skip`.

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
            fix += "; or skip such rows with --on-error skip, which lists them"
        return fault_error(self._place(row), (given, fix))

    @cached_property
    def layout(self) -> tuple[str | None, list[pa.DataType]]:
        """The column of ids, if there is one (training reads none), and the types of `keep`.

        The first row without a fault decides whether all rows have ids.
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
        # The commands that train have no option --text-column.
        given = f"{self.path}:text={self.column}" if self.column != "text" else self.path
        training = f"give {shlex.quote(f'{self.path}:text=NAME')} in place of {shlex.quote(given)}"
        return {self.column: training if self.skip_blank else "name it with --text-column"}

    def _checked(self, skip: bool = False) -> Iterator[Row]:
        """Every row; a fault is an error unless `skip`, and so is a source without rows."""
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
        values, own_id = cells.values, None
        fault = cells.fault or self._text_fault(values)
        if cells.fault is None and key is None and not self.skip_blank:
            self._check_no_id(file, cells)
        if fault is None and key is not None:
            own_id, fault = _id_of(key, values)
        kept: tuple[object, ...] = ()
        if fault is None and self.keep:
            kept = tuple(  # 1 in a column of floats is 1.0
                float(value) if type(value) is int and str(kind) == "double" else value
                for value, kind in zip(map(values.get, self.keep), types, strict=True)
            )
            texts = ((c, v) for c, v in zip(self.keep, kept, strict=True) if isinstance(v, str))
            fault = next(filter(None, (string_fault(*text) for text in texts)), None)
        if fault is not None:
            return Row(file, cells.number, "", fault=fault)
        return Row(file, cells.number, str(values[self.column]), own_id, kept)

    def _check_no_id(self, file: int, cells: Cells) -> None:
        """Refuse an id after rows that have none, as it would be dropped silently."""
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
            fix = f"divide it into passages (--chunk 256), or allow it with --max-bytes {size + 1}"
            return given, fix
        return None


def find_files(path: str, kinds: Sequence[str] = KINDS) -> list[str]:
    """The files that a name stands for, in the order in which they are read, or ``hf:NAME``.

    Args:
        path: a file, a folder, ``hf:NAME``, or ``OWNER/NAME`` if there is no such folder.
        kinds: the kinds of files that can be used.

    Raises:
        DataError: there is no such file, or no file of these kinds.
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
        given = "a .json file is read as .jsonl, one object per line"
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
    """The id of a row, or what is wrong with it."""
    value, fix = values.get(key), "give every row an id, a string or whole number"
    if key not in values:
        return None, (f"no id ('{key}'), though the first row has one", fix)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        shown = f"{value!r:.40}, a {type(value).__name__}"
        shown = "null" if value is None else "empty" if value == "" else shown
        return None, (f"'{key}' is {shown}", fix)
    return str(value), string_fault(key, str(value))
