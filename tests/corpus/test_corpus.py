"""Texts in, vectors out: every fault with its line, every row in its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys

import numpy as np
import pytest

from unmasked.corpus import Encoding, check_output, encode_corpus
from unmasked.errors import DataError, OutputError
from unmasked.files.source import Source


@pytest.fixture(scope="module")
def model(tiny_decoder):
    from unmasked import LLM2Vec

    return LLM2Vec.from_pretrained(tiny_decoder, max_length=32, device="cpu")


@pytest.fixture
def given(tmp_path):
    def write(name: str, content: str | bytes) -> str:
        raw = content.encode() if isinstance(content, str) else content
        path = tmp_path / name
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return str(path)

    return write


def rows_of(path: str, **options) -> list[tuple[int, str, str | None]]:
    return list(Source(path, **options).records())


def fault(path: str, **options) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(path, **options)
    return str(caught.value)


# --- reading ------------------------------------------------------------------------------------


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
        ("a.csv", "", "line 1: no column 'text' among none"),
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


def test_half_a_gzip_file(tmp_path):
    whole = gzip.compress(b"a line of text\n" * 1000)
    (tmp_path / "a.txt.gz").write_bytes(whole[: len(whole) // 2])
    assert "not a whole gzip file" in fault(str(tmp_path / "a.txt.gz"))


def test_missing_file_names_the_nearest(given, tmp_path):
    given("texts.txt", "a")
    assert "did you mean 'texts.txt'?" in fault(str(tmp_path / "text.txt"))


# --- writing ------------------------------------------------------------------------------------


def test_vectors_are_those_of_encode_whatever_the_window(model, given, tmp_path, sentences):
    path = given("a.txt", "\n".join(sentences) + "\n")
    seen: list[int] = []
    expected = model.encode(sentences, show_progress_bar=False)
    for window in (3, 100):
        output = tmp_path / f"{window}.npy"
        done = encode_corpus(
            model, Source(path), output, window=window, progress=lambda rows, _: seen.append(rows)
        )
        assert done == (*expected.shape, 0)
        vectors = np.load(output)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert seen == [0, 3, 6, 8, 0, 8]
    korean = [i for i, text in enumerate(sentences) if "니다" in text]
    assert abs(expected[korean[0]] - expected[korean[1]]).max() > 1e-3


def test_a_large_npy_header_is_mended_in_place(model, tmp_path, given):
    output = tmp_path / "v.npy"
    encode_corpus(model, Source(given("a.txt", "word\n" * 1234)), output, window=1000)
    assert np.load(output, mmap_mode="r").shape == (1234, 32)


def test_parquet_has_rows_ids_and_fixed_size_vectors(model, given, tmp_path, sentences):
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [json.dumps({"id": f"d{i}", "text": text}) for i, text in enumerate(sentences)]
    output = tmp_path / "v.parquet"
    encode_corpus(model, Source(given("a.jsonl", "\n".join(lines))), output, window=3)
    table = pq.read_table(output)
    assert table.column_names == ["row", "id", "vector"]
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 32)
    assert table["row"].to_pylist() == list(range(8))
    assert table["id"].to_pylist() == [f"d{i}" for i in range(8)]
    expected = model.encode(sentences, show_progress_bar=False)
    np.testing.assert_allclose(np.array(table["vector"].to_pylist()), expected, atol=1e-5)
    encode_corpus(model, Source(given("a.txt", "a\nb\n")), tmp_path / "w.parquet")
    assert pq.read_table(tmp_path / "w.parquet").column_names == ["row", "vector"]


def test_options_reach_the_model(model, given, tmp_path):
    path = given("a.txt", "one text\nanother text\n")
    options = Encoding(prompt="Find it:\n", normalize=True, truncate_dim=8, batch_size=1)
    assert encode_corpus(model, Source(path), tmp_path / "v.npy", options) == (2, 8, 0)
    vectors = np.load(tmp_path / "v.npy")
    expected = model.encode(
        [["Find it:\n", "one text"], ["Find it:\n", "another text"]], show_progress_bar=False
    )[:, :8]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": "a", "prompt_name": "b"}, "give one of them"),
        ({"prompt_name": "querry"}, "did you mean 'query'?"),
        ({"truncate_dim": 33}, "from 1 to 32"),
    ],
)
def test_impossible_options_are_refused(model, given, tmp_path, options, said):
    source = Source(given("a.txt", "a\n"))
    with pytest.raises(DataError, match=said.replace("?", r"\?")):
        encode_corpus(model, source, tmp_path / "v.npy", Encoding(**options))
    assert not (tmp_path / "v.npy").exists()


def test_a_fault_leaves_nothing_and_an_old_output_whole(model, given, tmp_path):
    output = tmp_path / "out" / "v.npy"
    encode_corpus(model, Source(given("a.txt", "a\n")), output)
    before = output.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        encode_corpus(model, Source(given("a.txt", "a\n")), output)
    broken = Source(given("b.txt", b"a\nb\n\xff\n"))
    with pytest.raises(DataError, match="line 3"):
        encode_corpus(model, broken, output, overwrite=True, window=2)
    assert output.read_bytes() == before
    assert [p.name for p in output.parent.iterdir()] == ["v.npy"]
    encode_corpus(model, Source(given("a.txt", "a\nb\n")), output, overwrite=True)
    assert len(np.load(output)) == 2


def test_vectors_that_are_not_finite_are_refused(tiny_decoder, given, tmp_path):
    import torch

    from unmasked import LLM2Vec

    broken = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    with torch.no_grad():
        embeddings = broken.backbone.auto_model.get_input_embeddings().weight
        embeddings[broken.tokenizer("한")["input_ids"][-1]] = float("nan")
    source = Source(given("a.txt", "fine\nfine\n한\n"))
    with pytest.raises(DataError, match="line 3: the vector is NaN"):
        encode_corpus(broken, source, tmp_path / "v.npy", window=2)
    assert not (tmp_path / "v.npy").exists()


def test_standard_input(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("한국어\nword\n".encode())))
    assert encode_corpus(model, Source("-"), tmp_path / "v.npy") == (2, 32, 0)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\xff\n")))
    with pytest.raises(DataError, match="standard input, line 2: not UTF-8"):
        encode_corpus(model, Source("-"), tmp_path / "w.npy")


def test_kinds_of_output(tmp_path):
    with pytest.raises(OutputError, match=r"Allowed: \.npy, \.parquet"):
        check_output(tmp_path / "v.csv")
    (tmp_path / "v.npy").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path / "v.npy", overwrite=True)


# --- other inputs -------------------------------------------------------------------------------


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
    assert source.where(rows[1]) == f"{source.name}, row 2"
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
    with pytest.raises(DataError, match="line 2: an empty text.*or pass over such rows"):
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


def test_skipped_rows_of_one_file_are_listed(model, given, tmp_path):
    path = given("a.txt", b"one\n\ncaf\xe9\nfour\n")
    for kind in (".npy", ".safetensors", ".parquet"):
        output = tmp_path / f"v{kind}"
        assert encode_corpus(model, Source(path), output, skip=True, window=2) == (2, 32, 2)
        listed = (tmp_path / "v.skipped.jsonl").read_text().splitlines()
        assert [json.loads(line)["row"] for line in listed] == [1, 2]
    import pyarrow.parquet as pq

    assert pq.read_table(tmp_path / "v.parquet")["row"].to_pylist() == [0, 3]
    with pytest.raises(DataError, match="none of the first"):
        nothing, encoding = Source(given("n.txt", "\n\n")), Encoding(precision="int8")
        encode_corpus(model, nothing, tmp_path / "n.npy", encoding, skip=True)


def test_standard_input_continues_only_with_the_same_texts(model, tmp_path, monkeypatch):
    from unmasked.corpus import Local, Shards, encode_folder

    def run(text: str, folder: str = "v", **options):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        encoding = Encoding(precision="int8")
        engine = Local(lambda: model)
        return encode_folder(engine, Source("-"), tmp_path / folder, encoding, Shards(rows=2))

    text = "one\ntwo\nthree\nfour\nfive\n"
    assert run(text) == (5, 32, 0)
    whole = {p.name: p.read_bytes() for p in (tmp_path / "v").iterdir()}
    manifest = tmp_path / "v" / "_manifest.jsonl"
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:2]))
    (tmp_path / "v" / "part-000001.parquet").unlink()
    assert run(text) == (5, 32, 0)
    assert {p.name: p.read_bytes() for p in (tmp_path / "v").iterdir()} == whole
    with pytest.raises(DataError, match="rows 2 to 3 are not those"):
        run(text.replace("three", "tree"))
    with pytest.raises(DataError, match="rows 4 to 5 are not those"):
        run(text + "six\n")
    with pytest.raises(DataError, match="there is no text in it|none of the first"):
        run("", "w")
