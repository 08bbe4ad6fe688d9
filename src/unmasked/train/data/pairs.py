"""Rows of query, positive and negatives, from files and the hub, each checked as it is read.

`datasets` reads the same files, but does not say in which line of which file a fault is, so the
reading is that of `unmasked.files`. What was checked is kept in an Arrow file that `datasets` maps
into memory, so a mix larger than memory can be trained on. A data set of the hub is streamed, so
each reading (one to check, one to keep) passes over the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset

from unmasked.errors import nearest
from unmasked.files import readers
from unmasked.files.hub import HUB, hub_parts
from unmasked.files.source import find_files
from unmasked.files.writing import written_aside
from unmasked.recipe.schema import Pairs
from unmasked.recipe.teaching import Teacher
from unmasked.train.data import columns
from unmasked.train.data.cells import (
    FaultyCell,
    GivenText,
    ListsInStrings,
    numbers_of,
    passages_of,
    query_of,
    vectors_of,
)
from unmasked.train.data.columns import Columns, check_found, find_columns, holds_several
from unmasked.train.data.judged import Groups, Texts, matches
from unmasked.train.data.record import digest_of, sizes_of

KINDS = (".jsonl", ".csv", ".tsv", ".parquet")
TRIPLE = ("query", "positive", "negative")
"""The columns of a .tsv file without a header, as MS MARCO's triples have them."""
WITHOUT_LISTS = (".csv", ".tsv")
"""Kinds of files in which a list can only be written as a string."""
IN_TYPED = {True: ListsInStrings.ONLY, False: ListsInStrings.NEVER, None: ListsInStrings.PERHAPS}
"""In other files, by what the name of a column says of the number of its texts."""
_CHUNK = 8192  # rows written at a time
_STRING = pa.string()
_TYPES = (
    *(_STRING, _STRING, pa.list_(_STRING), pa.int32(), pa.int64(), _STRING, _STRING),
    *(pa.list_(pa.float64()), pa.list_(pa.list_(pa.float32()))),
)


class PairRow(NamedTuple):
    """One row of a data set.

    Attributes:
        query, positive: texts.
        negatives: texts that do not answer the query, perhaps none.
        source: which data set of the stage it is from.
        number: which row of it, from 0.
        query_instruction, document_instruction: of this row, in place of the data set's; empty
            where the file has none.
        scores: a teacher's, of the positive and each negative; empty unless they are read.
        vectors: a teacher's, of the query, the positive and each negative; likewise.
    """

    query: str
    positive: str
    negatives: list[str]
    source: int
    number: int
    query_instruction: str = ""
    document_instruction: str = ""
    scores: Sequence[float] = ()
    vectors: Sequence[Sequence[float]] = ()


def read_rows(
    pairs: Pairs,
    source: int = 0,
    tell: Callable[[str], object] = lambda said: None,
    teacher: Teacher | None = None,
) -> Iterator[PairRow]:
    """The rows of a data set, checked; a row with several positives becomes one row for each.

    Args:
        pairs: the data set.
        source: its number.
        tell: given one line, at the end, that says which columns were used and which were not.
        teacher: what is learned from a teacher; its scores or vectors are read if the rows have
            to have them.

    Raises:
        DataError: no such file, an unknown kind, no such column or one that could be two things, a
            text that is missing or empty, fewer than two rows, scores or vectors that are not one
            for each text; names file, line and fix.
    """
    found: dict[tuple[str, ...], Columns] = {}
    number, judged = -1, Groups()
    for number, texts in enumerate(_every_texts(pairs, found, judged, teacher)):
        query, positive, negatives, asked, answered, scores, vectors = texts
        known = (query, positive, negatives, source, number, asked, answered)
        yield PairRow(*known, scores, vectors)
    if number < 1:
        given = f"there is {'only one row' if number == 0 else 'no row'}, but a query learns to "
        given += "find its document among those of other rows"
        raise readers.fault_error(pairs.path, (given, "give at least two rows"))
    check_found(pairs, [name for known in found.values() for name in (*known.used, *known.unused)])
    rows = "row" if judged.left_out == 1 else "rows"
    left = f"; {judged.left_out:,} {rows} left out by their label" if judged.left_out else ""
    tell(columns.told(pairs, found.values()) + left)


