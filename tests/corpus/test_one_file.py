"""One file of vectors: written by one process at a time, with nothing stale beside it."""

from __future__ import annotations

import numpy as np
import pytest

from unmasked.corpus import Encoding, Local, Shards, encode_corpus, encode_folder
from unmasked.errors import OutputError
from unmasked.files.source import Source


@pytest.fixture(scope="module")
def model(tiny_decoder):
    from unmasked import LLM2Vec

    return LLM2Vec.from_pretrained(tiny_decoder, max_length=32, device="cpu")


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    return path


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
    assert {p.name for p in output.parent.iterdir()} == {"v.npy", "v.skipped.jsonl"}


def test_the_list_of_rows_skipped_is_that_of_this_file(model, texts, tmp_path):
    output = tmp_path / "v.npy"
    encode_corpus(model, Source(str(texts)), output, skip=True)
    assert output.with_suffix(".skipped.jsonl").is_file()
    texts.write_text("one\ntwo\n")
    encode_corpus(model, Source(str(texts)), output, skip=True, overwrite=True)
    assert not output.with_suffix(".skipped.jsonl").exists()


def test_ranges_that_nothing_would_use_are_refused(model, texts, tmp_path):
    given = tmp_path / "r.npy"
    with pytest.raises(OutputError, match=r"float32 has no ranges\. Fix: --precision int8"):
        encode_corpus(model, Source(str(texts)), tmp_path / "v.npy", ranges=given)
    with pytest.raises(OutputError, match="binary has no ranges"):
        encode_folder(
            Local(lambda: model), Source(str(texts)), tmp_path / "v", Encoding(precision="binary"),
            Shards(ranges=given),
        )  # fmt: skip
