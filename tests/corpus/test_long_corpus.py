"""A corpus of long documents: divided, killed at random moments, continued, and searched.

The full size is 100,000 documents: UNMASKED_LONG_DOCUMENTS=100000 pytest -m slow
tests/corpus/test_long_corpus.py. By default there are 4,000, which take minutes.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.encoding_process import Runner
from support.shard_folders import contents, said, verified

from unmasked.corpus.search import search_in
from unmasked.files.source import Source

DOCUMENTS = int(os.environ.get("UNMASKED_LONG_DOCUMENTS", "4000"))


def write_documents(path: Path, sentences: list[str], count: int) -> str:
    """Documents of some 40 to 200 tokens; an input holds 32. Returns a sentence of the last one."""
    draw, only = random.Random(0), "Nowhere else is this zebra, sitting on a quiet library."
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            parts = draw.choices(sentences, k=draw.randint(2, 8))
            if number == count - 1:
                parts.insert(1, only)
            file.write(json.dumps({"id": f"d{number}", "text": " ".join(parts)}) + "\n")
    return only


def kill_and_search(runner, tiny_decoder, model, sentences, folder: Path, count: int, times: int):
    only = write_documents(folder / "d.jsonl", sentences, count)
    given = {"path": str(folder / "d.jsonl")}
    rows = max(count // 40, 8)
    options = {
        "shards": {"rows": rows, "window": max(rows // 4, 4)},
        "chunks": {"tokens": 24, "overlap": 6, "late": True},
    }
    seconds = runner.run(tiny_decoder, given, folder / "whole", **options)
    moments, killed = random.Random(1), 0
    for _ in range(times):
        after = moments.uniform(0, 2.2 * seconds / times)
        killed += runner.kill(after, tiny_decoder, given, folder / "v", **options)
    runner.run(tiny_decoder, given, folder / "v", **options)
    assert killed >= times / 3
    assert contents(folder / "v") == contents(folder / "whole")
    assert verified(folder / "v") == -(-count // rows)
    last = said(folder / "v")[-1]
    assert last["rows"] > 4 * count and "cut" not in last
    (hits,) = search_in(model, folder / "v", texts=Source(given["path"]))([only], 3)
    table = pq.read_table(folder / "v")
    vectors = np.array(table["vector"].to_pylist())
    scores = vectors @ model.encode(only, show_progress_bar=False)
    scores /= np.linalg.norm(vectors, axis=1)
    best = int(scores.argmax())
    assert (hits[0].id, hits[0].begin) == (table["id"][best].as_py(), table["begin"][best].as_py())
    texts = [row.text for row in Source(given["path"]).rows()]
    assert all(hit.text == texts[hit.row][hit.begin : hit.end] for hit in hits)


def test_a_few_long_documents_are_killed_and_searched(tiny_decoder, model, sentences, tmp_path):
    kill_and_search(Runner(), tiny_decoder, model, sentences, tmp_path, 400, 2)


@pytest.mark.slow
def test_many_long_documents_are_killed_ten_times_and_searched(
    tiny_decoder, model, sentences, tmp_path
):
    kill_and_search(Runner(), tiny_decoder, model, sentences, tmp_path, DOCUMENTS, 10)
