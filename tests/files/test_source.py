"""Texts of every kind of file: each in its place, and every fault with its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from functools import partial
from pathlib import Path

import pytest
from support.given_files import give

from unmasked.errors import DataError
from unmasked.files.readers import where
from unmasked.files.source import Source, find_files


@pytest.fixture
def given(tmp_path):
    return partial(give, tmp_path)


def rows_of(path: str, **options) -> list[tuple[int, str, str | None]]:
    return list(Source(path, **options).records())


def fault(path: str, **options) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(path, **options)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_lines_are_taken_verbatim(given, suffix):
    path = given("a.txt" + suffix, "\ufeff one \r\n둘\u2028한 줄\nlast")
    assert rows_of(path) == [(1, " one ", None), (2, "둘\u2028한 줄", None), (3, "last", None)]


def test_json_lines(given):
    lines = [{"id": 7, "text": "a"}, {"id": "x", "text": "한국어"}]
    path = given("a.jsonl", "\n\n".join(map(json.dumps, lines)) + "\n\n")
    assert rows_of(path) == [(1, "a", "7"), (3, "한국어", "x")]
    other = given("b.jsonl", '{"_id": "q", "body": "a"}')
    assert rows_of(other, column="body") == [(1, "a", "q")]


def test_csv_with_quotes_commas_and_line_breaks(given):
    buffer = io.StringIO()
    texts = ["a, b", 'say "hi"', "two\nlines", "한국어"]
    csv.writer(buffer).writerows([["id", "text"], *([i, t] for i, t in enumerate(texts))])
    path = given("a.csv", buffer.getvalue() + "\r\n")
    assert [(text, name) for _, text, name in rows_of(path)] == [
        (text, str(i)) for i, text in enumerate(texts)
    ]
    assert [line for line, _, _ in rows_of(path)] == [2, 3, 5, 6]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"fine\ncaf\xe9\n", "line 2: not UTF-8 (byte 0xe9 at position 3)"),
        ("a.txt.gz", b"fine\ncaf\xe9\n", "line 2: not UTF-8"),
        ("a.csv", b"text\nfine\ncaf\xe9\n", "line 3: not UTF-8"),
        ("a.txt", "fine\n\nfine\n", "line 2: an empty text"),
        ("a.txt", "fine\n \t\n", "line 2: an empty text"),
        ("a.txt", "", "there is no text in it"),
        ("a.jsonl", "\n\n", "there is no text in it"),
        ("a.csv", "text\n", "there is no text in it"),
        ("a.csv", "", "the file is empty"),
        ("a.csv", "\n\n", "the file is empty"),
        ("a.csv.gz", b"", "the file is empty"),
        ("a.csv", "id;text\n1;a;b\n", "line 2: 3 columns instead of 2"),
        ("a.csv", "id,texts\n1,a\n", "line 1: no column 'text' among id, texts, did you mean"),
        ("a.csv", "id,text\n1,a,b\n", "line 2: 3 columns instead of 2"),
        ("a.csv", 'id,text\n1,"a\n', "line 2: not CSV"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "line 2: no column 'text' among txt"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', "line 2: 'text' is null"),
        ("a.jsonl", '{"text": 3}\n', "line 1: 'text' is a int"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "line 2: a list"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", '{"text": "\\ud83d"}\n', "line 1: half a surrogate pair"),
        ("a.jsonl", '{"id": 1, "text": "a"}\n{"text": "b"}\n', "line 2: no id"),
        ("a.pdf", "x", "unknown kind of file. Allowed: .txt, .jsonl, .csv"),
    ],
)
def test_faults_name_the_line(given, name, content, said):
    message = fault(given(name, content))
    assert said in message
    assert name in message
    assert "Fix: " in message or "Allowed: " in message


@pytest.mark.parametrize(
    "content",
    [
        'id;text\n1;a, b\n2;"c;d"\n',
        'id\ttext\n1\ta, b\n2\t"c;d"\n',
        'sep=;\nid;text\n1;a, b\n2;"c;d"\n',
        "\ufeffsep=|\r\nid|text\r\n1|a, b\r\n2|c;d\r\n",
        '\n\nid,text\n1,"a, b"\n2,c;d\n',
    ],
)
def test_csv_of_spreadsheets(given, content):
    """Where numbers are written with a comma, a semicolon stands between the columns."""
    rows = list(Source(given("a.csv", content)).rows())
    assert [(row.id, row.text) for row in rows] == [("1", "a, b"), ("2", "c;d")]
    lines = content.splitlines()
    assert rows[0].number == 1 + next(n for n, line in enumerate(lines) if line.startswith("1"))


def test_a_column_of_one_is_divided_by_nothing(given):
    rows = list(Source(given("a.csv", "text\na;b\nc\td\n")).rows())
    assert [row.text for row in rows] == ["a;b", "c\td"]


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet"])
def test_what_is_not_compressed_says_what_to_do(given, tmp_path, kind):
    name = "a.parquet" if kind == "parquet" else f"a.csv.{kind}"
    (tmp_path / name).write_bytes(b"id,text\n1,a\n")
    assert re.search(
        "not a whole .*Fix: download it or write it again", fault(str(tmp_path / name))
    )


def test_half_a_gzip_file(tmp_path):
    whole = gzip.compress(b"a line of text\n" * 1000)
    (tmp_path / "a.txt.gz").write_bytes(whole[: len(whole) // 2])
    assert "not a whole gzip file" in fault(str(tmp_path / "a.txt.gz"))


@pytest.mark.parametrize("place", ["", "notes.md"])
def test_documents_are_not_rows_but_whole_texts(given, tmp_path, place):
    given("notes.md", "# A note")
    assert "Fix: encode and search take .md with --whole-files" in fault(str(tmp_path / place))
    given("texts.txt", "a text")
    with pytest.raises(DataError, match=r"Fix: write pairs, as \.jsonl"):
        find_files(str(tmp_path / "texts.txt"), (".jsonl", ".csv"))
    with pytest.raises(DataError, match=r"is not a file or folder, did you mean 'texts\.txt'"):
        find_files(str(tmp_path / "text.txt"), (".jsonl", ".csv"))


def test_missing_file_names_the_nearest(given, tmp_path):
    given("texts.txt", "a")
    assert "did you mean 'texts.txt'?" in fault(str(tmp_path / "text.txt"))
    said = fault(str(tmp_path / "vectors"))
    assert "vectors is not a file or folder" in said and "Allowed: .txt" in said
    assert f"Fix: give {Path.home()}/nowhere/a.txt." in fault("~/nowhere/a.txt")


def test_parquet_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = pa.array([b"one", b"caf\xe9", None, "둘".encode()], pa.binary()).view(pa.string())
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"_id": [7, 8, 9, 10], "text": raw, "n": [1, 2, 3, 4]}), path)
    rows = list(Source(path, keep=("n",)).rows())
    assert [(r.number, r.text, r.id, r.kept) for r in rows if r.fault is None] == [
        (1, "one", "7", (1,)),
        (4, "둘", "10", (4,)),
    ]
    assert [r.fault[0] for r in rows if r.fault] == [
        "not UTF-8 (byte 0xe9 at position 3)",
        "'text' is null",
    ]
    assert "a.parquet, row 2: not UTF-8" in fault(path)
    assert "no column 'txt' among _id, text, n, did you mean 'text'" in fault(path, column="txt")
    assert "row 1: 'n' is a int" in fault(path, column="n")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-20])
    assert "not a whole Parquet file" in fault(path)


def test_zstd(tmp_path):
    import pyarrow as pa

    raw = "하나\n".encode() * 5000 + b"last"
    packed = pa.compress(raw, codec="zstd", asbytes=True)
    (tmp_path / "a.txt.zst").write_bytes(packed + packed)  # two frames, as zstd -T0 writes
    rows = rows_of(str(tmp_path / "a.txt.zst"))
    assert len(rows) == 10001 and rows[5000] == (5001, "last하나", None)
    for broken in (packed[:-9], b"no zstd at all, but long enough to be"):
        (tmp_path / "a.txt.zst").write_bytes(broken)
        assert "not a whole zstd file" in fault(str(tmp_path / "a.txt.zst"))
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    assert "unknown kind of file" in fault(str(tmp_path / "a.parquet.gz"))


def test_a_folder_is_read_in_order(given, tmp_path):
    root = tmp_path / "in"
    (root / "b").mkdir(parents=True)
    given("in/b/2.txt", "three\n")
    given("in/a.txt.gz", "one\ntwo\n")
    given("in/c.csv", "text\nfour\n")
    given("in/notes.md", "x")
    given("in/.hidden.txt", "x")
    given("in/_SUCCESS", "x")
    source = Source(str(root))
    assert [text for _, text, _ in source.records()] == ["one", "two", "three", "four"]
    assert source.survey() == [2, 1, 1]
    assert source.names == ["a.txt.gz", "b/2.txt", "c.csv"]
    assert source.ignored == [str(root / "notes.md")]
    given("in/b/2.txt", "three\n\n")
    assert f"{root / 'b' / '2.txt'}, line 2: an empty text" in fault(str(root))


def test_a_data_set_of_the_hub_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for split, texts in {"train": ["하나", None, "three"], "test": ["four"]}.items():
        lines = [json.dumps({"id": i, "text": t, "n": i}) for i, t in enumerate(texts)]
        (tmp_path / "set" / f"{split}.jsonl").write_text("\n".join(lines))
    source = Source(f"hf:{tmp_path / 'set'}", keep=("n",))
    rows = list(source.rows())
    assert [(r.text, r.id, r.kept) for r in rows if not r.fault] == [
        ("하나", "0", (0,)),
        ("three", "2", (2,)),
    ]
    assert where(source.files[0], rows[1].number) == f"{source.name}, row 2"
    assert rows_of(f"hf:{tmp_path / 'set'}::test") == [(1, "four", "0")]
    assert "no column 'txt' among id, text, n" in fault(source.path, column="txt")
    assert "cannot be read as a Hugging Face data set" in fault(f"hf:{tmp_path / 'nothing'}")
    assert Source("owner/name").files == ["hf:owner/name"]
    assert "is not a file" in fault("owner/name.txt")


def test_what_spoils_one_row_can_be_passed_over(given):
    lines = ["fine", "", "caf\xe9", "x" * 50, "  "]
    raw = "\n".join(lines).encode("latin1")
    rows = list(Source(given("a.txt", raw), max_bytes=50).rows())
    assert [r.text for r in rows] == ["fine", "", "", "", ""]
    assert [r.fault and r.fault[0][:12] for r in rows] == [
        None,
        "an empty tex",
        "not UTF-8 (b",
        "a text of 50",
        "an empty tex",
    ]
    assert Source(given("b.txt", raw), max_bytes=50).survey(skip=True) == [5]
    with pytest.raises(DataError, match="line 2: an empty text.*or skip such rows"):
        Source(given("b.txt", raw), max_bytes=50).survey()
    many = ['{"text": "a"}', "{", "[]", '{"txt": 1}', '{"text": "\\ud83d"}', '{"text": 7}']
    rows = list(Source(given("a.jsonl", "\n".join(many))).rows())
    assert [r.number for r in rows if r.fault] == [2, 3, 4, 5, 6]
    # A quote that is never closed swallows what follows: no row of the rest is certain.
    with pytest.raises(DataError, match="not CSV"):
        list(Source(given("a.csv", 'text\nfine\n"open\nfine\n')).rows())


def test_a_line_without_end_is_not_read_into_memory(given, monkeypatch):
    from unmasked.files import readers

    monkeypatch.setattr(readers, "LONGEST_LINE", 1 << 20)
    assert "line 2: longer than 1 MiB" in fault(given("a.txt", "fine\n" + "x" * (1 << 21)))
