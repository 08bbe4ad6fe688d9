"""Columns and ids beside a text keep their values, whatever the first row looks like."""

from __future__ import annotations

import datetime
import decimal
import json
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.given_files import give

from unmasked.errors import DataError
from unmasked.files.source import Source


@pytest.fixture
def given(tmp_path):
    return partial(give, tmp_path)


def lines(*values: object, column: str = "x") -> str:
    """Rows of .jsonl with a column; one whose value is ... lacks it."""
    rows = [{"text": f"t{i}"} | ({} if v is ... else {column: v}) for i, v in enumerate(values)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def kept(path: str) -> tuple[pa.DataType, list[object]]:
    source = Source(path, keep=("x",))
    return source.layout[1][0], [row.kept[0] for row in source.rows()]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 1.5], pa.float64()),
        ([1.5, 1], pa.float64()),
        ([..., "u"], pa.string()),
        ([None, 3], pa.int64()),
        ([None, ...], pa.string()),
        ([True, None, False], pa.bool_()),
        ([["a"], [], ["b", "c"]], pa.list_(pa.string())),
        ([{"a": 1}, {"a": 1.5}], pa.struct([("a", pa.float64())])),
        (["2020-01-01", "x"], pa.string()),
        ([*[1] * 1500, 2.5], pa.float64()),
    ],
)
def test_all_rows_say_the_type(given, values, kind):
    found, rows = kept(given("a.jsonl", lines(*values)))
    assert found == kind
    assert rows == [None if value is ... else value for value in values]
    assert pa.array(rows, found).to_pylist() == rows


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1, 2, "three"], r"line 3: 'x' is \"three\", though the rows above have the type int64"),
        (["one", 2], "line 2: 'x' is 2, though the rows above have the type string"),
        ([True, 2], "line 2: 'x' is 2, though"),
        ([*[1] * 1500, "no"], "line 1501: 'x' is"),
        ([2**53 + 1, 0.5], "line 1: 'x' is 9007199254740993, which a column of floats"),
        ([0.5, 2**60], "line 2: 'x' is 1152921504606846976, which a column of floats"),
        ([[1], 2], "line 2: 'x' is 2, though"),
        ([{}], r"'x' has the type struct<>, which .parquet cannot hold"),
        ([..., ...], "no column 'x' among text"),
        ([2**70], "line 1: 'x' is 1180591620717411303424. Fix"),
    ],
)
def test_the_row_at_fault_is_named_before_anything_is_encoded(given, values, said):
    with pytest.raises(DataError, match=said) as caught:
        kept(given("a.jsonl", lines(*values)))
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, {"n": 2**70}, [1, 2**70]])
def test_a_whole_number_of_more_than_64_bits_is_named(given, value):
    path = given("a.jsonl", lines(1, value) if isinstance(value, int) else lines(value))
    said = r"line [12]: 'x' is .* Fix: write whole numbers of more than 64 bits as strings"
    with pytest.raises(DataError, match=said):
        kept(path)


def test_where_every_row_is_faulty_that_is_told(given):
    """And not that no row has the column."""
    path = given("a.jsonl", '{"text": "t", "x": ' + "9" * 5000 + "}\n")
    with pytest.raises(DataError, match="line 1: not JSON"):
        list(Source(path, keep=("x",)).records())


