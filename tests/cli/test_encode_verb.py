"""encode into one file, and from standard input; `tests/corpus` has folders of shards."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pyarrow.parquet as pq
from support.commands import listing


def test_encode_files_and_standard_input(cli, tiny_decoder, tmp_path, sentences, monkeypatch):
    from unmasked import LLM2Vec

    expected = LLM2Vec.from_pretrained(tiny_decoder, device="cpu").encode(sentences)
    lines = "\n".join(sentences) + "\n"
    (tmp_path / "a.txt").write_text(lines, encoding="utf-8")
    rows = [json.dumps({"id": i, "body": text}) for i, text in enumerate(sentences)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    code, out, err = cli("encode", tiny_decoder, "a.txt", "-o", "v.npy")
    assert (code, out) == (0, "8 vectors of 32 numbers in v.npy\n")
    assert "encoding 8/8" in err
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)

    options = ["-o", "v.parquet", "--text-column", "body", "--normalize"]
    assert cli("encode", tiny_decoder, "a.jsonl", *options)[0] == 0
    table = pq.read_table(tmp_path / "v.parquet")
    assert table["id"].to_pylist() == [str(i) for i in range(8)]
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(np.array(table["vector"].to_pylist()), unit, atol=1e-5)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert cli("encode", tiny_decoder, "-", "-o", "w.npy")[0] == 0
    np.testing.assert_allclose(np.load(tmp_path / "w.npy"), expected, atol=1e-5)

    before = listing(tmp_path)
    code, _, err = cli("encode", "no/such-model", "a.txt", "-o", "v.npy")
    assert (code, err) == (2, "error: v.npy exists. Fix: give another name, or --overwrite.\n")
    code, _, err = cli("encode", "no/such-model", "a.jsonl", "-o", "u.npy")
    assert code == 2
    assert "a.jsonl, line 1: no column 'text' among id, body" in err
    assert listing(tmp_path) == before


def test_standard_output_is_no_place_for_results(cli, tmp_path, tiny_decoder):
    """A folder named - was made, as - is standard input elsewhere."""
    (tmp_path / "a.txt").write_text("a text\n")
    for words in (
        ["encode", tiny_decoder, "a.txt", "-o", "-"],
        ["convert", tiny_decoder, "-o", "-"],
        ["train", "mntp", "--base", tiny_decoder, "--data", "a.txt", "-o", "-"],
        ["evaluate", tiny_decoder, "--tasks", "a.tsv", "--json", "-"],
    ):
        code, _, err = cli(*words)
        assert code == 2 and "the output is -" in err and "Fix: give the name of a file" in err
        assert not (tmp_path / "-").exists()


def test_a_machine_of_several_names_the_manifest_that_lists_what_it_skipped(
    cli, tiny_decoder, tmp_path
):
    (tmp_path / "a.txt").write_text("one\n\nthree\n\nfive\n")
    options = ["-o", "v", "--shard", "2/2", "--shard-rows", "2", "--on-error", "skip"]
    code, out, err = cli("encode", tiny_decoder, "a.txt", *options)
    listed = "v/_manifest-2-of-2.jsonl"
    assert (code, out) == (
        0,
        f"1 vectors of 32 numbers in v; 1 rows skipped, listed in {listed}\n",
    ), err
    assert (tmp_path / listed).is_file()
