"""Documents that are divided: each passage has its document, its place and its own vector."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.shard_folders import contents, said

from unmasked.corpus import (
    Chunks,
    Encoding,
    Local,
    Shards,
    encode_corpus,
    encode_folder,
    encode_passages,
)
from unmasked.corpus.search import search_texts
from unmasked.errors import DataError, OutputError
from unmasked.files.source import Source

LATE, PLAIN = Chunks(20, 4, late=True), Chunks(20, 4)


@pytest.fixture
def documents(tmp_path, sentences) -> Path:
    """Nine documents: short ones, long ones, and longer than the 128 positions of the model."""
    path = tmp_path / "documents.jsonl"
    rows = [
        {"id": f"d{i}", "text": " ".join((sentences * 3)[i : i + 1 + 2 * i]), "n": i}
        for i in range(9)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def make(model, source, folder, chunks, shards=None, **options):
    source = source if isinstance(source, Source) else Source(str(source))
    shards = shards or Shards(rows=4, window=2)
    return encode_folder(Local(lambda: model), source, folder, Encoding(chunks=chunks), shards)


@pytest.mark.parametrize("mode", ["mean", "weighted_mean", "last_token"])
def test_late_is_plain_where_a_document_is_one_passage(tiny_decoder, sentences, mode):
    from unmasked import LLM2Vec

    model = LLM2Vec.from_pretrained(tiny_decoder, pooling_mode=mode, max_length=64, device="cpu")
    texts = [f"  {sentence}\n" for sentence in sentences]
    for prompt in (None, "Find this:\n"):
        found, late = encode_passages(model, texts, Chunks(50, late=True), prompt=prompt)
        assert found == [(i, 0, len(text)) for i, text in enumerate(texts)]
        plain = model.encode(texts, prompt=prompt, show_progress_bar=False)
        np.testing.assert_allclose(late, plain, atol=1e-5)
    # A longer document has the same passages, and the context changes their vectors.
    text = " ".join(sentences)
    spans, late = encode_passages(model, [text], Chunks(20, late=True))
    same, plain = encode_passages(model, [text], Chunks(20))
    assert spans == same and len(spans) > 3
    assert np.abs(late - plain).max() > 1e-2


def test_late_vectors_have_the_width_of_a_truncated_model(tiny_decoder, sentences):
    from unmasked import LLM2Vec

    model = LLM2Vec.from_pretrained(tiny_decoder, max_length=64, device="cpu", truncate_dim=8)
    for chunks in (Chunks(20), Chunks(20, late=True)):
        assert encode_passages(model, [" ".join(sentences)], chunks)[1].shape[1] == 8


def test_late_vectors_pass_the_modules_behind_the_pooling(tiny_decoder):
    """They were left out, and a folder then held the numbers of other passages."""
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    from unmasked import LLM2Vec

    model = LLM2Vec.from_pretrained(tiny_decoder, max_length=64, device="cpu")
    model.append(Dense(32, 8))
    model.append(Normalize())
    texts = ["one short text", "another one"]
    _, late = encode_passages(model, texts, Chunks(50, late=True))
    np.testing.assert_allclose(late, model.encode(texts), atol=1e-5)


def test_late_pools_the_states_of_the_documents_forward(model, sentences):
    text = " ".join(sentences[:3])
    spans, late = encode_passages(model, [text], Chunks(16, late=True))
    tokens = model.backbone.tokens
    (states,) = model.encode([text], output_value="token_embeddings", show_progress_bar=False)[:1]
    found = tokens.locate(text)
    if len(states) < len(tokens.prefix) + len(found.ids):  # longer than max_length of `encode`
        from unmasked import LLM2Vec

        wide = LLM2Vec(model.backbone.auto_model, model.tokenizer, max_length=128, device="cpu")
        states = wide.encode([text], output_value="token_embeddings", show_progress_bar=False)[0]
    own = states[len(tokens.prefix) :].numpy()
    for (_, begin, end), vector in zip(spans, late, strict=True):
        inside = [e > begin and b < end for b, e in found.offsets]
        np.testing.assert_allclose(vector, own[inside].mean(axis=0), atol=1e-4)


@pytest.mark.parametrize("chunks", [PLAIN, LATE], ids=["plain", "late"])
def test_rows_say_document_and_place(model, documents, tmp_path, chunks):
    source = Source(str(documents), keep=("n",))
    done = make(model, source, tmp_path / "v", chunks)
    table = pq.read_table(tmp_path / "v")
    assert table.column_names == ["row", "id", "begin", "end", "n", "vector"]
    texts = [row.text for row in source.rows()]
    spans, vectors = encode_passages(model, texts, chunks)
    rows = list(zip(*(table[name].to_pylist() for name in ("row", "begin", "end")), strict=True))
    assert rows == spans and len(spans) > 20
    assert table["id"].to_pylist() == [f"d{row}" for row, _, _ in rows] and done.rows == len(rows)
    np.testing.assert_allclose(np.array(table["vector"].to_pylist()), vectors, atol=1e-5)
    lines = said(tmp_path / "v")
    assert [line["documents"] for line in lines[1:-1]] == [4, 4, 1]
    assert lines[0]["settings"]["chunk"] == {"tokens": 20, "overlap": 4, "late": chunks.late}
    assert "cut" not in lines[-1] and done.cut == 0


def test_the_same_bytes_after_a_crash_and_on_two_machines(model, documents, tmp_path):
    make(model, documents, tmp_path / "v", LATE)
    whole = contents(tmp_path / "v")
    manifest = tmp_path / "v" / "_manifest.jsonl"
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:2]))
    (tmp_path / "v" / "part-000001.parquet").unlink()
    make(model, documents, tmp_path / "v", LATE)
    assert contents(tmp_path / "v") == whole
    for i in (2, 1):
        shards = Shards(rows=4, window=2, part=(i, 2))
        make(model, documents, tmp_path / "two", LATE, shards)
    parts = {name for name in whole if name.startswith("part-")}
    assert len(parts) == 3 and all(contents(tmp_path / "two")[p] == whole[p] for p in parts)
    with pytest.raises(OutputError, match='chunk: {"tokens": 20, "overlap": 4, "late": true} ther'):
        make(model, documents, tmp_path / "v", PLAIN)


def test_what_is_cut_is_counted(model, sentences, tmp_path, caplog):
    """In the result, in the manifest, and once in the log."""
    path = tmp_path / "t.txt"
    long = " ".join(sentences)
    path.write_text("\n".join([sentences[0], long, long, long + "."]) + "\n")
    model.backbone.texts_cut = 0
    with caplog.at_level(logging.WARNING):
        done = make(model, path, tmp_path / "v", None)
    told = [record for record in caplog.records if "only the beginning counts" in record.message]
    assert len(told) == 1 and done.cut == 3
    assert [line.get("cut", 0) for line in said(tmp_path / "v")[1:]] == [3, 3]
    assert encode_corpus(model, Source(str(path)), tmp_path / "v.npy").cut == 3
    assert make(model, path, tmp_path / "w", PLAIN).cut == 0
    assert make(model, path, tmp_path / "v", None).cut == 3  # done already, and still said


def test_a_folder_of_files_says_which_file(model, tmp_path, sentences):
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    (root / "a.txt").write_text(f"{sentences[0]}\n{sentences[1]}\n")
    (root / "deep" / "b.txt").write_text(sentences[2])
    make(model, root, tmp_path / "v", None)
    table = pq.read_table(tmp_path / "v")
    assert table.column_names == ["row", "file", "vector"]
    assert table["file"].to_pylist() == ["a.txt", "a.txt", "deep/b.txt"]
    make(model, f"documents:{root}", tmp_path / "w", PLAIN)
    table = pq.read_table(tmp_path / "w")
    assert set(table["id"].to_pylist()) == {"a.txt", "deep/b.txt"}
    assert table.column_names == ["row", "id", "begin", "end", "vector"]


def test_bad_input_is_refused_and_nothing_is_written(model, documents, tmp_path, tiny_decoder):
    from unmasked import LLM2Vec

    def refused(words: str, chunks: Chunks, source=documents, shards=None, encoder=model) -> None:
        with pytest.raises((DataError, OutputError), match=words):
            make(encoder, source, tmp_path / "v", chunks, shards)
        assert not (tmp_path / "v").exists()

    refused("overlap of 20 tokens .* Fix: --chunk 256", Chunks(20, 20))
    refused("passage of 40 tokens is longer than .* --chunk 3", Chunks(40))
    refused("passage of 128 tokens is longer than .*128 tokens", Chunks(128, late=True))
    refused("holds vectors only", PLAIN, shards=Shards(".npy"))
    refused("'begin' is a column", PLAIN, Source(str(documents), keep=("begin",)))
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n')
    refused("twice.jsonl, line 2: the id '1'", PLAIN, twice)
    with pytest.raises(DataError, match="twice.jsonl, line 2: the id '1'"):
        search_texts(model, Source(str(twice)), PLAIN)
    assert len(search_texts(model, Source(str(twice)))(["a"])[0]) == 2, "rows may share an id"
    (tmp_path / "v").mkdir()
    with pytest.raises(DataError, match="the id '1'"):
        make(model, twice, tmp_path / "v", PLAIN)
    assert (tmp_path / "v").is_dir(), "it was there before"
    (tmp_path / "v" / "._manifest.jsonl.lock").unlink(missing_ok=True)
    (tmp_path / "v").rmdir()
    bos = LLM2Vec.from_pretrained(tiny_decoder, pooling_mode="bos_token", device="cpu")
    refused("pooling bos_token takes one token", LATE, encoder=bos)
    counting = LLM2Vec.from_pretrained(tiny_decoder, compat="llm2vec-0.2", device="cpu")
    refused("counts the tokens .* leave out --late", LATE, encoder=counting)


def test_a_document_with_a_passage_without_vector_is_left_out_whole(model, documents, tmp_path):
    class Broken(Encoding):
        def __call__(self, *given):
            for found, vectors in super().__call__(*given):
                vectors[[i for i, p in enumerate(found) if p.document == 1 and p.begin]] = np.nan
                yield found, vectors

    encoding, shards = Broken(chunks=PLAIN), Shards(rows=9, window=9, skip=True)
    source = Source(str(documents))
    done = encode_folder(Local(lambda: model), source, tmp_path / "v", encoding, shards)
    assert done.skipped == 1 and 1 not in pq.read_table(tmp_path / "v")["row"].to_pylist()
