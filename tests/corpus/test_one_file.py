"""One file of vectors: every row in its place, whole or not there, written by one process."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from unmasked.corpus import Encoding, Local, Shards, check_output, encode_corpus, encode_folder
from unmasked.errors import DataError, OutputError
from unmasked.files.source import Source


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    return path


def test_vectors_are_those_of_encode_whatever_the_window(model, given, tmp_path, sentences):
    path = given("a.txt", "\n".join(sentences) + "\n")
    seen: list[int] = []
    expected = model.encode(sentences, show_progress_bar=False)
    for window in (3, 100):
        output = tmp_path / f"{window}.npy"
        done = encode_corpus(
            model, Source(path), output, window=window, progress=lambda rows, _: seen.append(rows)
        )
        assert done == (*expected.shape, 0, 0)
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
    assert encode_corpus(model, Source(path), tmp_path / "v.npy", options) == (2, 8, 0, 0)
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
    assert encode_corpus(model, Source("-"), tmp_path / "v.npy") == (2, 32, 0, 0)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\xff\n")))
    with pytest.raises(DataError, match="standard input, line 2: not UTF-8"):
        encode_corpus(model, Source("-"), tmp_path / "w.npy")


def test_kinds_of_output(tmp_path):
    with pytest.raises(OutputError, match=r"Allowed: \.npy, \.parquet"):
        check_output(tmp_path / "v.csv")
    (tmp_path / "v.npy").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path / "v.npy", overwrite=True)


def test_skipped_rows_of_one_file_are_listed(model, given, tmp_path):
    path = given("a.txt", b"one\n\ncaf\xe9\nfour\n")
    for kind in (".npy", ".safetensors", ".parquet"):
        output = tmp_path / f"v{kind}"
        assert encode_corpus(model, Source(path), output, skip=True, window=2) == (2, 32, 2, 0)
        listed = (tmp_path / f"v{kind}.skipped.jsonl").read_text().splitlines()
        assert [json.loads(line)["row"] for line in listed] == [1, 2]
    import pyarrow.parquet as pq

    assert pq.read_table(tmp_path / "v.parquet")["row"].to_pylist() == [0, 3]
    with pytest.raises(DataError, match="none of the first"):
        nothing, encoding = Source(given("n.txt", "\n\n")), Encoding(precision="int8")
        encode_corpus(model, nothing, tmp_path / "n.npy", encoding, skip=True)


def test_a_skipped_row_of_a_file_whose_name_is_not_unicode_is_listed(model, tmp_path):
    (tmp_path / "in").mkdir()
    try:
        (tmp_path / "in" / os.fsdecode(b"\xe9.txt")).write_text("one\n\n")
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    done = encode_corpus(model, Source(str(tmp_path / "in")), tmp_path / "a.npy", skip=True)
    assert (done.rows, done.skipped) == (1, 1)
    (listed,) = (tmp_path / "a.npy.skipped.jsonl").read_text().splitlines()
    assert json.loads(listed)["row"] == 1


def test_a_second_writer_of_the_same_file_is_refused(model, texts, tmp_path):
    """Both would write into one file aside, and the last to finish would call it its own."""
    output, refused = tmp_path / "out" / "v.npy", []

    def meanwhile(rows, tokens):
        if not refused:
            with pytest.raises(OutputError, match=r"v\.npy: another process is writing to it"):
                encode_corpus(model, Source(str(texts)), output, skip=True)
            refused.append(rows)

    encode_corpus(model, Source(str(texts)), output, Encoding(normalize=True), skip=True,
                  progress=meanwhile)  # fmt: skip
    assert refused
    np.testing.assert_allclose(np.linalg.norm(np.load(output), axis=1), 1, atol=1e-5)
    assert {p.name for p in output.parent.iterdir()} == {"v.npy", "v.npy.skipped.jsonl"}


def test_the_list_of_rows_skipped_is_that_of_this_file(model, texts, tmp_path):
    output = tmp_path / "v.npy"
    encode_corpus(model, Source(str(texts)), output, skip=True)
    assert (tmp_path / "v.npy.skipped.jsonl").is_file()
    texts.write_text("one\ntwo\n")
    encode_corpus(model, Source(str(texts)), output, skip=True, overwrite=True)
    assert not (tmp_path / "v.npy.skipped.jsonl").exists()


def test_ranges_that_nothing_would_use_are_refused(model, texts, tmp_path):
    given = tmp_path / "r.npy"
    with pytest.raises(OutputError, match=r"float32 has no ranges\. Fix: --precision int8"):
        encode_corpus(model, Source(str(texts)), tmp_path / "v.npy", ranges=given)
    with pytest.raises(OutputError, match="binary has no ranges"):
        encode_folder(
            Local(lambda: model), Source(str(texts)), tmp_path / "v", Encoding(precision="binary"),
            Shards(ranges=given),
        )  # fmt: skip


def test_kept_columns_have_their_own_types_in_the_file(model, given, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": "a", "price": 1}, {"text": "b", "price": 1.5, "tags": ["x"]}, {"text": "c"}]
    path = given("a.jsonl", "\n".join(map(json.dumps, rows)))
    encode_corpus(model, Source(path, keep=("price", "tags")), tmp_path / "v.parquet", window=1)
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.schema.field("price").type == pa.float64()
    assert table["price"].to_pylist() == [1.0, 1.5, None]
    assert table["tags"].to_pylist() == [None, ["x"], None]


def test_a_value_that_does_not_fit_names_its_row(tmp_path):
    from unmasked.corpus.writers import make_writer

    with (tmp_path / "v.parquet").open("wb") as file:
        columns = [("row", "int64"), ("n", "int64")]
        writer = make_writer(".parquet", file, np.dtype("float32"), 2, columns)
        with pytest.raises(DataError, match=r"row 8 \(from 0\): 'n' is 'x', which the type int64"):
            writer.write([[7, 8], [1, "x"]], np.zeros((2, 2), dtype="float32"))
        writer.close()


def test_files_of_one_stem_have_their_own_ranges_and_lists(model, given, tmp_path, sentences):
    from unmasked.corpus.search import search_in

    source = Source(given("a.txt", "\n".join(["", *sentences]) + "\n"))
    other = Source(given("b.txt", "one\ntwo\nthree\n"))
    encoding = Encoding(precision="int8")
    encode_corpus(model, source, tmp_path / "v.npy", encoding, skip=True)

    def found():
        return search_in(model, tmp_path / "v.npy")(sentences[:2], 3)

    before = found()
    assert [hits[0].row for hits in before] == [1, 2]
    for kind in (".safetensors", ".parquet"):
        encode_corpus(model, other, tmp_path / f"v{kind}", encoding)
        assert found() == before
    # An earlier version named both after the stem; they are read if there are no others.
    for kind in ("ranges.npy", "skipped.jsonl"):
        (tmp_path / f"v.npy.{kind}").rename(tmp_path / f"v.{kind}")
    assert found() == before
    encode_corpus(model, other, tmp_path / "v.npy", encoding, overwrite=True)
    assert [hits[0].row for hits in search_in(model, tmp_path / "v.npy")(["one"], 1)] == [0]
    (tmp_path / "v.npy.skipped.jsonl").write_text("7\n")
    with pytest.raises(DataError, match="is no list of skipped rows. Fix: encode"):
        found()


def test_an_interrupted_overwrite_leaves_vectors_ranges_and_list(model, given, tmp_path):
    output, int8 = tmp_path / "out" / "v.npy", Encoding(precision="int8")
    source = Source(given("a.txt", "one\n\ntwo\n"))
    encode_corpus(model, source, output, int8, skip=True)
    before = {path.name: path.read_bytes() for path in output.parent.iterdir()}
    assert set(before) == {"v.npy", "v.npy.ranges.npy", "v.npy.skipped.jsonl"}

    def stop(rows, tokens):
        if rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        other = Source(given("b.txt", "three\nfour\n"))
        encode_corpus(model, other, output, int8, overwrite=True, progress=stop)
    assert {path.name: path.read_bytes() for path in output.parent.iterdir()} == before


def test_an_output_that_is_read_is_refused(model, given, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one\ntwo\n")
    for name in ("v.parquet", "v.npy", "more/v.npy"):
        with pytest.raises(OutputError, match="in the folder that is read. Fix: name one outside"):
            encode_corpus(model, Source(str(folder)), folder / name)
    output = tmp_path / "v.parquet"
    encode_corpus(model, Source(str(folder / "a.txt")), output)
    (tmp_path / "link.parquet").symlink_to(output)
    rows = Source(given("v.npy.skipped.jsonl", '{"text": "one"}\n'))
    ranges = given("r.npy", "")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    replaced = [
        (Source(str(output)), output, None),
        (Source(str(output)), tmp_path / "link.parquet", None),
        (rows, tmp_path / "v.npy", None),
        (Source(str(folder / "a.txt")), tmp_path / "r.npy", Path(ranges)),
    ]
    for source, path, used in replaced:
        with pytest.raises(OutputError, match="would replace .*, which is read. Fix: give another"):
            check_output(path, True, source, used)
        with pytest.raises(OutputError, match="would replace .*, which is read. Fix: give another"):
            int8 = Encoding(precision="int8")
            encode_corpus(model, source, path, int8, overwrite=True, ranges=used)
    assert {path: path.read_bytes() for path in before} == before


def test_bits_that_do_not_fill_their_bytes_are_scored_as_in_a_folder(
    model, given, tmp_path, sentences
):
    from unmasked.corpus.search import open_vectors, search_in

    source = Source(given("a.txt", "\n".join(sentences) + "\n"))
    encoding = Encoding(precision="binary", truncate_dim=20)
    encode_folder(Local(lambda: model), source, tmp_path / "v", encoding)
    expected = [hit.score for hit in search_in(model, tmp_path / "v")(["a cat"], 8)[0]]
    for kind in (".safetensors", ".parquet"):
        encode_corpus(model, source, tmp_path / f"v{kind}", encoding)
        assert open_vectors(tmp_path / f"v{kind}").width == 20
        found = search_in(model, tmp_path / f"v{kind}")(["a cat"], 8)[0]
        assert [hit.score for hit in found] == expected
    with pytest.raises(OutputError, match=r"20 dimensions.*Fix: -o .*v\.safetensors, or --tr.* 16"):
        encode_corpus(model, source, tmp_path / "v.npy", encoding)
    encode_corpus(model, source, tmp_path / "v.npy", Encoding(precision="binary", truncate_dim=16))
