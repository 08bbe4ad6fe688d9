"""Tasks by name, of which a text is encoded once for all of them."""

from __future__ import annotations

import numpy as np
import pytest
from support.tasks import hashed, sts_file

from unmasked import LLM2Vec
from unmasked.errors import DataError
from unmasked.evaluate import load_task
from unmasked.evaluate.scorer import make_scorer


class Model:
    """Remembers what it was asked; ``broken`` texts have no vector."""

    def __init__(self, broken: str = "") -> None:
        self.seen: list[tuple[str, str]] = []
        self.broken = broken

    def encode(self, texts, role="", **_):
        self.seen += [(text, role) for text in texts]
        vectors = hashed(0)(texts, None)
        vectors[[text == self.broken for text in texts]] = np.nan
        return vectors

    def encode_query(self, texts, **options):
        return self.encode(texts, "query", **options)

    def encode_document(self, texts, **options):
        return self.encode(texts, "document", **options)


def test_tasks_share_vectors_and_every_role_has_its_own(tmp_path, tiny):
    rows = [(1, "a", "b"), (2, "b", "query"), (3, "query", "a")]
    paths = [sts_file(tmp_path, rows, "one"), sts_file(tmp_path, rows, "two"), tiny]
    model = Model()
    results = make_scorer(paths)(model)
    assert [result.name for result in results] == ["one", "two", "tiny"]
    documents = {(f"doc {n}", "document") for n in (1, 2, 3)}
    assert set(model.seen) == {("a", ""), ("b", ""), ("query", ""), ("query", "query")} | documents
    assert len(model.seen) == len(set(model.seen))
    assert results[0].scores == load_task(paths[0]).score(hashed(0)).scores


def test_texts_that_are_cut_are_told_of_once_in_a_run(tmp_path, tiny_decoder, caplog):
    """A run loads an encoder for each score; another length cuts other texts."""
    score = make_scorer([sts_file(tmp_path, [(1, "a b " * 200, "b"), (2, "b", "c")], "long")])
    told = []
    for length in (16, 16, 8):
        encoder = LLM2Vec.from_pretrained(tiny_decoder, max_length=length, device="cpu")
        score(encoder)
        told.append(caplog.text.count("longer than max_length"))
        assert encoder.backbone.texts_cut == 1 and encoder.backbone.warns_of_cuts
    assert told == [1, 1, 2]


def test_a_fault_names_the_task(tmp_path, tiny):
    path = sts_file(tmp_path, [(1, "a", "b"), (2, "c", "b")])
    with pytest.raises(DataError, match="^task pairs: NaN or infinite vectors for 2 of 4 texts"):
        make_scorer([tiny, path])(Model("b"))


def test_tasks_of_one_name_are_refused_before_any_model_is_scored(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        rows = "score\tsentence1\tsentence2\n1\tx\ty\n2\tx\tz\n"
        (tmp_path / folder / "sts.tsv").write_text(rows)
    with pytest.raises(DataError, match="two tasks are called 'sts'"):
        make_scorer([tmp_path / "a" / "sts.tsv", tmp_path / "b" / "sts.tsv"])
