"""Rows of query, positive and negatives, from files and the hub, each checked as it is read.

`datasets` reads the same files, but does not say in which line of which file a fault is, so they
are read by `unmasked.files`. Checked rows are stored in an Arrow file that `datasets` maps into
memory, so that a mix of data sets may be larger than memory. A data set on the hub is streamed, so
each reading (one to check, one to store) passes over the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

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
    passages_of,
    query_of,
)
from unmasked.train.data.columns import ANY, Columns, check_found, find_columns, holds_several
from unmasked.train.data.given_scores import given_scores
from unmasked.train.data.judged import Groups, Texts, matches
from unmasked.train.data.record import digest_of, sizes_of

KINDS = (".jsonl", ".csv", ".tsv", ".parquet")
TRIPLE = ("query", "positive", "negative")
"""The columns of a .tsv file without a header, as MS MARCO's triples have them."""
WITHOUT_LISTS = (".csv", ".tsv")
"""Kinds of files in which a list can only be written as a string."""
IN_TYPED = {True: ListsInStrings.ONLY, False: ListsInStrings.NEVER, None: ListsInStrings.PERHAPS}
"""For other files: `columns.holds_several` of a column → whether its strings may be lists."""
_CHUNK = 8192  # rows written at a time
_STRING = pa.string()
_TYPES = (  # of the fields of `PairRow`
    *(_STRING, _STRING, pa.list_(_STRING), pa.int32(), pa.int64(), _STRING, _STRING),
    *(pa.list_(pa.float64()), pa.list_(pa.list_(pa.float32()))),
)


class PairRow(NamedTuple):
    """One row of a data set.

    Attributes:
        query, positive: texts.
        negatives: texts that do not answer the query, perhaps none.
        source: the number of its data set in the stage, from 0.
        number: the number of the row in that data set, from 0.
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
    """The checked rows of a data set; a row with several positives becomes one row for each.

    Args:
        pairs: the data set.
        source: its number.
        tell: called once, at the end, with a line that says which columns were used and which not.
        teacher: what is learned from a teacher; None reads no scores or vectors.

    Raises:
        DataError: the file does not exist or is of an unknown kind, a column is missing or
            ambiguous, a text is missing or empty, there are fewer than two rows, or scores or
            vectors are not one for each text; names file, line and fix.
    """
    return (row for _, row in placed_rows(pairs, source, tell, teacher))


def placed_rows(
    pairs: Pairs,
    source: int = 0,
    tell: Callable[[str], object] = lambda said: None,
    teacher: Teacher | None = None,
    keep: bool = False,
) -> Iterator[tuple[str, PairRow]]:
    """The rows of `read_rows`, each with its place, such as ``a.jsonl, line 3``.

    Args:
        pairs, source, tell, teacher: as in `read_rows`.
        keep: read a teacher's scores or vectors if there are any, without a teacher.
    """
    found: dict[tuple[str, ...], Columns] = {}
    number, judged = -1, Groups()
    wants = ANY if keep else teacher.wants if teacher is not None else None
    for number, texts in enumerate(_every_texts(pairs, found, judged, teacher, wants)):
        query, positive, negatives, asked, answered, scores, vectors, place = texts
        known = (query, positive, negatives, source, number, asked, answered)
        yield place, PairRow(*known, scores, vectors)
    if number < 1:
        given = f"there is {'only one row' if number == 0 else 'no row'}, but a query learns to "
        given += "find its document among those of other rows"
        raise readers.fault_error(pairs.path, (given, "give at least two rows"))
    check_found(pairs, [name for known in found.values() for name in (*known.used, *known.unused)])
    rows = "row" if judged.left_out == 1 else "rows"
    left = f"; {judged.left_out:,} {rows} left out by their label" if judged.left_out else ""
    bare = any(_headless(pairs, path) for path in files_of(pairs))
    told = columns.told(pairs, found.values()) + left
    tell(told + ("; no header: columns by their place" if bare else ""))


def first_columns(path: str) -> list[str]:
    """The columns of a file's first row; by their place if a .tsv file has no header."""
    if names := _headless(Pairs(path=path), path):
        return [*names]
    rows = readers.read(path, {}, lambda there: there)
    return [*next((row.values for row in rows if row.fault is None), {})]


def _every_texts(
    pairs: Pairs,
    found: dict[tuple[str, ...], Columns],
    judged: Groups,
    teacher: Teacher | None,
    wants: str | None,
) -> Iterator[Texts]:
    """The texts of all rows; fills `found` (columns → their roles) and `judged` on the way."""
    cells = ((path, row) for path in files_of(pairs) for row in _cells(pairs, path, found, wants))
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
            for texts in _texts(known, row.values, teacher, typed, where):
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
    known: Columns, values: Mapping[str, Any], teacher: Teacher | None, typed: bool, where: str
) -> list[Texts]:
    """The texts of a row, once for each of its positives.

    Args:
        known: the roles of the columns.
        values: the cells of the row.
        teacher: what is learned from a teacher.
        typed: whether the kind of file has real lists, so that none must be written as a string.
        where: the place of the row.
    """

    def texts_of(column: str, fix: str = "remove it") -> list[GivenText]:
        written = IN_TYPED[holds_several(column)] if typed else ListsInStrings.ONLY
        return passages_of(column, values[column], fix, written)

    query = query_of(known.query, values[known.query])
    positives = texts_of(known.positive, "remove the row")
    if not positives:
        value = values[known.positive]
        found = "an empty list" if value == [] else "null"
        given = f"'{known.positive}' is {'empty, which has no vector' if value == '' else found}"
        raise FaultyCell(given, "remove the row")
    negatives = [text for name in known.negatives for text in texts_of(name)]
    instructions = [*{text.instruction for text in (*positives, *negatives)}]
    if len(instructions) > 1:
        given = "the documents of this row have different instructions"
        raise FaultyCell(given, "give all documents of a row the same one")
    own: Any = values[known.instruction] if known.instruction else None
    if not isinstance(own, str | None):
        raise FaultyCell(f"'{known.instruction}' is a {type(own).__name__}", "give a string")
    others, of_query = [text.text for text in negatives], query.instruction or own or ""
    taught = given_scores(known, values, teacher, len(positives), len(negatives))
    return [
        (query.text, positive.text, others, of_query, instructions[0], *scores_and_vectors, where)
        for positive, scores_and_vectors in zip(positives, taught, strict=True)
    ]


