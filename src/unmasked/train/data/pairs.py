"""Rows of query, positive and negatives, from files and the hub, each checked as it is read.

`datasets` reads the same files, but does not say in which line of which file a fault is, so the
reading is that of `unmasked.files`. What was checked is kept in an Arrow file that `datasets` maps
into memory, so a mix larger than memory can be trained on. A data set of the hub is streamed, so
each reading (one to check, one to keep) passes over the network.
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
from unmasked.files import readers
from unmasked.files.source import find_files
from unmasked.files.writing import written_aside
from unmasked.recipe.schema import Pairs

KINDS = (".jsonl", ".csv", ".parquet")
NEGATIVES = "negatives"
"""The column of negatives where a row has none that is called as `Pairs.negative` says."""
_CHUNK = 8192  # rows written at a time
_STRING = pa.string()
_TYPES = (_STRING, _STRING, pa.list_(_STRING), pa.int32(), pa.int64())


class PairRow(NamedTuple):
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


def read_rows(pairs: Pairs, source: int = 0) -> Iterator[PairRow]:
    """The rows of a data set, checked.

    Raises:
        DataError: no such file, an unknown kind, no such column, a text that is missing or empty,
            fewer than two rows; names file, line and fix.
    """
    naming = {
        getattr(pairs, side): f"name it with {{path: {pairs.path}, {side}: NAME}}"
        for side in ("query", "positive")
    }
    wanted = (pairs.negative, NEGATIVES)
    rows = ((path, row) for path in _files(pairs) for row in readers.read(path, naming, wanted))
    number = -1
    for number, (path, row) in enumerate(islice(rows, pairs.max_rows)):
        values: Mapping[str, Any] = row.values
        column = pairs.negative if pairs.negative in values else NEGATIVES
        given = values.get(column)
        negatives = [] if given is None else [given] if isinstance(given, str) else given
        fault = row.fault or _fault(values, naming, column, negatives)
        if fault is not None:
            raise readers.fault_error(readers.where(path, row.number), fault)
        yield PairRow(values[pairs.query], values[pairs.positive], negatives, source, number)
    if number < 1:
        raise DataError(
            f"{pairs.path}: there is {'only one row' if number == 0 else 'no row'}, but a query "
            "learns to find its document among those of other rows. Fix: give at least two rows."
        )


def _files(pairs: Pairs) -> list[str]:
    """The files that the path stands for; a data set of the hub with its subset and split."""
    files = find_files(pairs.path, KINDS)
    if not files[0].startswith(readers.HUB):
        return files
    name, subset, split = readers.hub_parts(files[0])
    return [f"{readers.HUB}{name}:{subset or pairs.subset or ''}:{split or pairs.split}"]


def _fault(
    values: Mapping[str, Any], naming: Mapping[str, str], column: str, negatives: Any
) -> readers.Fault | None:
    """What is wrong with a row that could be read."""
    for name, fix in naming.items():
        if name not in values:
            return readers.absent(name, values, fix)
    if not isinstance(negatives, list):
        return f"'{column}' is a {type(negatives).__name__}", "give a list"
    texts = [(name, values[name], "remove the row") for name in naming]
    for name, text, fix in texts + [(column, text, "remove it") for text in negatives]:
        if (fault := readers.string_fault(name, text)) is not None:
            return fault
        if not text.strip():
            return f"'{name}' is empty, which has no vector", fix
    return None


def store_rows(data: Sequence[Pairs], file: Path) -> None:
    """Write the rows of all data sets to an Arrow file, which `Dataset.from_file` maps.

    Raises:
        DataError: as `read_rows`.
    """
    schema = pa.schema(list(zip(PairRow._fields, _TYPES, strict=True)))
    rows = (row for index, pairs in enumerate(data) for row in read_rows(pairs, index))
    with written_aside(file) as out, pa.ipc.new_stream(out, schema) as writer:
        while chunk := list(islice(rows, _CHUNK)):
            columns = zip(zip(*chunk, strict=True), _TYPES, strict=True)
            arrays = [pa.array(values, kind) for values, kind in columns]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def split_rows(rows: Dataset, held_out: int, seed: int) -> tuple[Dataset, Dataset]:
    """Rows to train on, and some (at most a tenth) that never are, both in the order of the file.

    `Dataset.train_test_split` would shuffle both, so that reading jumps about in a mapped file.
    """
    count = min(held_out, len(rows) // 10)
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))
