"""Our scores are mteb's on the same vectors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mteb", reason="mteb is not installed (extra 'eval')")

import mteb
import mteb_tasks as local

from unmasked.evaluate import load_task


def theirs(task) -> dict:
    result = mteb.evaluate(local.LookUp(), task, cache=None, show_progress_bar=False)
    return result.task_results[0].scores["test"][0]


def ours(path: Path) -> dict[str, float]:
    def encode(texts: Sequence[str], role: str | None) -> np.ndarray:
        return np.array([local.vector(text) for text in texts])

    return load_task(path).score(encode).scores


def table(path: Path, header: str, rows) -> Path:
    lines = [header, *("\t".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_sts(tmp_path):
    rows = [(score, *pair) for score, pair in zip(local.SCORES, local.PAIRS, strict=True)]
    got = ours(table(tmp_path / "sts.tsv", "score\tsentence1\tsentence2", rows))
    expected = theirs(local.LocalSTS())
    assert got["spearman"] == pytest.approx(expected["cosine_spearman"], abs=1e-6)
    assert got["pearson"] == pytest.approx(expected["cosine_pearson"], abs=1e-6)


def test_pair_classification(tmp_path):
    labels = local.LocalPairs.data["test"]["labels"]
    rows = [(label, *pair) for label, pair in zip(labels, local.PAIRS, strict=True)]
    got = ours(table(tmp_path / "pairs.tsv", "label\tsentence1\tsentence2", rows))
    expected = theirs(local.LocalPairs())
    assert got["max_ap"] == pytest.approx(expected["max_ap"], abs=1e-6)
    assert got["cosine_ap"] == pytest.approx(expected["cosine_ap"], abs=1e-6)
    assert got["max_ap"] > got["cosine_ap"], "one similarity alone decides nothing here"


def test_clustering(tmp_path):
    rows = zip(local.LABELS, local.TEXTS, strict=True)
    got = ours(table(tmp_path / "topics.tsv", "label\ttext", rows))
    expected = theirs(local.LocalClustering())
    assert 0.05 < got["v_measure"] < 0.95
    assert got["v_measure"] == pytest.approx(expected["v_measure"], abs=1e-6)


def test_classification(tmp_path):
    rows = list(zip(local.LABELS, local.TEXTS, strict=True))
    table(tmp_path / "intent_train.tsv", "label\ttext", rows[:60])
    got = ours(table(tmp_path / "intent_test.tsv", "label\ttext", rows[60:]))
    expected = theirs(local.LocalClassification())
    assert 0.3 < got["accuracy"] < 1
    assert got["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-6)


def test_retrieval(tmp_path):
    (tmp_path / "qrels").mkdir()
    for name, texts in (("corpus", local.DOCUMENTS), ("queries", local.QUERIES)):
        lines = (json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items())
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    rows = [(q, d, 1) for q, grades in local.QRELS.items() for d in grades]
    table(tmp_path / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", rows)
    got, expected = ours(tmp_path), theirs(local.LocalRetrieval())
    pairs = {"ndcg@10": "ndcg_at_10", "recall@10": "recall_at_10", "mrr@10": "mrr_at_10"}
    for mine, its in pairs.items():
        assert got[mine] == pytest.approx(expected[its], abs=5.1e-6), mine  # rounded by mteb


def test_reranking(tmp_path):
    lines = []
    for query, text in local.QUERIES.items():
        own = local.CANDIDATES[query]
        relevant = [local.DOCUMENTS[d] for d in own if d in local.QRELS[query]]
        other = list(dict.fromkeys(local.DOCUMENTS[d] for d in own if d not in local.QRELS[query]))
        lines.append(json.dumps({"query": text, "positive": relevant, "negative": other}))
    (tmp_path / "rerank.jsonl").write_text("\n".join(lines))
    got, expected = ours(tmp_path / "rerank.jsonl"), theirs(local.LocalReranking())
    assert got["map"] == pytest.approx(expected["map_at_1000"], abs=5.1e-6)  # rounded by mteb
    assert got["mrr@10"] == pytest.approx(expected["mrr_at_10"], abs=5.1e-6)