def _cells(
    pairs: Pairs, path: str, found: dict[tuple[str, ...], Columns], wants: str | None
) -> Iterator[readers.Cells]:
    """The rows of a file; those of a table have only the columns that are used.

    For a table, `found` gets an entry for all of its columns, and one for those that are used.
    """

    def choose(there: Sequence[str]) -> list[str]:
        known = find_columns(pairs, there, readers.where(path, 1), wants)
        found.setdefault(tuple(there), known)
        found.setdefault(tuple(known.used), known)
        return known.used

    if names := _headless(pairs, path):
        for row in readers.read_txt(path, "line"):
            if row.fault is not None:
                yield row
            elif row.values["line"].strip():
                yield _by_place(row, names)
    else:
        yield from readers.read(path, {}, choose)


def _headless(pairs: Pairs, path: str) -> tuple[str, ...] | None:
    """The columns of a .tsv file without a header; None if it has one, or is of another kind.

    Its first line must look like texts: names of columns have no white space.
    """
    if readers.kind_of(path) != ".tsv":
        return None
    first = next((row.values.get("line", "") for row in readers.read_txt(path, "line")), "")
    cells, named = first.split("\t"), {pairs.query, pairs.positive, *pairs.negative}
    known = [name for names in columns.NAMES.values() for name in names]
    header = any(
        cell in named or columns.with_name(known, [cell]) or nearest(cell, known, end="")
        for cell in cells
        if cell
    )
    looks_like_texts = any(len(cell.split()) > 1 for cell in cells)
    if header or not looks_like_texts or not 2 <= len(cells) <= 3:
        return None
    return TRIPLE[: len(cells)]


def _by_place(row: readers.Cells, names: Sequence[str]) -> readers.Cells:
    cells = row.values["line"].split("\t")
    if len(cells) == len(names):
        return readers.Cells(row.number, dict(zip(names, cells, strict=True)))
    given = f"{len(cells)} columns instead of {len(names)} (there is no header)"
    return readers.Cells(row.number, {}, (given, "put one tab between columns, none inside a text"))


def files_of(pairs: Pairs) -> list[str]:
    """The files behind the path; a data set on the hub with its subset and split."""
    files = find_files(pairs.path, KINDS)
    if not files[0].startswith(HUB):
        for key, given in pairs.model_dump(
            include={"subset", "split"}, exclude_defaults=True
        ).items():
            said = f"{key} '{given}' was given, which only a data set on the hub has"
            raise readers.fault_error(pairs.path, (said, f"leave {key} out, or name a file"))
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
        file: the Arrow file.
        tell, teacher: as in `read_rows`.

    Returns:
        A summary of what was read, for `record.write_facts`.

    Raises:
        DataError: as `read_rows`.
    """
    count, digests, common = 0, list[str](), dict[int, list[str]]()
    schema = pa.schema(list(zip(PairRow._fields, _TYPES, strict=True)))
    read = partial(read_rows, tell=tell, teacher=teacher)
    rows = (row for index, pairs in enumerate(data) for row in read(pairs, index))
    with written_aside(file) as out, pa.ipc.new_stream(out, schema) as writer:
        while chunk := list(islice(rows, _CHUNK)):
            columns = zip(zip(*chunk, strict=True), _TYPES, strict=True)
            arrays = [pa.array(values, kind) for values, kind in columns]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            count, digests = count + len(chunk), [*digests, digest_of(chunk)]
            for row in chunk:
                own = [row.query_instruction, row.document_instruction]
                known = common.setdefault(row.source, own)
                common[row.source] = [a if a == b else "" for a, b in zip(known, own, strict=True)]
    files = [path for pairs in data for path in files_of(pairs)]
    facts = {"source": digest_of(digests), "texts": count, "files": sizes_of(files)}
    return {**facts, "instructions": [*common.values()]}


def line_of(row: PairRow, negatives: Sequence[str]) -> dict[str, Any]:
    """A row as an object for a .jsonl file that `read_rows` reads back, instructions included.

    The scores or vectors of a row must be those of these negatives.
    """

    def instructed(text: str) -> str | list[str]:
        return [row.document_instruction, text] if row.document_instruction else text

    line: dict[str, Any] = {"query": row.query, "positive": instructed(row.positive)}
    if row.document_instruction:  # a list of one pair: a pair alone would be read as two positives
        line["positive"] = [line["positive"]]
    line["negatives"] = [instructed(text) for text in negatives]
    if row.query_instruction:
        line["instruction"] = row.query_instruction
    taught = {"scores": row.scores, "vectors": row.vectors}
    return line | {name: given for name, given in taught.items() if given}
