"""The nearest texts of what was encoded: exact in every precision and kind of file."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from unmasked.corpus import Chunks, Encoding, Local, Shards, encode_corpus, encode_folder
from unmasked.corpus.search import nearest, nearest_vectors, open_vectors, search_in, search_texts
from unmasked.corpus.search.stored_files import StoredVectors
from unmasked.errors import DataError
from unmasked.files.source import Source
from unmasked.forward.nearest import best_scores


def stored(vectors: np.ndarray, precision: str = "float32", blocks: int = 3) -> StoredVectors:
    encoding = Encoding(precision=precision)
    ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)]) if precision == "int8" else None
    parts = np.array_split(encoding.store(vectors, ranges), blocks)
    rows = np.arange(len(vectors))
    return StoredVectors("v", parts, precision, vectors.shape[1], rows, ranges)


def exact(vectors: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    vectors, queries = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (vectors, queries))
    scores = queries @ vectors.T
    places = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(scores, places, axis=1), places


@pytest.fixture(params=["numpy", "faiss"])
def by(request, monkeypatch):
    """What takes the products."""
    if request.param == "faiss":
        pytest.importorskip("faiss", reason="FAISS is not installed")
        monkeypatch.setattr(best_scores, "MANY", 1)
    else:
        monkeypatch.setattr(best_scores, "faiss_for", lambda queries: None)
    monkeypatch.setattr(nearest, "BLOCK", 100)
    return request.param


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_the_nearest_are_the_nearest(by, precision):
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((1000, 64)).astype(np.float32)
    picked = np.array([5, 500, 999])
    queries = vectors[picked] + 0.3 * draw.standard_normal((3, 64)).astype(np.float32)
    found = nearest_vectors(stored(vectors, precision), queries, 7)
    scores, places = exact(vectors, queries, 7)
    assert found.places[:, 0].tolist() == picked.tolist()
    if precision == "float32":
        assert np.array_equal(found.places, places)
    if precision != "binary":
        np.testing.assert_allclose(found.scores, scores, atol=2e-2 if precision == "int8" else 1e-3)
    assert (np.diff(found.scores) <= 0).all()


def test_of_equal_vectors_the_first_comes_first(by):
    vectors = np.tile(np.eye(4, dtype=np.float32), (60, 1))
    found = nearest_vectors(stored(vectors), np.eye(4, dtype=np.float32)[:1], 5)
    assert found.scores.tolist() == [[1.0] * 5]
    if by == "numpy":
        assert found.places.tolist() == [[0, 4, 8, 12, 16]]
    few = nearest_vectors(stored(vectors[:3], blocks=1), vectors[:2], 10)
    assert few.places.shape == (2, 3)


@pytest.fixture
def texts(tmp_path, sentences):
    path = tmp_path / "t.jsonl"
    rows = [{"id": f"t{i}", "text": text} for i, text in enumerate(sentences)]
    rows.insert(2, {"id": "none", "text": ""})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
@pytest.mark.parametrize("kind", [".parquet", ".npy", ".safetensors"])
def test_a_folder_and_a_file_are_searched(model, texts, tmp_path, sentences, kind, precision):
    source, encoding = Source(str(texts)), Encoding(precision=precision)
    folder = tmp_path / "v"
    encode_folder(Local(lambda: model), source, folder, encoding, Shards(kind, 4, skip=True))
    encode_corpus(model, source, tmp_path / f"v{kind}", encoding, skip=True)
    for path in (folder, tmp_path / f"v{kind}"):
        found = search_in(model, path, texts=source)
        for asked in ([sentences[1], sentences[5]],):
            answers = found(asked, 3)
            assert [hits[0].row for hits in answers] == [1, 6]  # row 2 has no vector
            assert [hits[0].text for hits in answers] == asked
            assert [len(hits) for hits in answers] == [3, 3]
            if kind == ".parquet":
                assert [hits[0].id for hits in answers] == ["t1", "t5"]


def test_texts_are_searched_as_they_are(model, tmp_path, sentences):
    path = tmp_path / "t.txt"
    path.write_text("\n".join([*sentences[:4], " ".join(sentences)]) + "\n")
    (hits,) = search_texts(model, Source(str(path)))([sentences[3]], 1)
    assert hits[0].text == sentences[3] and hits[0].row == 3
    assert hits[0].score == pytest.approx(1, abs=1e-5) and hits[0].begin is None
    found = search_texts(model, Source(str(path)), Chunks(24))
    (hits,) = found([sentences[5]], 1)
    assert hits[0].row == 4 and " ".join(sentences)[hits[0].begin : hits[0].end] == hits[0].text


def test_what_cannot_be_searched_is_refused(model, texts, tmp_path, tiny_decoder, sentences):
    from unmasked import LLM2Vec

    folder = tmp_path / "v"
    source = Source(str(texts))
    encode_folder(Local(lambda: model), source, folder, shards=Shards(rows=4, skip=True))
    other = LLM2Vec.from_pretrained(tiny_decoder, max_length=33, device="cpu")
    with pytest.raises(DataError, match="another model.*Fix: give --model"):
        search_in(other, folder)
    (tmp_path / "o.txt").write_text("other\n")
    with pytest.raises(DataError, match="is not what .* was made from. Fix: give --texts"):
        search_in(model, folder, texts=Source(str(tmp_path / "o.txt")))
    encode_corpus(model, source, tmp_path / "v.npy", skip=True)  # has no manifest to compare
    search = search_in(model, tmp_path / "v.npy", texts=Source(str(tmp_path / "o.txt")))
    with pytest.raises(DataError, match="is not what .* was made from. Fix: give --texts"):
        search(sentences[3:4])
    manifest = folder / "_manifest.jsonl"
    *lines, _ = manifest.read_bytes().splitlines(keepends=True)
    for left in (lines, [*lines, b'{"shard": 3, "fi']):  # the second one was cut off in a line
        manifest.write_bytes(b"".join(left))
        with pytest.raises(DataError, match="not finished, 3 shards are there. Fix: run the unm"):
            open_vectors(folder)
    with pytest.raises(DataError, match="does not exist. Fix: unmasked encode .* -o 'a b'$"):
        open_vectors("a b")
    np.save(tmp_path / "c.npy", np.zeros((2, 3), complex))
    with pytest.raises(DataError, match="Allowed: .N, D. float32"):
        open_vectors(tmp_path / "c.npy")
    (tmp_path / "d.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be opened as vectors"):
        open_vectors(tmp_path / "d.npy")


def test_a_folder_without_all_its_shards_is_refused(model, texts, tmp_path):
    source, folder = Source(str(texts)), tmp_path / "v"
    for part in ((1, 2), (2, 2)):
        encode_folder(
            Local(lambda: model), source, folder, None, Shards(rows=4, part=part, skip=True)
        )
        if part[0] == 1:
            with pytest.raises(DataError, match="machine 2 of 2 are missing. Fix: .* --shard 2/2"):
                open_vectors(folder)
    assert len(open_vectors(folder))
    (folder / "part-000001.parquet").unlink()
    with pytest.raises(DataError, match="part-000001.parquet cannot be opened as vectors"):
        open_vectors(folder)


def test_the_verb(cli, tiny_decoder, tmp_path, sentences, monkeypatch):
    (tmp_path / "docs").mkdir()
    for i, text in enumerate(sentences):
        (tmp_path / "docs" / f"{i}.md").write_text(text)
    (tmp_path / "docs" / "x.py").touch()
    code, out, err = cli("encode", tiny_decoder, "docs", "--whole-files", "-o", "v", "--chunk", 64)
    assert code == 0 and "left out, files of another kind: 1 .py (docs/x.py)" in err
    model = ("--model", tiny_decoder)
    command = ["search", "v", sentences[2], *model, "--top", "2", "--json", "found.json"]
    code, out, _ = cli(*command, "--texts", "docs", "--whole-files")
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("1.0000  2.md, characters 0 to")
    assert lines[1].strip() == sentences[2] and len(lines) == 4
    found = json.loads((tmp_path / "found.json").read_text())
    assert found[0]["query"] == sentences[2] and found[0]["hits"][0]["id"] == "2.md"
    asked = f"{sentences[0]}\n{sentences[1]}\n\nunread\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(asked)))
    code, out, _ = cli("search", "docs", "--whole-files", *model, "--top", "1")
    assert code == 0 and [line[:12] for line in out.splitlines()[::2]] == [
        "1.0000  0.md",
        "1.0000  1.md",
    ]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("한국어\n".encode("cp949"))))
    code, _, err = cli("search", "v", *model)
    assert code == 2 and "standard input, line 1" in err
    assert "text in cp949: iconv -f cp949 -t utf-8 > texts-fixed.txt." in err
    code, _, err = cli("search", "v", "a", *model, "--chunk", "8")
    assert code == 2 and "--chunk splits texts, but v holds vectors. Fix" in err
    code, _, err = cli("encode", tiny_decoder, "docs", "-o", "w", "--late")
    assert code == 2 and "Fix: --chunk 256 --late" in err


@pytest.mark.parametrize("output", ["v", "v.parquet"])
def test_kept_columns_are_no_fields_of_a_hit(model, tmp_path, sentences, output):
    """Whatever their names are; and the text is that of the column that was encoded."""
    path, names = tmp_path / "t.jsonl", ("begin", "end", "score", "file", "text")
    other = {"begin": 3, "end": 5, "score": 0.5, "file": 7, "text": "another text"}
    rows = [{"body": text, **other} for text in sentences]
    path.write_text("\n".join(map(json.dumps, rows)))

    def found(keep, chunks=None):
        source = Source(str(path), "body", keep=keep)
        encoding = Encoding(chunks=chunks)
        if output == "v":
            engine = Local(lambda: model)
            encode_folder(engine, source, tmp_path / output, encoding, overwrite=True)
        else:
            encode_corpus(model, source, tmp_path / output, encoding, overwrite=True)
        return search_in(model, tmp_path / output)([sentences[2]], 1)[0][0]

    hit = found(names)
    assert hit[1:] == (2, None, None, None, None, None) and hit.score == pytest.approx(1, abs=1e-5)
    assert found((*names, "body"))[1:] == (2, None, None, None, None, sentences[2])
    hit = found(("text", "body"), Chunks(24))
    assert hit.row == 2 and hit.text and hit.text == sentences[2][hit.begin : hit.end]
    hit = found(("text",), Chunks(24))
    assert hit.begin is not None and hit.text is None


def test_files_of_others_are_refused_and_not_a_traceback(model, tmp_path, sentences):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from unmasked.corpus.search import are_vectors

    vectors = model.encode(sentences[:2], show_progress_bar=False)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    null = pa.array([None, [1.0] * 32], flat.type)
    tables = [
        {"text": sentences[:2], "vector": flat},
        {"row": ["a", "b"], "vector": flat},
        {"row": [0, 1], "vector": [[1.0], [2.0]]},
        {"row": [0, 1], "vector": null},
    ]
    for table in tables:
        pq.write_table(pa.table(table), tmp_path / "u.parquet")
        with pytest.raises(DataError, match="cannot be opened as vectors.*Fix: give the complete"):
            open_vectors(tmp_path / "u.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    assert not are_vectors(tmp_path / "bad.parquet")
    with pytest.raises(DataError, match="not a whole Parquet file"):
        list(Source(str(tmp_path / "bad.parquet")).rows())
    np.savez(tmp_path / "several.npz", vectors)
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "number.npy", 5)
    heads = {"long": b"\xff" * 8, "list": b"\x02" + bytes(7) + b"[]", "none": b"\x02" + bytes(7)}
    for name, head in heads.items():
        (tmp_path / f"{name}.safetensors").write_bytes(head)
    for path in [*tmp_path.glob("*.npy"), *tmp_path.glob("*.safetensors")]:
        with pytest.raises(DataError, match="Fix: give the complete output"):
            open_vectors(path)
    # A file of a version that wrote no settings has its columns only.
    rows = {"row": [0, 1], "begin": [4, 0], "end": [7, 1], "text": sentences[:2], "vector": flat}
    pq.write_table(pa.table(rows), tmp_path / "old.parquet")
    hit = search_in(model, tmp_path / "old.parquet")([sentences[0]], 1)[0][0]
    assert (hit.row, hit.begin, hit.end, hit.text) == (0, 4, 7, sentences[0][4:7])