def _every_texts(
    pairs: Pairs, found: dict[tuple[str, ...], Columns], judged: Groups, teacher: Teacher | None
) -> Iterator[Texts]:
    """The texts of all rows; `found` and `judged` then say what was used."""
    wants = teacher.wants if teacher is not None else None
    cells = ((path, row) for path in _files(pairs) for row in _cells(pairs, path, found, wants))
    for path, row in islice(cells, pairs.max_rows):
        where = readers.where(path, row.number)
        if row.fault is not None:
            raise readers.fault_error(where, row.fault)
        there = tuple(row.values)
        if there not in found:
            found[there] = find_columns(pairs, there, where, wants)
        known = found[there]
        try:
            typed = readers.kind_of(path) not in WITHOUT_LISTS
            for texts in _texts(known, row.values, teacher, typed):
                if known.label is None:
                    yield from judged.rest()
                    yield texts
                else:
                    match = matches(known.label, row.values[known.label], known.positive)
                    yield from judged.add(match, texts)
        except FaultyCell as error:
            raise readers.fault_error(where, error.fault) from None
    yield from judged.rest()


def _texts(
    known: Columns, values: Mapping[str, Any], teacher: Teacher | None, typed: bool
) -> list[Texts]:
    """Query, positive, negatives and what is said of them, for each positive of a row.

    Args:
        known: what the columns are.
        values: of the row.
        teacher: what is learned from a teacher.
        typed: whether the file has lists, so that none has to be written as a string.
    """

    def texts_of(column: str, fix: str = "remove it") -> list[GivenText]:
        written = IN_TYPED[holds_several(column)] if typed else ListsInStrings.ONLY
        return passages_of(column, values[column], fix, written)

    query = query_of(known.query, values[known.query])
    positives = texts_of(known.positive, "remove the row")
    if not positives:
        empty = values[known.positive] == ""
        given = f"'{known.positive}' is {'empty, which has no vector' if empty else 'null'}"
        raise FaultyCell(given, "remove the row")
    negatives = [text for name in known.negatives for text in texts_of(name)]
    told = [*{text.instruction for text in (*positives, *negatives)}]
    if len(told) > 1:
        given = "the documents of this row have different instructions"
        raise FaultyCell(given, "give all documents of a row the same one")
    asked: Any = values[known.instruction] if known.instruction else None
    if not isinstance(asked, str | None):
        raise FaultyCell(f"'{known.instruction}' is a {type(asked).__name__}", "give a string")
    others, before = [text.text for text in negatives], query.instruction or asked or ""
    taught = _taught(known, values, teacher, len(positives), len(negatives))
    return [
        (query.text, positive.text, others, before, told[0], *of_it)
        for positive, of_it in zip(positives, taught, strict=True)
    ]


def _taught(
    known: Columns,
    values: Mapping[str, Any],
    teacher: Teacher | None,
    positives: int,
    negatives: int,
) -> list[tuple[list[float], list[list[float]]]]:
    """A teacher's scores or vectors of each positive of a row, with those of the negatives.

    One score is that of a pair. Of a triplet it is the margin between its documents, as data for
    margin-MSE have it, and says as much as two scores would.
    """
    if not known.taught or teacher is None:
        return [([], [])] * positives
    name, count = known.taught[0], positives + negatives
    if teacher.wants == "vectors":
        query, *all_ = vectors_of(name, values[name], 1 + count)
        return [([], [query, own, *all_[positives:]]) for own in all_[:positives]]
    if len(known.taught) == 2:
        of_each = zip(known.taught, (positives, negatives), strict=True)
        scores = [score for key, n in of_each for score in numbers_of(key, values[key], n)]
    elif (positives, negatives) == (1, 1) and _is_margin(values[name]) and teacher.loss != "cosent":
        scores = [*numbers_of(name, values[name], 1), 0.0]
    else:
        scores = numbers_of(name, values[name], count)
    if teacher.loss != "cosent" and not negatives:
        given = f"a row without negatives, of which {teacher.loss} learns nothing"
        raise FaultyCell(given, "give negatives, or loss=cosent contrastive=0")
    return [([own, *scores[positives:]], []) for own in scores[:positives]]


def _is_margin(value: object) -> bool:
    """Whether a cell is one number, written or read."""
    return not isinstance(value, list | tuple) and not str(value).lstrip().startswith("[")


