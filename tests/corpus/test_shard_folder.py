"""A folder of shards: the same bytes however often it was interrupted, and only whole ones."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.encoding_process import Runner
from support.shard_folders import contents, said, verified

from unmasked.corpus import Encoding, Local, Shards, encode_folder
from unmasked.errors import DataError, OutputError
from unmasked.files.source import Source


@pytest.fixture(scope="module")
def runner():
    return Runner()


def make(model, source, folder, shards=None, encoding=None, **options):
    source = source if isinstance(source, Source) else Source(str(source))
    return encode_folder(Local(lambda: model), source, folder, encoding, shards, **options)


@pytest.fixture
def corpus(tmp_path, sentences) -> Path:
    """Twenty rows in three files of three kinds; four have no text."""
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    rows = [
        json.dumps({"id": f"a{i}", "text": text, "year": i}) for i, text in enumerate(sentences)
    ]
    rows[3] = '{"id": "a3", "text": null, "year": 3}'
    (folder / "a.jsonl").write_text("\n\n".join(rows) + "\n")
    cells = [f'b{i},{i},"{text}"' for i, text in enumerate(sentences[:6])]
    raw = "\n".join(["id,year,text", *cells]).encode().replace(b"Masks", b"M\xe9sks")
    (folder / "b" / "b.csv.gz").write_bytes(gzip.compress(raw))
    texts = [*sentences[:4], "  ", "word " * 300]
    table = {"text": texts, "id": [f"c{i}" for i in range(6)], "year": list(range(6))}
    pq.write_table(pa.table(table), folder / "c.parquet")
    (folder / "_SUCCESS").touch()
    return folder


SKIPPING = {"keep": ("year",), "max_bytes": 1000}


def test_parts_together_hold_every_row_once(model, corpus, tmp_path):
    source = Source(str(corpus), **{**SKIPPING, "keep": ()})
    folder = tmp_path / "v"
    done = make(model, source, folder, Shards(rows=7, window=3, skip=True))
    assert done == (16, 32, 4, 0)
    lines = said(folder)
    assert [line["file"] for line in lines[1:-1]] == [f"part-00000{i}.parquet" for i in range(3)]
    assert [line["first_row"] for line in lines[1:-1]] == [0, 7, 14]
    assert lines[-1] == {"finished": True, "rows": 16, "skipped": 4}
    skipped = [fault for line in lines[1:-1] for fault in line["skipped"]]
    assert [(f["row"], f["file"], f["line"]) for f in skipped] == [
        (3, "a.jsonl", 7),
        (10, "b/b.csv.gz", 4),
        (18, "c.parquet", 5),
        (19, "c.parquet", 6),
    ]
    reasons = ["'text' is null", "not UTF-8 (byte 0xe9", "an empty text", "a text of 1,500 bytes"]
    assert all(f["reason"].startswith(word) for f, word in zip(skipped, reasons, strict=True))
    table = pq.read_table(folder)
    rows = table["row"].to_pylist()
    assert sorted([*rows, *(fault["row"] for fault in skipped)]) == list(range(20))
    good = [row for row in source.rows() if row.fault is None]
    assert table["id"].to_pylist() == [row.id for row in good]
    expected = model.encode([row.text for row in good], show_progress_bar=False)
    np.testing.assert_allclose(np.array(table["vector"].to_pylist()), expected, atol=1e-5)
    assert verified(folder) == 3


def test_kinds_and_precisions_of_shards(model, corpus, tmp_path):
    from safetensors.numpy import load_file
    from sentence_transformers.util import quantize_embeddings

    source = Source(str(corpus), max_bytes=1000)
    good = [row.text for row in source.rows() if row.fault is None]
    for normalize in (False, True):
        exact = model.encode(
            good, show_progress_bar=False, truncate_dim=20, normalize_embeddings=normalize
        )
        for precision in ("float32", "float16", "int8", "binary"):
            encoding = Encoding(normalize=normalize, truncate_dim=20, precision=precision)
            stored = {}
            for kind in (".npy", ".safetensors", ".parquet"):
                folder = tmp_path / f"{normalize}{precision}{kind}"
                make(model, source, folder, Shards(kind, 7, 3, skip=True), encoding)
                parts = sorted(folder.glob("part-*"))
                if kind == ".npy":
                    stored[kind] = np.concatenate([np.load(p) for p in parts])
                elif kind == ".safetensors":
                    stored[kind] = np.concatenate([load_file(p)["vectors"] for p in parts])
                else:
                    vectors = pq.read_table(folder)["vector"].combine_chunks()
                    stored[kind] = vectors.flatten().to_numpy().reshape(len(vectors), -1)
            first = stored[".npy"]
            assert all(np.array_equal(first, other) for other in stored.values())
            assert all(first.dtype == other.dtype for other in stored.values())
            if precision == "int8":
                ranges = np.load(folder / "_ranges.npy")
                np.testing.assert_allclose(ranges, [exact.min(0), exact.max(0)], atol=1e-5)
                off = np.abs(first.astype(int) - quantize_embeddings(exact, "int8", ranges=ranges))
                assert off.max() <= 1
                restored = (first.astype(float) + 128.5) / 255 * np.ptp(ranges, 0) + ranges[0]
                assert np.abs(restored - exact).max() < np.ptp(ranges, 0).max() / 200
            elif precision == "binary":
                assert first.shape == (16, 3) and first.dtype == np.uint8
                assert (np.unpackbits(first, axis=1)[:, :20] != (exact > 0)).mean() < 0.01
            else:
                np.testing.assert_allclose(first, exact, atol=1e-2 if "16" in precision else 1e-5)


def test_columns_are_kept(model, corpus, tmp_path):
    # .csv has strings where .jsonl has numbers: the two cannot share a column.
    told = r"b\.csv\.gz: column 'year' has the type string here and int64 before"
    with pytest.raises(DataError, match=told):
        make(model, Source(str(corpus), **SKIPPING), tmp_path / "w", Shards(rows=7, skip=True))
    (corpus / "b" / "b.csv.gz").unlink()
    make(model, Source(str(corpus), **SKIPPING), tmp_path / "w", Shards(rows=7, skip=True))
    assert pq.read_table(tmp_path / "w")["year"].to_pylist() == [0, 1, 2, 4, 5, 6, 7, 0, 1, 2, 3]
    only = corpus / "a.jsonl"
    make(model, Source(str(only), keep=("year", "text")), tmp_path / "x", Shards(skip=True))
    table = pq.read_table(tmp_path / "x")
    assert table.column_names == ["row", "id", "year", "text", "vector"]
    assert table.schema.field("year").type == pa.int64()
    for keep, words in [(("yaer",), "did you mean 'year'"), (("row",), "column of the output")]:
        with pytest.raises((DataError, OutputError), match=words):
            make(model, Source(str(only), keep=keep), tmp_path / "y", Shards(skip=True))
    with pytest.raises(OutputError, match="vectors only"):
        make(model, Source(str(only), keep=("year",)), tmp_path / "y", Shards(".npy"))


def test_machines_write_what_one_would(model, corpus, tmp_path):
    source, encoding = Source(str(corpus), max_bytes=1000), Encoding(precision="int8")
    make(model, source, tmp_path / "one", Shards(rows=3, window=2, skip=True), encoding)
    for i in (2, 3, 1):
        shards = Shards(rows=3, window=2, skip=True, part=(i, 3))
        make(model, source, tmp_path / "many", shards, encoding)
    one, many = contents(tmp_path / "one"), contents(tmp_path / "many")
    parts = {name for name in one if name.startswith("part-")}
    assert len(parts) == 7
    assert all(one[name] == many[name] for name in {*parts, "_ranges.npy"})
    lines = [f"_manifest-{i}-of-3.jsonl" for i in (1, 2, 3)]
    assert set(many) == {*parts, "_ranges.npy", *lines}
    written = sorted(
        (line for name in lines for line in said(tmp_path / "many", name)[1:-1]),
        key=lambda line: line["shard"],
    )
    assert written == said(tmp_path / "one")[1:-1]
    assert verified(tmp_path / "many") == 7
    with pytest.raises(OutputError, match="machines: 3 there, 2 now"):
        make(model, source, tmp_path / "many", Shards(rows=3, window=2, skip=True, part=(1, 2)))
    # Another folder, another machine: the saved ranges are enough to get the same bytes.
    shards = Shards(rows=3, window=2, skip=True, ranges=tmp_path / "one" / "_ranges.npy")
    make(model, source, tmp_path / "far", shards, encoding)
    assert contents(tmp_path / "far") == one
    other = tmp_path / "other.npy"
    np.save(other, np.zeros((2, 32), "f4"))
    with pytest.raises(OutputError, match="other ranges"):
        shards = Shards(rows=3, window=2, skip=True, ranges=other)
        make(model, source, tmp_path / "far", shards, encoding)
    np.save(other, np.zeros((2, 31), "f4"))
    with pytest.raises(DataError, match=r"shape \(2, 31\), .* of shape \(2, 32\)"):
        make(model, source, tmp_path / "else", shards, encoding)


def test_what_a_crash_leaves_is_mended(model, corpus, tmp_path):
    source = Source(str(corpus), max_bytes=1000)
    shards, folder = Shards(rows=3, window=2, skip=True), tmp_path / "v"
    make(model, source, folder, shards)
    whole = contents(folder)
    manifest = folder / "_manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)

    def cut_line():
        manifest.write_bytes(b"".join(lines[:4]) + lines[4][:20])

    def lost_line():
        manifest.write_bytes(b"".join(lines[:3]))

    def no_last_line():
        manifest.write_bytes(b"".join(lines[:-1]))

    def only_aside():
        manifest.unlink()
        (folder / "._manifest.jsonl.aside").write_bytes(lines[0][:9])

    def lost_shard():
        (folder / "part-000002.parquet").unlink()

    def cut_shard():
        (folder / "part-000000.parquet").write_bytes(b"PAR1")
        (folder / ".part-000000.parquet.aside").write_bytes(b"PAR1")

    for crash in (cut_line, lost_line, no_last_line, only_aside, lost_shard, cut_shard):
        crash()
        make(model, source, folder, shards)
        assert contents(folder) == whole, crash.__name__
    assert verified(folder) == 7


def test_whole_shards_are_not_made_again(model, corpus, tmp_path):
    source, shards = Source(str(corpus), max_bytes=1000), Shards(rows=3, window=2, skip=True)
    make(model, source, tmp_path / "v", shards)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "v").iterdir()}
    seen = []
    make(model, source, tmp_path / "v", shards, begin=lambda *begun: lambda *_: seen.append(begun))
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "v").iterdir()}
    assert {k: v for k, v in before.items() if not k.endswith("lock")} == {
        k: v for k, v in after.items() if not k.endswith("lock")
    }
    assert set(seen) == {(20, 20)}


def kill_and_compare(runner, model, texts: Path, folder: Path, times: int, **options) -> None:
    plain = {"shards": {"rows": 96, "window": 32, "skip": True}, **options}
    source = {"path": str(texts), "max_bytes": 2000}
    whole = folder / "whole"
    seconds = runner.run(model, source, whole, **plain)
    moments, killed = random.Random(0), 0
    for _ in range(times):
        # So that the last blows fall near the end, and what is done already is not gone through.
        after = moments.uniform(0, 2.2 * seconds / times)
        killed += runner.kill(after, model, source, folder / "killed", **plain)
        there = {p.name for p in (folder / "killed").glob("part-*")}
        assert there <= set(contents(whole))
    runner.run(model, source, folder / "killed", **plain)
    assert killed >= times / 3
    assert contents(folder / "killed") == contents(whole)


def test_killed_three_times_ends_with_the_same_bytes(runner, tiny_decoder, many_texts, tmp_path):
    kill_and_compare(runner, tiny_decoder, many_texts(2000), tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "encoding": {"precision": "int8", "normalize": True},
            "shards": {"rows": 100, "window": 32, "skip": True, "kind": ".npy"},
        },
    ],
    ids=["parquet", "int8"],
)
def test_killed_twenty_times_ends_with_the_same_bytes(
    runner, tiny_decoder, many_texts, tmp_path, options
):
    kill_and_compare(runner, tiny_decoder, many_texts(8000), tmp_path, 20, **options)


def test_a_full_disk_leaves_whole_shards(runner, tiny_decoder, many_texts, tmp_path):
    """A limit on the size of a file stands for a full disk: the same write fails."""
    source = {"path": str(many_texts(300)), "max_bytes": 2000}
    shards = {"shards": {"rows": 96, "window": 32, "skip": True}}
    whole, folder = tmp_path / "whole", tmp_path / "v"
    runner.run(tiny_decoder, source, whole, **shards)
    size = (whole / "part-000003.parquet").stat().st_size  # the last is the smallest
    process = runner.start(tiny_decoder, source, folder, limits={"bytes": size}, **shards)
    process.join(60)
    assert process.exitcode == 1
    assert [p.name for p in folder.iterdir() if not p.name.startswith(".")] == ["_manifest.jsonl"]
    assert len(said(folder)) == 1
    runner.run(tiny_decoder, source, folder, **shards)
    assert contents(folder) == contents(whole)


def test_two_processes_do_not_share_a_folder(runner, model, tiny_decoder, many_texts, tmp_path):
    texts = many_texts(4000)
    shards = {"rows": 96, "window": 32, "skip": True}
    process = runner.start(tiny_decoder, {"path": str(texts)}, tmp_path / "v", shards=shards)
    while not (tmp_path / "v" / "_manifest.jsonl").exists():
        assert process.is_alive()
    with pytest.raises(OutputError, match="another process is writing to it"):
        make(model, texts, tmp_path / "v", Shards(**shards))
    with pytest.raises(OutputError, match="another process is writing to it"):
        make(model, texts, tmp_path / "v", Shards(**shards), overwrite=True)
    process.kill()
    process.join()


def test_other_settings_are_named(model, corpus, tmp_path, tiny_decoder):
    source, folder = Source(str(corpus / "a.jsonl")), tmp_path / "v"
    make(model, source, folder, Shards(rows=3, skip=True))
    before = contents(folder)

    def refused(words, *arguments, **options):
        with pytest.raises(OutputError, match=words):
            make(*arguments, **options)
        assert contents(folder) == before

    shards = Shards(rows=3, skip=True)
    refused("shard_rows: 3 there, 4 now", model, source, folder, Shards(rows=4, skip=True))
    refused(
        "normalize: false there, true now",
        model,
        source,
        folder,
        shards,
        Encoding(None, None, None, True),
    )
    refused('"format|format: "parquet" there, "npy" now', model, source, folder, Shards(".npy", 3))
    refused('prompt: null there, "x" now', model, source, folder, shards, Encoding("x"))
    from unmasked import LLM2Vec

    longer = LLM2Vec.from_pretrained(tiny_decoder, max_length=33, device="cpu")
    refused("model: ", longer, source, folder, shards)
    causal = LLM2Vec.from_pretrained(
        tiny_decoder, max_length=32, device="cpu", enable_bidirectional=False
    )
    refused("model: ", causal, source, folder, shards)
    with (corpus / "a.jsonl").open("a") as file:
        file.write('{"id": 8, "text": "more"}\n')
    refused("inputs changed: a.jsonl", model, source, folder, shards)
    assert make(model, source, folder, shards, overwrite=True).rows == 8
    # What only says how to take faults may change.
    clean = tmp_path / "clean.txt"
    clean.write_text("a\nb\n")
    make(model, clean, tmp_path / "w")
    make(model, clean, tmp_path / "w", Shards(skip=True))


def test_another_column_is_checked_before_the_model_is_loaded(model, tmp_path):
    """Also where an earlier run counted the rows by other settings and has no whole shard."""
    path, folder = tmp_path / "t.jsonl", tmp_path / "v"
    path.write_text('{"text": "a", "body": "b"}\n{"text": "c", "body": ""}\n')
    make(model, path, folder)
    (folder / "part-000000.parquet").unlink()
    with pytest.raises(DataError, match="line 2: an empty text"):
        encode_folder(Local(pytest.fail), Source(str(path), column="body"), folder)


def test_folders_that_are_refused(model, corpus, given, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="other files in it .thesis.tex"):
            make(model, corpus, tmp_path / "mine", overwrite=overwrite)
    with pytest.raises(OutputError, match="is a file"):
        make(model, corpus, given("f", ""))
    with pytest.raises(OutputError, match="in the folder that is read"):
        make(model, corpus, corpus / "v")
    with pytest.raises(OutputError, match="delete the shards of other machines"):
        make(model, corpus, tmp_path / "v", Shards(part=(1, 2)), overwrite=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.txt, \.jsonl, \.csv, \.tsv, \.parquet file in this"):
        make(model, tmp_path / "empty", tmp_path / "v")
    with pytest.raises(DataError, match=r"a.jsonl, line 7: 'text' is null.*--on-error skip"):
        make(model, Source(str(corpus), max_bytes=1000), tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_standard_input_continues_only_with_the_same_texts(model, tmp_path, monkeypatch):
    def run(text: str, folder: str = "v", **options):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        encoding = Encoding(precision="int8")
        engine = Local(lambda: model)
        return encode_folder(engine, Source("-"), tmp_path / folder, encoding, Shards(rows=2))

    text = "one\ntwo\nthree\nfour\nfive\n"
    assert run(text) == (5, 32, 0, 0)
    whole = {p.name: p.read_bytes() for p in (tmp_path / "v").iterdir()}
    manifest = tmp_path / "v" / "_manifest.jsonl"
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:2]))
    (tmp_path / "v" / "part-000001.parquet").unlink()
    assert run(text) == (5, 32, 0, 0)
    assert {p.name: p.read_bytes() for p in (tmp_path / "v").iterdir()} == whole
    with pytest.raises(DataError, match="rows 2 to 3 are not those"):
        run(text.replace("three", "tree"))
    with pytest.raises(DataError, match="rows 4 to 5 are not those"):
        run(text + "six\n")
    with pytest.raises(DataError, match="none of the first 4096 rows has a vector"):
        run("", "w")


def test_a_refused_command_leaves_what_overwrite_would_replace(model, given, tmp_path, monkeypatch):
    """Also where the refusal comes from the model, the ranges, or texts that cannot be surveyed."""
    folder, good, blank = tmp_path / "v", given("a.txt", "a\nb\n"), given("b.txt", "a\n\n")
    make(model, good, folder, Shards(ranges=None), Encoding(precision="int8"))
    before = contents(folder)
    np.save(tmp_path / "r.npy", np.zeros((2, 31), "f4"))

    def no_model():
        raise DataError("no model")

    def refused(error, words, source, shards=None, encoding=None, load=lambda: model):
        with pytest.raises(error, match=words):
            encode_folder(Local(load), Source(source), folder, encoding, shards, overwrite=True)
        assert contents(folder) == before

    refused(DataError, "an empty text", blank)
    refused(DataError, "no model", good, load=no_model)
    refused(DataError, "from 1 to 32", good, encoding=Encoding(truncate_dim=33))
    int8 = Encoding(precision="int8")
    refused(DataError, r"shape \(2, 31\)", good, Shards(ranges=tmp_path / "r.npy"), int8)
    refused(DataError, "none of the first", given("n.txt", "\n\n"), Shards(skip=True), int8)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    refused(DataError, "there is no text in it", "-")
    # Its own ranges may be given, and are read before they are deleted.
    ranges = folder / "_ranges.npy"
    make(model, good, folder, Shards(ranges=ranges), int8, overwrite=True)
    assert contents(folder) == before


def test_shards_are_not_encoded_into_the_folder_that_they_are_in(model, given, tmp_path):
    path = given("a.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    make(model, Source(path, keep=("text",)), tmp_path / "v")
    before = contents(tmp_path / "v")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="which is read, is in .*Fix: name another folder"):
            make(model, tmp_path / "v" / "part-000000.parquet", tmp_path / "v", overwrite=overwrite)
        assert contents(tmp_path / "v") == before


def test_a_folder_killed_while_a_lost_shard_was_made_again_is_finished(
    model, corpus, tmp_path, monkeypatch
):
    from unmasked.corpus.manifest import Manifest
    from unmasked.corpus.search import open_vectors

    source, shards = Source(str(corpus), max_bytes=1000), Shards(rows=7, skip=True)
    make(model, source, tmp_path / "v", shards)
    whole = contents(tmp_path / "v")
    (tmp_path / "v" / "part-000002.parquet").unlink()
    with monkeypatch.context() as killed:
        killed.setattr(Manifest, "finish", lambda manifest: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            make(model, source, tmp_path / "v", shards)
    with pytest.raises(DataError, match="not finished, 3 shards are there"):
        open_vectors(tmp_path / "v")
    make(model, source, tmp_path / "v", shards)
    assert contents(tmp_path / "v") == whole
    assert len(open_vectors(tmp_path / "v")) == 16


@pytest.mark.parametrize(
    "lines",
    [
        "5\n",
        "[]\n",
        "half",
        '{"format": 1}\n',
        '{"format": 1, "settings": [], "inputs": []}\n',
        '{"format": 1, "settings": {}, "inputs": [1]}\n',
        '{"format": 1, "settings": {}, "inputs": []}\n7\n',
        '{"format": 1, "settings": {}, "inputs": []}\n{"shard": 0}\n',
        '{"format": 1, "settings": {}, "inputs": []}\nnull\n{"finished": true}\n',
    ],
)
def test_a_manifest_that_is_none_is_refused(model, given, tmp_path, lines):
    from unmasked.corpus.search import open_vectors

    for name in ("_manifest.jsonl", "_manifest-1-of-2.jsonl"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(lines)
        with pytest.raises((DataError, OutputError), match="Fix: "):
            open_vectors(folder)
    if lines.endswith("\n"):  # half a line is dropped, and the folder is begun
        with pytest.raises(OutputError, match="is not a manifest. Fix: name another folder"):
            make(model, given("a.txt", "a\n"), tmp_path / "_manifest.jsonl")
