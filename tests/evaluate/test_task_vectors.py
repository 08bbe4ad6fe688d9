"""Each text is encoded once, every vector is checked, and documents are ranked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.tasks import hashed, sts_file

from unmasked.errors import DataError
from unmasked.evaluate import encode_once, load_task
from unmasked.evaluate.tasks.task_vectors import most_similar


def test_each_text_and_role_is_encoded_once(tmp_path: Path, tiny: Path) -> None:
    seen: list[tuple[str, str | None]] = []

    def encode(texts: Sequence[str], role: str | None) -> np.ndarray:
        seen.extend((text, role) for text in texts)
        return hashed(0)(texts, role)

    rows = [(1, "a", "b"), (2, "b", "a"), (3, "query", "query")]
    loaded = [load_task(sts_file(tmp_path, rows, name)) for name in ("one", "two")]
    once = encode_once(encode)
    results = [task.score(once) for task in (*loaded, load_task(tiny), load_task(tiny))]
    assert [result.name for result in results] == ["one", "two", "tiny", "tiny"]
    assert len(seen) == len(set(seen)) == 3 + 3 + 1
    assert ("query", None) in seen and ("query", "query") in seen
    alone = [task.score(hashed(0)).scores for task in (*loaded, load_task(tiny))]
    assert [result.scores for result in results[:3]] == alone


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_vectors_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    long = "x" * 100

    def encode(texts: Sequence[str], role: str | None) -> np.ndarray:
        return np.array([[1, value if text == long else 0] for text in texts], dtype=np.float32)

    with pytest.raises(DataError, match=f"2 of 3 texts.*role query.*: 1 '{'x' * 60}', 2 'xx"):
        encode_once(encode)(["a", long, long], "query")
    task = load_task(sts_file(tmp_path, [(1, "a", "b"), (2, "c", long)]))
    for given in (encode, encode_once(encode)):
        with pytest.raises(DataError, match=r"^NaN or infinite vectors for 1 of 4 texts.*: 3 'xx"):
            task.score(given)


def test_an_encoder_that_gives_the_wrong_shape_is_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\) for 3 texts"):
        load_task(tiny).score(lambda texts, role: np.ones(len(texts)))
    with pytest.raises(ValueError):
        encode_once(lambda texts, role: np.ones((1, 4)))(["a", "b"], None)


def test_the_most_similar_documents_and_equal_ones() -> None:
    documents = np.array([[0, 5], [3, 3], [2, 0], [1, 0]], dtype=np.float32)
    query = np.array([[1, 0]], dtype=np.float32)
    for tie_rank, first in ((np.arange(4), 2), (-np.arange(4), 3)):
        found = most_similar(query, documents, 3, tie_rank)
        assert found.tolist() == [[first, 5 - first, 1]]
    assert most_similar(query, documents, 9, np.arange(4)).shape == (1, 4)
