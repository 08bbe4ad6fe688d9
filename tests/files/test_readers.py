"""Tables with tabs, as evaluation tasks have them, and rows that are checked as they are read."""

from __future__ import annotations

import re
from functools import partial

import pytest
from support.given_files import give

from unmasked.errors import DataError
from unmasked.files.readers import checked, read, read_tsv


@pytest.fixture
def given(tmp_path):
    return partial(give, tmp_path)


def test_columns_are_found_by_name_and_blank_lines_are_skipped(given):
    path = given("a.tsv", "\ufeffid\tscore\ttext\r\n\n1\t2.5\t 둘 \n  \n\t\t\n")
    assert list(read_tsv(path, ("text", "score"))) == [(3, [" 둘 ", "2.5"]), (5, ["", ""])]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "a.tsv: the file is empty. Fix: begin with the header label, text, sep"),
        (b"label\ttext\n\n", "a.tsv: the file is empty below its header. Fix: add rows."),
        (
            b"label\ttxet\n",
            "a.tsv, line 1: no column 'text' among label, txet, did you mean 'txet'. ",
        ),
        (
            b"label\ttext\n1\ta\n1\n",
            "a.tsv, line 3: 1 columns instead of 2 in '1'. Fix: put one tab",
        ),
        (b"label\ttext\n1\t\xe9\n", "a.tsv, line 2: not UTF-8 (byte 0xe9 at position 2). Fix: "),
    ],
)
def test_a_fault_of_a_table_names_the_line(given, content, said):
    with pytest.raises(DataError, match=re.escape(said)):
        list(read_tsv(given("a.tsv", content), ("label", "text")))


def test_rows_are_checked_one_by_one(given):
    path = given("a.jsonl", '{"q": "a"}\n[1]\n')
    rows = checked(path, read(path, {}))
    assert next(rows) == (1, {"q": "a"})
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 2: a list\. Fix: write one object per line\."
    ):
        next(rows)
