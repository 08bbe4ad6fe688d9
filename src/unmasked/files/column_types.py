"""The types of columns kept beside a text: declared by the file, or inferred from all rows.

A type inferred from the first row alone would refuse 1.5 after 1. So .parquet and data sets keep
their declared types, cells of .csv and .tsv are strings, and .jsonl is read once from beginning to
end, as the last row may change a type.

Cost: one pass over .jsonl files, none over others.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from unmasked.files.hub import HUB, hub_rows
from unmasked.files.readers import Cells, absent, fault_error, half_a_file, kind_of, read, where

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 1024
_EXACT = 1 << 53  # whole numbers up to this limit are exact in float64
_NO_TYPE = (ValueError, TypeError, OverflowError, NotImplementedError)
"""What Arrow (whose errors derive from these) and `_merged` raise if there is no common type."""


def column_types(files: Sequence[str], names: Sequence[str]) -> list[pa.DataType]:
    """The type of each named column, over all files and data sets that `readers.read` takes.

    Raises:
        DataError: no file has a column, or its values have no common type. Names the row.
    """
    import pyarrow as pa

    found, seen = pa.schema([]), dict[str, None]()

    def note(there: Sequence[str]) -> Sequence[str]:
        seen.update(dict.fromkeys(there))
        return ()

    for path in files:
        kind = kind_of(path)
        declared = _declared(path, names, seen)
        if declared is not None:
            found = _merged(path, found, declared)
        elif kind in (".csv", ".tsv"):
            next(read(path, {}, note), None)  # the header only
            texts = pa.schema([(name, pa.string()) for name in names if name in seen])
            found = _merged(path, found, texts)
        else:
            found = _scanned(path, names, seen, found)
    types = []
    for name in names:
        if seen and name not in seen:  # if every row is faulty, reading the rows says so
            raise fault_error(files[0], absent(name, seen, "name it with --keep"))
        kind = found.field(name).type if name in found.names else pa.null()
        types.append(pa.string() if pa.types.is_null(kind) else kind)
        _check_stored(files[0], name, types[-1])
    return types


def _declared(path: str, names: Sequence[str], seen: dict[str, None]) -> pa.Schema | None:
    """The declared types of the columns; None for a kind of file that declares none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.startswith(HUB):
        features = hub_rows(path).features
        if features is None:
            return None
        schema = features.arrow_schema
    elif kind_of(path) == ".parquet":
        try:
            schema = pq.read_schema(path)
        except pa.ArrowException as error:
            raise half_a_file(path, "Parquet", error) from error
    else:
        return None
    seen.update(dict.fromkeys(schema.names))
    return pa.schema([schema.field(name) for name in names if name in schema.names])


def _merged(path: str, old: pa.Schema, new: pa.Schema) -> pa.Schema:
    """The common types of two schemas; refuses types whose common type would change a value."""
    import pyarrow as pa

    # Without the metadata and nullability of the file, which may differ.
    new = pa.schema([pa.field(field.name, field.type) for field in new])
    for field in new:
        before = old.field(field.name).type if field.name in old.names else field.type
        if not _agree(before, field.type):
            given = f"column '{field.name}' has the type {field.type} here and {before} before"
            fix = "give it one type in all files, or leave it out of --keep"
            raise fault_error(path, (given, fix))
    return pa.unify_schemas([old, new], promote_options="permissive")


def _agree(a: pa.DataType, b: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_decimal(a) != pa.types.is_decimal(b) and not {a, b} & {pa.null()}:
        return False  # a decimal that becomes a float changes its value
    try:
        both = [pa.schema([("x", kind)]) for kind in (a, b)]
        pa.unify_schemas(both, promote_options="permissive")
    except pa.ArrowException:
        return False
    return True


def _scanned(path: str, names: Sequence[str], seen: dict[str, None], found: pa.Schema) -> pa.Schema:
    """The types of the columns, inferred from all rows of a file."""
    import pyarrow as pa

    large: dict[str, tuple[int, int]] = {}  # row and value: the first that float64 may change
    rows = (cells for cells in read(path, {}, names) if cells.fault is None)
    while batch := list(islice(rows, _ROWS)):
        for cells in batch:
            seen.update(dict.fromkeys(cells.values))
        for name in names:
            for cells in batch:
                value = cells.values.get(name)
                if type(value) is int and abs(value) > _EXACT:
                    large.setdefault(name, (cells.number, value))
            try:
                kind = pa.array([cells.values.get(name) for cells in batch]).type
                found = _merged(path, found, pa.schema([(name, kind)]))
            except _NO_TYPE:
                found = _row_by_row(path, name, batch, found)
    for name, (number, value) in large.items():
        if pa.types.is_floating(found.field(name).type):
            given = (
                f"'{name}' is {value}, which a column of floats (as other rows have) cannot hold"
            )
            raise fault_error(where(path, number), (given, "write these numbers as strings"))
    return found


def _row_by_row(path: str, name: str, batch: Iterable[Cells], found: pa.Schema) -> pa.Schema:
    """As `_scanned` for one column of some rows; names the row whose value does not fit."""
    import pyarrow as pa

    for cells in batch:
        value = cells.values.get(name)
        before = found.field(name).type if name in found.names else None
        try:
            found = _merged(path, found, pa.schema([(name, pa.array([value]).type)]))
        except _NO_TYPE as error:
            said = f", though the rows above have the type {before}" if before else ""
            given = f"'{name}' is {json.dumps(value, default=str)[:40]}{said}"
            fix = f"give '{name}' one type in every row, or leave it out of --keep"
            if isinstance(error, OverflowError):
                fix = "write whole numbers of more than 64 bits as strings, or leave them out"
            raise fault_error(where(path, cells.number), (given, fix)) from None
    return found


def _check_stored(path: str, name: str, kind: pa.DataType) -> None:
    """Refuse a type that .parquet cannot store, or Python not hold, before anything is encoded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if "time64[ns]" in str(kind):  # also inside a list or a struct
        given = f"column '{name}' has the type {kind}, whose nanoseconds would be lost"
        raise fault_error(path, (given, "cast it to time64[us], or leave it out of --keep"))
    try:
        pq.write_table(pa.table({name: pa.array([], kind)}), io.BytesIO())
    except pa.ArrowException as error:
        given = f"column '{name}' has the type {kind}, which .parquet cannot hold"
        raise fault_error(path, (given, "leave it out of --keep")) from error