def test_declared_types_are_kept(tmp_path):
    moment = datetime.datetime(2020, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    table = pa.table(
        {
            "text": ["a", "b"],
            "day": [datetime.date(2020, 1, 2), None],
            "price": pa.array([decimal.Decimal("1.10"), decimal.Decimal("2.25")]),
            "raw": [b"\x00\xff", b""],
            "at": pa.array([moment, None], pa.timestamp("us", "UTC")),
            "small": pa.array([1, 2], pa.uint8()),
            "tags": [["a"], None],
            "kind": pa.array(["x", "x"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    names = tuple(table.column_names[1:])
    source = Source(str(tmp_path / "a.parquet"), keep=names)
    assert source.layout[1] == [table.schema.field(name).type for name in names]
    assert [row.kept for row in source.rows()] == [
        tuple(row[name] for name in names) for row in table.to_pylist()
    ]


def test_cells_of_tables_stay_the_strings_they_are(given):
    assert kept(given("a.csv", "text,x\na,007\nb,\n")) == (pa.string(), ["007", ""])
    assert kept(given("a.tsv", "text\tx\na\t1e5\n")) == (pa.string(), ["1e5"])
    with pytest.raises(DataError, match="no column 'x' among text, xs, did you mean 'xs'"):
        kept(given("b.csv", "text,xs\na,1\n"))


def test_files_of_a_folder_agree_or_are_named(tmp_path):
    for number, value in enumerate((1, 1.5)):
        (tmp_path / f"{number}.jsonl").write_text(lines(value))
    pq.write_table(pa.table({"text": ["a"], "x": [2]}), tmp_path / "2.parquet")
    assert kept(str(tmp_path)) == (pa.float64(), [1, 1.5, 2])
    pq.write_table(pa.table({"text": ["a"], "x": [decimal.Decimal("2.5")]}), tmp_path / "3.parquet")
    with pytest.raises(DataError, match=r"3\.parquet: column 'x' has the type decimal"):
        kept(str(tmp_path))
    (tmp_path / "3.parquet").unlink()
    (tmp_path / "4.txt").write_text("a line\n")
    with pytest.raises(DataError, match=r"4\.txt: lines of text have no columns to keep. Fix"):
        kept(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([..., "x1"], "line 2: 'id' is 'x1', but rows before have no id"),
        (["x1", ...], "line 2: no id"),
        (["x1", None], "line 2: 'id' is null"),
        ([1, 1.5], "line 2: 'id' is 1.5, a float"),
        ([1.0], "line 1: 'id' is 1.0, a float"),
        ([True], "line 1: 'id' is True, a bool"),
        ([""], "line 1: 'id' is empty"),
        ([["a"]], "line 1: 'id' is .*, a list"),
    ],
)
def test_every_row_has_an_id_or_none_has(given, values, said):
    with pytest.raises(DataError, match=said):
        list(Source(given("a.jsonl", lines(*values, column="id"))).records())


def test_no_id_is_dropped_in_another_file_of_the_folder(tmp_path):
    (tmp_path / "1.csv").write_text("text\na\n")
    pq.write_table(pa.table({"text": ["b"], "_id": ["x"]}), tmp_path / "2.parquet")
    with pytest.raises(DataError, match=r"2\.parquet, row 1: '_id' is 'x', but rows before"):
        list(Source(str(tmp_path)).records())


@pytest.mark.parametrize("nested", [False, True])
def test_nanoseconds_of_a_time_of_day_are_not_lost_without_a_word(tmp_path, nested):
    times = pa.array([1, 123456789], pa.time64("ns"))
    kept_times = pa.StructArray.from_arrays([times], ["at"]) if nested else times
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a", "b"], "x": kept_times}), path)
    with pytest.raises(DataError, match=r"time64\[ns\].* would be lost. Fix: cast it to time64"):
        kept(path)
    pq.write_table(pa.table({"text": ["a", "b"], "x": pa.array([1, 2], pa.time64("us"))}), path)
    assert [time.microsecond for time in kept(path)[1]] == [1, 2]


@pytest.mark.parametrize("kind", [pa.timestamp("s"), pa.timestamp("ms"), pa.date32()])
def test_a_time_that_python_cannot_hold_is_a_fault_of_its_row(tmp_path, kind):
    far = 2**31 - 1 if kind == pa.date32() else 10**15
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a", "b", "c"], "x": pa.array([1, far, 2], kind)}), path)
    source = Source(path, keep=("x",))
    assert [row.fault is None for row in source.rows()] == [True, False, True]
    with pytest.raises(DataError, match=r"row 2: a date outside the years 1 to 9999.*Fix: correct"):
        source.survey()
    assert Source(path).survey() == [3]  # the column is not read
