"""Scores of every kind of task: against pytrec_eval, scipy, and by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from support.tasks import TINY, beir_folder, by_text, hashed, noisy, sts_file, write

from unmasked.evaluate import interval, load_task, paired_difference
from unmasked.evaluate.tasks import task_vectors


@pytest.mark.parametrize("ties", [False, True], ids=["random", "tied"])
@pytest.mark.parametrize("count", [60, 8], ids=["60 documents", "fewer than 10 documents"])
def test_retrieval_scores_are_those_of_pytrec_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, ties: bool
) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    monkeypatch.setattr(task_vectors, "_CHUNK", 7 * count)  # several chunks, the last one short
    random = np.random.default_rng(0)
    documents = {f"d{d}": f"document {d}" for d in range(count)}
    queries = {f"q{q}": f"query {q}" for q in range(min(40, count))}
    qrels = {q: {f"d{random.integers(count)}": 2} for q in queries}
    for i, grades in enumerate(qrels.values()):
        for document in random.choice(list(documents), size=i % 15 % count, replace=False):
            grades.setdefault(str(document), int(random.integers(0, 4)))

    def encode(texts: Sequence[str], role: str | None) -> np.ndarray:
        if ties:  # unit vectors along three axes: every cosine is exactly 0 or 1
            return np.eye(3, dtype=np.float32)[[sum(text.encode()) % 3 for text in texts]]
        return hashed(1)(texts, role)

    result = load_task(beir_folder(tmp_path / "graded", documents, queries, qrels)).score(encode)

    unit = [encode(list(texts.values()), None) for texts in (queries, documents)]
    unit = [given / np.linalg.norm(given, axis=1, keepdims=True) for given in unit]
    cosines = (unit[0] @ unit[1].T).tolist()
    run = {q: dict(zip(documents, row, strict=True)) for q, row in zip(qrels, cosines, strict=True)}
    measures = {"ndcg_cut.10", "recall.1,10", "recip_rank"}
    expected = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    names = {"ndcg@10": "ndcg_cut_10", "recall@1": "recall_1", "recall@10": "recall_10"}
    for ours, theirs in (names | {"mrr@10": "recip_rank"}).items():
        values = np.array([expected[q][theirs] for q in qrels])
        if ours == "mrr@10":
            values[values < 1 / 10.5] = 0  # theirs is not cut
        np.testing.assert_allclose(result.items[ours], values, atol=1e-6)
        assert result.scores[ours] == pytest.approx(values.mean(), abs=1e-6)


def test_retrieval_by_hand(tiny: Path) -> None:
    task = load_task(tiny)
    result = task.score(by_text(TINY))  # ranking: d1 (not relevant), d2 (3), d3 (1)
    assert (task.name, task.kind) == ("tiny", "retrieval")
    expected = {"recall@1": 0, "recall@10": 1, "mrr@10": 1 / 2}
    expected["ndcg@10"] = (3 / math.log2(3) + 1 / 2) / (3 + 1 / math.log2(3))
    assert result.scores == pytest.approx(expected)


def test_a_document_with_the_id_of_the_query_is_kept_if_it_is_relevant(tmp_path: Path) -> None:
    qrels = {"same": {"same": 1}}
    folder = beir_folder(tmp_path / "t", {"same": "a", "other": "b"}, {"same": "a"}, qrels)
    result = load_task(folder).score(by_text({"a": [1, 0], "b": [0, 1]}))
    assert result.scores["recall@1"] == 1.0


@pytest.mark.parametrize("grade", [None, 0], ids=["not judged", "judged 0"])
@pytest.mark.parametrize("others", [1, 12], ids=["two documents", "more than are ranked"])
def test_a_query_does_not_find_the_document_with_its_own_id(tmp_path, grade, others) -> None:
    documents = {"q": "a", **{f"d{n}": f"b{n}" for n in range(others)}}
    qrels = {"q": {"d0": 1, **({} if grade is None else {"q": grade})}}
    vectors = {"a": [1, 0], **{f"b{n}": [1, 1 + n] for n in range(others)}}
    task = load_task(beir_folder(tmp_path / "t", documents, {"q": "a"}, qrels))
    assert task.ranked(by_text(vectors))[0] == list(range(1, min(others, 10) + 1))
    assert set(task.score(by_text(vectors)).scores.values()) == {1.0}


def test_a_document_that_is_not_there_counts_as_not_found(tmp_path: Path) -> None:
    qrels = {"q": {"d": 1, "gone": 3}, "p": {"gone": 1}}
    folder = beir_folder(tmp_path / "t", {"d": "a", "e": "b"}, {"q": "a", "p": "b"}, qrels)
    result = load_task(folder).score(by_text({"a": [1, 0], "b": [0, 1]}))
    both = 1 / (3 + 1 / math.log2(3)), 0
    np.testing.assert_allclose(result.items["ndcg@10"], both)
    np.testing.assert_allclose(result.items["recall@10"], (0.5, 0))


def test_sts_scores_are_those_of_scipy(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    rows = [(random.integers(0, 11) / 2, f"first {i % 50}", f"second {i % 70}") for i in range(300)]
    task = load_task(sts_file(tmp_path, rows))
    result = task.score(hashed(3))
    first, second = np.split(hashed(3)(task.texts[None], None).astype(np.float64), 2)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosine = (first * second).sum(axis=1) / lengths
    gold = [row[0] for row in rows]
    np.testing.assert_allclose(result.items["cosine"], cosine)
    np.testing.assert_array_equal(result.items["gold"], gold)
    assert result.scores["spearman"] == pytest.approx(stats.spearmanr(cosine, gold).statistic)
    assert result.scores["pearson"] == pytest.approx(stats.pearsonr(cosine, gold).statistic)
    assert (task.name, task.kind) == ("pairs", "sts")


def test_sts_by_hand(tmp_path: Path) -> None:
    path = sts_file(tmp_path, [(1, "a", "b"), (2, "a", "c"), (3, "a", "a")])
    up = by_text({"a": [1, 0], "b": [0, 1], "c": [1, 1]})  # cosines 0, 0.71, 1
    down = by_text({"a": [1, 0], "b": [1, 0.1], "c": [1, 0]})  # cosines 0.995, 1, 1: a tie
    assert load_task(path).score(up).scores["spearman"] == pytest.approx(1)
    assert load_task(path).score(down).scores["spearman"] == pytest.approx(math.sqrt(3) / 2)


@pytest.mark.parametrize("vector", [[0.3, 0.7, 0.1], [0.0, 0.0, 0.0]], ids=["collapsed", "zero"])
def test_vectors_that_are_all_equal_score_zero(tmp_path: Path, tiny: Path, vector: list) -> None:
    def encode(texts: Sequence[str], role: str | None) -> np.ndarray:
        return np.array([vector] * len(texts), dtype=np.float32)

    path = sts_file(tmp_path, [(1, "a", "b"), (2, "c", "d"), (3, "e", "f")])
    assert load_task(path).score(encode).scores == {"spearman": 0.0, "pearson": 0.0}
    assert load_task(tiny).score(encode).scores["mrr@10"] == 1.0  # of equals the highest id: d3


@pytest.mark.parametrize("kind", ["clustering", "classification", "pairs", "reranking"])
def test_every_kind_tells_a_good_encoder_from_a_bad_one(tmp_path, kind):
    pairs = [(n % 2, f"{n} a", f"{n} again {'a' if n % 2 else n}") for n in range(200)]
    rows = "".join(f"{label}\t{first}\t{second}\n" for label, first, second in pairs)
    ranked = [{"query": f"{n} {n % 7}", "positive": f"x{n} {n % 7}", "negative": [f"{n} z", "0 y"]}
              for n in range(60)]  # fmt: skip
    labelled = "label\ttext\n" + "".join(f"{n % 3}\ttext {n} {n % 3}\n" for n in range(300))
    write(
        tmp_path,
        pairs__tsv="label\tsentence1\tsentence2\n" + rows,
        clustering__tsv=labelled,
        classification_train__tsv=labelled,
        classification_test__tsv=labelled,
        reranking__jsonl="".join(json.dumps(row) + "\n" for row in ranked),
    )
    names = {"classification": "classification_test.tsv", "reranking": "reranking.jsonl"}
    task = load_task(tmp_path / names.get(kind, f"{kind}.tsv"))
    good, bad = task.score(noisy(0.2)), task.score(noisy(3))
    for metric in good.scores:
        gain = paired_difference(good, bad, metric, samples=200)
        assert gain.clear and gain.low > 0, metric
        alone = interval(bad, metric, samples=200)
        assert alone.low < alone.difference < alone.high, metric
