"""What a file is by its first bytes, and whether the advice that is given works."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import sys

import pyarrow as pa
import pytest

from unmasked.errors import DataError
from unmasked.files.content import encoding_of, file_fault
from unmasked.files.source import Source

TEXTS = {
    "English": "plain text one\nsecond line here\n",
    "French": "café déjà vu à Noël\nune autre ligne\n",
    "Korean": "첫째 줄의 글\n둘째 줄\n",
    "Chinese": "这是中文文本。\n第二行\n",
    "Japanese": "これは日本語の文です。\n二行目\n",
    "Russian": "Привет, мир и люди\nвторая строка\n",
    "emoji": "hi 😀\n둘 😀\n",
}
WIDE = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


def mend(error: DataError) -> None:
    """Run the command that an error advises."""
    command = re.search(r"(?:iconv|tr|gzip|zstd) .*(?=\.$)", str(error).split("Fix: ")[1])
    subprocess.run(["bash", "-c", command[0]], check=True)


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("encoding", WIDE)
def test_wide_characters_are_named_and_the_advice_works(tmp_path, language, encoding):
    path = tmp_path / "a file.txt"
    path.write_bytes(TEXTS[language].encode(encoding))
    with pytest.raises(DataError, match=r"it is UTF-(16|32)(LE|BE)?, .* not UTF-8") as caught:
        list(Source(str(path)).rows())
    mend(caught.value)
    made = (tmp_path / "a file-fixed.txt").read_text(encoding="utf-8")
    assert made.removeprefix("\ufeff") == TEXTS[language]


@pytest.mark.parametrize("language", TEXTS)
def test_utf_8_is_not_taken_for_anything_else(language):
    raw = TEXTS[language].encode()
    for head in (raw, b"\xef\xbb\xbf" + raw, raw * 300, raw[:-1], b"", b"a", b"\r\n"):
        for cut in range(len(head) - 4, len(head)):
            assert file_fault("a.txt", head[: max(cut, 0)]) is None


def test_what_the_wrong_advice_made_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXTS["English"].encode("utf-16").decode("latin1").encode())
    with pytest.raises(DataError, match="UTF-16 that was converted to UTF-8 as if") as caught:
        list(Source(str(path)).rows())
    mend(caught.value)
    assert (tmp_path / "a-fixed.txt").read_text(encoding="utf-8") == TEXTS["English"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files_are_looked_into(tmp_path, suffix):
    raw = TEXTS["English"].encode("utf-16")
    packed = gzip.compress(raw) if suffix == ".gz" else pa.compress(raw, "zstd", asbytes=True)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(packed)
    with pytest.raises(DataError, match=r"it is UTF-16, as its byte order mark") as caught:
        list(Source(str(path)).rows())
    if shutil.which("gzip" if suffix == ".gz" else "zstd"):
        mend(caught.value)
        assert (tmp_path / "a-fixed.txt").read_text(encoding="utf-8") == TEXTS["English"]


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (gzip.compress(b"text", mtime=0), "gzip"),
        (pa.compress(b"text", "zstd", asbytes=True), "zstd"),
        (b"PAR1....", "Parquet"),
        (b"%PDF-1.7", "PDF"),
        (b"PK\x03\x04....", "a zip archive"),
        (b"one\rtwo\r", "its lines end in CR alone"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html>\n<html><body>404\n", "a page of HTML"),
        (b"\n<HTML lang='en'>\n", "a page of HTML"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.tsv"])
def test_other_formats_under_a_name_of_text_are_named(tmp_path, head, kind, name):
    (tmp_path / name).write_bytes(head)
    with pytest.raises(DataError, match=f"{name}: .*{kind}.* Fix: "):
        list(Source(str(tmp_path / name)).rows())


def test_lines_that_end_in_cr_alone_are_mended_as_advised(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\r")
    with pytest.raises(DataError) as caught:
        list(Source(str(tmp_path / "a.txt")).rows())
    mend(caught.value)
    rows = Source(str(tmp_path / "a-fixed.txt")).rows()
    assert [row.text for row in rows] == ["one", "two"]


OBJECTS = '{"text": "one"}\n{"n": 2, "text": "two"}\n'


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".TXT"])
@pytest.mark.parametrize("lines", [OBJECTS, OBJECTS * 900, '{"text": "' + "a " * 9000 + '"}\n'])
def test_json_lines_that_are_called_a_text_are_copied_as_advised(tmp_path, lines, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(lines.encode()) if ".gz" in suffix else lines.encode())
    with pytest.raises(DataError, match="every line of it is a JSON object") as caught:
        list(Source(str(path)).rows())
    subprocess.run(["bash", "-c", str(caught.value).split("Fix: ")[1][:-1]], check=True)
    copied = tmp_path / ("a.jsonl" + suffix.lower().removeprefix(".txt"))
    rows = list(Source(str(copied)).rows())
    assert len(rows) == lines.count("\n") and not any(row.fault for row in rows)


@pytest.mark.parametrize(
    "line",
    ["{a: 1} is a set", "{'a': 1}", '{"a"} is a set', "[1]", "{}", "<html5 is a word", "<b>"],
)
def test_a_line_that_looks_a_little_like_another_format_is_a_text(tmp_path, line):
    (tmp_path / "a.txt").write_text(f"{line}\ntwo\n")
    assert [row.text for row in Source(str(tmp_path / "a.txt")).rows()] == [line, "two"]
    (tmp_path / "a.txt").write_text(OBJECTS + "a text\n")
    assert len([row.text for row in Source(str(tmp_path / "a.txt")).rows()]) == 3


def test_a_file_that_was_packed_twice_is_unpacked_as_advised(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(gzip.compress(b"one\n")))
    with pytest.raises(DataError, match="it is gzip by its content") as caught:
        list(Source(str(tmp_path / "a.txt.gz")).rows())
    mend(caught.value)
    assert [row.text for row in Source(str(tmp_path / "a-fixed.txt")).rows()] == ["one"]


def test_what_comes_in_by_standard_input_is_not_copied(tmp_path):
    for head in (gzip.compress(b"text"), OBJECTS.encode()):
        assert file_fault("-", head)[1].startswith("write it to a file with the suffix of ")


def test_a_packed_file_is_unpacked_by_the_command_whatever_its_capitals():
    head = "one\n".encode("utf-16")
    advised = "gzip -dc A.TXT.GZ | iconv -f utf-16 -t utf-8 > A-fixed.TXT"
    assert file_fault("A.TXT.GZ", head)[1] == advised


@pytest.mark.parametrize("name", ["A.TXT", "a.JSONL", "A.Csv", "A.TXT.GZ"])
def test_a_name_in_capitals_says_the_same(tmp_path, name):
    text = {"j": '{"text": "one"}\n', "c": "text\none\n"}.get(name.lower()[2], "one\n")
    raw = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("GZ") else raw)
    assert [row.text for row in Source(str(tmp_path / name)).rows()] == ["one"]
    assert len(Source(str(tmp_path)).files) == 1


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("a.b.jsonl", "a.b-fixed.jsonl"),
        ("a.json", "a.jsonl"),
        ("A.JSONL", "A-fixed.JSONL"),
    ],
)
def test_a_json_array_is_written_by_line_as_advised(tmp_path, name, other):
    path = tmp_path / name
    path.write_text('[\n  {"text": "one"},\n  {"text": "둘"}\n]\n', encoding="utf-8")
    with pytest.raises(
        DataError, match=r"(?i)json .*one object per line\. Fix: python -c"
    ) as caught:
        list(Source(str(path)).rows())
    command = str(caught.value).split("Fix: ")[1][:-1]
    subprocess.run(["bash", "-c", command.replace("python", sys.executable)], check=True)
    assert [row.text for row in Source(str(tmp_path / other)).rows()] == ["one", "둘"]


def test_lines_that_are_called_json_are_copied_as_advised(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(DataError, match="a .json file is read as .jsonl") as caught:
        list(Source(str(path)).rows())
    subprocess.run(["bash", "-c", str(caught.value).split("Fix: ")[1][:-1]], check=True)
    assert len(list(Source(f"{path}l").rows())) == 2


def test_a_key_that_is_given_twice_is_the_fault_of_its_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "b"}\n{"text": "c"}\n')
    first, second = Source(str(tmp_path / "a.jsonl")).rows()
    assert first.fault[0].startswith("not JSON ('text' is given twice)") and second.text == "c"


@pytest.mark.parametrize(
    ("text", "encoding", "said"),
    [
        ("café déjà vu", "latin1", "cp1252"),
        ("Müller, Straße, größer", "latin1", "cp1252"),
        ("“quoted” – it’s", "cp1252", "cp1252"),
        ("이 글은 한국어입니다", "cp949", "cp949"),
        ("これは日本語の文です。", "shift_jis", "shift_jis"),
        ("这是中文文本。", "gb18030", "gb18030"),
        ("Привет, мир", "cp1251", "cp1251"),
    ],
)
def test_the_advised_encoding_makes_text_of_the_line(tmp_path, text, encoding, said):
    raw = text.encode(encoding)
    assert encoding_of(raw) == said
    assert raw.decode(said) == text
    (tmp_path / "a.txt").write_bytes(b"fine\n" + raw + b"\n")
    with pytest.raises(DataError, match=f"line 2: not UTF-8 .*text in {said}") as caught:
        list(Source(str(tmp_path / "a.txt")).records())
    mend(caught.value)
    assert (tmp_path / "a-fixed.txt").read_text(encoding="utf-8") == f"fine\n{text}\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"fine and long enough to be text\na\0b\n"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "a\\u0000b"}\n'),
        ("a.csv", b"text,id\nfine and long enough to be text,1\na\0b,2\n"),
        ("a.tsv", b"text\tid\nfine and long enough to be text\t1\na\0b\t2\n"),
    ],
)
def test_a_stray_nul_is_the_fault_of_its_row(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    faults = [row.fault for row in Source(str(tmp_path / name)).rows()]
    assert faults[0] is None and "a NUL character in 'text' at character 1" in faults[1][0]


def test_a_mark_between_joined_files_is_no_part_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n")
    assert [row.text for row in Source(str(tmp_path / "a.txt")).rows()] == ["one", "two"]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n\xef\xbb\xbf{"text": "two"}\n')
    assert [row.text for row in Source(str(tmp_path / "a.jsonl")).rows()] == ["one", "two"]


@pytest.mark.parametrize(("name", "between"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_header_has_each_column_once_and_stands_once(tmp_path, name, between):
    path = tmp_path / name
    path.write_text(f"text{between}text\na{between}b\n")
    with pytest.raises(DataError, match="line 1: the header has 'text' 2 times"):
        list(Source(str(path)).rows())
    path.write_text(f"\ufefftext{between}url\na{between}b\n\ufefftext{between}url\nc{between}d\n")
    rows = list(Source(str(path)).rows())
    assert [row.text for row in rows] == ["a", "", "c"]
    assert rows[1].fault[0].startswith("the header again")
