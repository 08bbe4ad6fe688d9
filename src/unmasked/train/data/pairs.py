"""Rows of query, positive and negatives, from files and the hub, each checked as it is read.

Every fault is told with its file and line. What was checked is kept in one Arrow file that is
mapped into memory, so that a mix of data sets larger than memory can be trained on. A data set of
the hub is streamed, so each reading (one to check, one to keep) passes over the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset

from unmasked.errors import DataError
from unmasked.files.readers import (
    HUB,
    Fault,
    absent,
    fault_error,
    hub_parts,
    read,
    string_fault,
    where,
)
from unmasked.files.source import find_files
from unmasked.files.writing import written_aside
from unmasked.recipe.schema import Pairs

KINDS = (".jsonl", ".csv", ".parquet")
NEGATIVES = "negatives"
"""Looked for where a row has no column that is called as `Pairs.negative` says."""
_CHUNK = 8192  # rows written at a time
_STRING = pa.string()
_TYPES = (_STRING, _STRING, pa.list_(_STRING), pa.int32(), pa.int64())


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
    naming = {
        getattr(pairs, side): f"name it with {{path: {pairs.path}, {side}: NAME}}"
        for side in ("query", "positive")
    }
    rows = (
        (path, cells)
        for path in _files(pairs)
        for cells in read(path, naming, (pairs.negative, NEGATIVES))
    )
    number = -1
    for number, (path, cells) in enumerate(islice(rows, pairs.max_rows)):
        values: Mapping[str, Any] = cells.values
        fault = cells.fault or _fault(pairs, values, naming)
        if fault is not None:
            raise fault_error(where(path, cells.number), fault)
        _, negatives = _negatives(pairs, values)
        yield Row(values[pairs.query], values[pairs.positive], negatives, source, number)
    if number < 1:
        given = "one row" if number == 0 else "no row"
        raise DataError(
            f"{pairs.path}: {given}, but a query is told to find its document among those of other "
            "rows. Fix: give at least two rows."
        )


def store_rows(data: Sequence[Pairs], file: Path) -> None:
    """Write the rows of all data sets to an Arrow file, which `Dataset.from_file` maps.

    Raises:
        DataError: as `read_rows`.
    """
    schema = pa.schema(list(zip(Row._fields, _TYPES, strict=True)))
    rows = (row for index, pairs in enumerate(data) for row in read_rows(pairs, index))
    with written_aside(file) as out, pa.ipc.new_stream(out, schema) as writer:
        while chunk := list(islice(rows, _CHUNK)):
            columns = zip(zip(*chunk, strict=True), _TYPES, strict=True)
            arrays = [pa.array(values, kind) for values, kind in columns]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def split_rows(rows: Dataset, held_out: int, seed: int) -> tuple[Dataset, Dataset]:
    """Rows to train on, and some (at most a tenth) that never are."""
    count = min(held_out, len(rows) // 10)
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))


def _files(pairs: Pairs) -> list[str]:
    """What its path stands for; a data set of the hub with its subset and split."""
    files = find_files(pairs.path, KINDS)
    if not files[0].startswith(HUB):
        return files
    name, subset, split = hub_parts(files[0])
    return [f"{HUB}{name}:{subset or pairs.subset or ''}:{split or pairs.split}"]


def _negatives(pairs: Pairs, values: Mapping[str, Any]) -> tuple[str, Any]:
    """Their column, and what should be a list of texts."""
    column = pairs.negative if pairs.negative in values else NEGATIVES
    given = values.get(column)
    if given is None:
        return column, []
    return column, [given] if isinstance(given, str) else given


def _fault(pairs: Pairs, values: Mapping[str, Any], naming: Mapping[str, str]) -> Fault | None:
    """What is wrong with a row that could be read."""
    for column, fix in naming.items():
        if column not in values:
            return absent(column, values, fix)
    texts = [(column, values[column], "remove the row") for column in naming]
    column, negatives = _negatives(pairs, values)
    if not isinstance(negatives, list):
        return f"'{column}' is a {type(negatives).__name__}", "give a list"
    texts += [(column, text, "remove it") for text in negatives]
    for column, text, fix in texts:
        if (fault := string_fault(column, text)) is not None:
            return fault
        if not text.strip():
            return f"'{column}' is empty, which has no vector", fix
    return None