def _cells(
    pairs: Pairs, path: str, found: dict[tuple[str, ...], Columns], wants: str | None
) -> Iterator[readers.Cells]:
    """The rows of a file with the columns that are used; `found` has those that are not, too."""

    def choose(there: Sequence[str]) -> list[str]:
        known = find_columns(pairs, there, readers.where(path, 1), wants)
        found.setdefault(tuple(there), known)
        found.setdefault(tuple(known.used), known)
        return known.used

    if readers.kind_of(path) == ".tsv" and (names := _headless(pairs, path)):
        for row in readers.read_txt(path, "line"):
            if row.fault is not None:
                yield row
            elif row.values["line"].strip():
                yield _by_place(row, names)
    else:
        yield from readers.read(path, {}, choose)


def _headless(pairs: Pairs, path: str) -> tuple[str, ...] | None:
    """The columns of a .tsv file that begins with a row of texts, if it does."""
    first = next((row.values.get("line", "") for row in readers.read_txt(path, "line")), "")
    cells, named = first.split("\t"), {pairs.query, pairs.positive, *pairs.negative}
    known = [name for names in columns.NAMES.values() for name in names]
    header = any(
        cell in named or columns.with_name(known, [cell]) or nearest(cell, known, end="")
        for cell in cells
        if cell
    )
    return None if header or not 2 <= len(cells) <= 3 else TRIPLE[: len(cells)]


def _by_place(row: readers.Cells, names: Sequence[str]) -> readers.Cells:
    cells = row.values["line"].split("\t")
    if len(cells) == len(names):
        return readers.Cells(row.number, dict(zip(names, cells, strict=True)))
    given = f"{len(cells)} columns instead of {len(names)} (there is no header)"
    return readers.Cells(row.number, {}, (given, "put one tab between columns, none inside a text"))


def _files(pairs: Pairs) -> list[str]:
    """The files that the path stands for; a data set of the hub with its subset and split."""
    files = find_files(pairs.path, KINDS)
    if not files[0].startswith(HUB):
        return files
    name, subset, split = hub_parts(files[0])
    return [f"{HUB}{name}:{subset or pairs.subset or ''}:{split or pairs.split}"]


def store_rows(
    data: Sequence[Pairs],
    file: Path,
    tell: Callable[[str], object] = lambda said: None,
    teacher: Teacher | None = None,
) -> dict[str, Any]:
    """Write the rows of all data sets to an Arrow file, which `Dataset.from_file` maps.

    Args:
        data: the data sets.
        file: where to.
        tell, teacher: as in `read_rows`.

    Returns:
        What was read, for `record.write_facts`.

    Raises:
        DataError: as `read_rows`.
    """
    count, digests = 0, list[str]()
    schema = pa.schema(list(zip(PairRow._fields, _TYPES, strict=True)))
    read = partial(read_rows, tell=tell, teacher=teacher)
    rows = (row for index, pairs in enumerate(data) for row in read(pairs, index))
    with written_aside(file) as out, pa.ipc.new_stream(out, schema) as writer:
        while chunk := list(islice(rows, _CHUNK)):
            columns = zip(zip(*chunk, strict=True), _TYPES, strict=True)
            arrays = [pa.array(values, kind) for values, kind in columns]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            count, digests = count + len(chunk), [*digests, digest_of(chunk)]
    files = [path for pairs in data for path in _files(pairs)]
    return {"source": digest_of(digests), "texts": count, "files": sizes_of(files)}


def line_of(row: PairRow, negatives: Sequence[str]) -> dict[str, Any]:
    """A row as `read_rows` reads it, with the instructions that its file gave it."""

    def told(text: str) -> str | list[str]:
        return [row.document_instruction, text] if row.document_instruction else text

    line: dict[str, Any] = {"query": row.query, "positive": told(row.positive)}
    if row.document_instruction:
        line["positive"] = [line["positive"]]
    line["negatives"] = [told(text) for text in negatives]
    if row.query_instruction:
        line["instruction"] = row.query_instruction
    return line


def split_rows(rows: Dataset, held_out: int, seed: int) -> tuple[Dataset, Dataset]:
    """Rows to train on, and some (at most a tenth) that never are, both in the order of the file.

    `Dataset.train_test_split` would shuffle both, so that reading jumps about in a mapped file.
    """
    count = min(held_out, len(rows) // 10)
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))
