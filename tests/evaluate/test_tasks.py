"""Tasks from files: scores against pytrec_eval and scipy, bad input, the bootstrap."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from unmasked.errors import DataError
from unmasked.evaluate import (
    Encode,
    TaskResult,
    encode_once,
    evaluate,
    interval,
    load_task,
    paired_difference,
    search,
)
from unmasked.evaluate.bootstrap import pearson, spearman
from unmasked.evaluate.tasks import vectors

DATA = Path(__file__).parents[3] / "shared" / "data"
QRELS = "query-id\tcorpus-id\tscore\n"
HEADER = "score\tsentence1\tsentence2\n"


def by_text(vectors: dict[str, Sequence[float]]) -> Encode:
    """An encoder that looks its vectors up."""
    return lambda texts, role: np.array([vectors[text] for text in texts], dtype=np.float32)


def hashed(seed: int, width: int = 16) -> Encode:
    """An encoder whose vectors are random, but always the same for a text."""

    def encode(texts: Sequence[str], role: str | None) -> np.ndarray:
        rows = [np.random.default_rng([seed, *text.encode()]) for text in texts]
        return np.array([row.standard_normal(width) for row in rows], dtype=np.float32)

    return encode


def sts_file(folder: Path, rows: Sequence[tuple[float, str, str]], name: str = "pairs") -> Path:
    path = folder / f"{name}.tsv"
    path.write_text(HEADER + "".join(f"{s}\t{a}\t{b}\n" for s, a, b in rows), encoding="utf-8")
    return path


def beir_folder(
    folder: Path, documents: dict[str, str], queries: dict[str, str], qrels: dict[str, dict]
) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        lines = (json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items())
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    judged = (f"{q}\t{d}\t{s}\n" for q, grades in qrels.items() for d, s in grades.items())
    (folder / "qrels" / "test.tsv").write_text(QRELS + "".join(judged))
    return folder


TINY = {"query": [1, 0], "doc 1": [2, 0], "doc 2": [3, 3], "doc 3": [0, 5]}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Three documents, one query; d2 answers well, d3 a little."""
    documents = {f"d{n}": f"doc {n}" for n in (1, 2, 3)}
    qrels = {"q1": {"d1": 0, "d2": 3, "d3": 1}}
    return beir_folder(tmp_path / "tiny", documents, {"q1": "query"}, qrels)


# Scores


@pytest.mark.parametrize("ties", [False, True], ids=["random", "tied"])
@pytest.mark.parametrize("count", [60, 8], ids=["60 documents", "fewer than 10 documents"])
def test_retrieval_scores_are_those_of_pytrec_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, ties: bool
) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    monkeypatch.setattr(vectors, "_CHUNK", 7 * count)  # several chunks, the last one short
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


def test_a_document_with_the_id_of_the_query_is_kept(tmp_path: Path) -> None:
    qrels = {"same": {"same": 1}}
    folder = beir_folder(tmp_path / "t", {"same": "a", "other": "b"}, {"same": "a"}, qrels)
    result = load_task(folder).score(by_text({"a": [1, 0], "b": [0, 1]}))
    assert result.scores["recall@1"] == 1.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"title": "Wings", "text": "lift an aircraft."}, "Wings lift an aircraft."),
        ({"title": "Wings", "text": "Wings lift."}, "Wings lift."),
        ({"title": "Only a title", "text": ""}, "Only a title"),
        ({"title": None, "text": "No title."}, "No title."),
        ({"title": "", "text": ""}, ""),
    ],
)
def test_title_goes_before_a_text_that_does_not_repeat_it(
    tiny: Path, fields: dict[str, str], expected: str
) -> None:
    with (tiny / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "d4"} | fields))
    assert load_task(tiny).texts["document"] == ["doc 1", "doc 2", "doc 3", expected]


def test_queries_of_another_split_are_left_out(tiny: Path) -> None:
    with (tiny / "queries.jsonl").open("a") as file:
        file.write('{"_id": "q2", "text": "for training"}\n')
    with pytest.raises(DataError, match=r"test\.tsv: query 'q2' has no document"):
        load_task(tiny)
    (tiny / "qrels" / "train.tsv").write_text(QRELS + "q2\td1\t1\n")
    assert load_task(tiny).texts["query"] == ["query"]
    (tiny / "qrels" / "test.tsv").write_text(QRELS + "q1\td1\t1\nq2\td1\t0\n")
    with pytest.raises(DataError, match=r"test\.tsv: query 'q2' has no document"):
        load_task(tiny)


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


def test_search() -> None:
    encode = by_text(TINY)
    documents = ["doc 3", "doc 2", "doc 1"]
    found = search(encode, documents, "query", k=2)
    assert [position for position, _ in found] == [2, 1]
    assert [cosine for _, cosine in found] == pytest.approx([1, math.sqrt(0.5)])
    assert len(search(encode, documents, "query", k=9)) == 3
    assert search(encode, [], "query") == []


def test_cranfield_and_stsb_load() -> None:
    if not (DATA / "retrieval" / "cranfield").is_dir():
        pytest.skip("the development data (cranfield, stsb_en_dev) is not here")
    cranfield = load_task(DATA / "retrieval" / "cranfield")
    stsb = load_task(DATA / "sts" / "stsb_en_dev.tsv")
    assert len(cranfield.texts["document"]) == 1400
    assert len(cranfield.texts["query"]) == 225
    assert len(stsb.texts[None]) == 2 * 1500
    assert cranfield.texts["document"][0].count("aerodynamics of a wing in a slipstream .") == 1


# Encoding


def test_each_text_and_role_is_encoded_once(tmp_path: Path, tiny: Path) -> None:
    seen: list[tuple[str, str | None]] = []

    def encode(texts: Sequence[str], role: str | None) -> np.ndarray:
        seen.extend((text, role) for text in texts)
        return hashed(0)(texts, role)

    rows = [(1, "a", "b"), (2, "b", "a"), (3, "query", "query")]
    loaded = [load_task(sts_file(tmp_path, rows, name)) for name in ("one", "two")]
    results = evaluate([*loaded, load_task(tiny), load_task(tiny)], encode)
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
    with pytest.raises(DataError, match=r"^task pairs: .* vectors for 1 of 4 texts.*: 3 'xx"):
        evaluate([task], encode)
    with pytest.raises(DataError, match="NaN or infinite"):
        task.score(encode)


def test_an_encoder_that_gives_the_wrong_shape_is_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\) for 3 texts"):
        load_task(tiny).score(lambda texts, role: np.ones(len(texts)))
    with pytest.raises(ValueError):
        encode_once(lambda texts, role: np.ones((1, 4)))(["a", "b"], None)


# Bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty. Fix"),
        (b"\n\n", "the file is empty. Fix"),
        (HEADER.encode(), "empty below its header"),
        (b"score\tsentence\tsentence2\n1\ta\tb\n", "line 1: no column 'sentence1'.*did you mean"),
        (b"1\ta\tb\n", "line 1: no column 'score' in '1.*begin with the header score, sentence1"),
        (HEADER.encode() + b"1\ta\tb\n\nfive\ta\tb\n", "line 4: score 'five' is no number"),
        (HEADER.encode() + b"nan\ta\tb\n", "line 2: score 'nan' is no number"),
        (HEADER.encode() + b"1\ta\n", "line 2: 2 columns instead of 3"),
        (HEADER.encode() + b"1\ta\tb\tc\n", "line 2: 4 columns instead of 3"),
        (
            HEADER.encode() + b"1\ta\tb\n2\tcaf\xe9\tb\n",
            "line 3: not UTF-8 .byte 0xe9 at position 5",
        ),
        (HEADER.encode() + b"2\ta\tb\n2\tc\td\n", "every score is 2"),
    ],
)
def test_bad_sts_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.tsv.*{message}") as caught:
        load_task(path)
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", b"", "the file is empty"),
        ("corpus.jsonl", b'{"_id": "d1", "text": "a"}\n{"_id"', "line 2: not JSON"),
        ("corpus.jsonl", b'["d1", "a"]\n', "line 1: a list"),
        ("corpus.jsonl", b'{"_id": "d1"}\n', "line 1: .* lacks a string '_id' or 'text'"),
        ("corpus.jsonl", b'{"_id": "d1", "text": "a"}\n' * 2, "line 2: id 'd1' was given above"),
        ("corpus.jsonl", b'{"_id": "d1", "text": "\xff"}\n', "line 1: not UTF-8"),
        ("queries.jsonl", b'{"_id": "q1", "text": "a"}\n' * 2, "line 2: id 'q1' was given above"),
        ("qrels/test.tsv", b"", "the file is empty"),
        ("qrels/test.tsv", b"q1 0 d1 1\n", "line 1: no column 'query-id'"),
        ("qrels/test.tsv", b"q9\td1\t1\n", "line 2: id 'q9' is none of the 1 of queries.jsonl"),
        ("qrels/test.tsv", b"q1\td9\t1\n", "line 2: id 'd9' is none of the 3 of corpus.jsonl"),
        ("qrels/test.tsv", b"q1\td1\tyes\n", "line 2: score 'yes' is no number"),
        ("qrels/test.tsv", b"q1\td1\t1\nq1\td1\t2\n", "line 3: query 'q1', document 'd1'"),
        ("qrels/test.tsv", b"q1\td1\t0\n", "query 'q1' has no document with a score above 0"),
    ],
)
def test_bad_retrieval_file(tiny: Path, file: str, content: bytes, message: str) -> None:
    headed = file.startswith("qrels") and b"\t" in content
    (tiny / file).write_bytes(QRELS.encode() * headed + content)
    with pytest.raises(DataError, match=f"{Path(file).name}.*{message}") as caught:
        load_task(tiny)
    assert "Fix: " in str(caught.value)


def test_bad_paths(tmp_path: Path, tiny: Path) -> None:
    (tiny / "qrels" / "test.tsv").unlink()
    (tmp_path / "pairs.csv").touch()
    for path, message in (
        (tiny, "qrels/test.tsv is missing"),
        (tmp_path / "absent.tsv", "no such file"),
        (tmp_path / "pairs.csv", "'.csv' given"),
    ):
        with pytest.raises(DataError, match=message):
            load_task(path)


def test_only_newlines_and_tabs_separate(tmp_path: Path) -> None:
    path = tmp_path / "odd.tsv"
    text = '\ufeffsentence2\tid\tscore\tsentence1\r\nb\x85"b\t7\t1\ta\u2028a\r\nd\t8\t2\tc'
    path.write_bytes(text.encode())
    assert load_task(path).texts[None] == ["a\u2028a", "c", 'b\x85"b', "d"]


# The bootstrap


def sts_result(noise: float, pairs: int = 1500, seed: int = 0) -> TaskResult:
    gold = np.random.default_rng(99).integers(0, 26, pairs) / 5
    cosine = gold / 5 + noise * np.random.default_rng(seed).standard_normal(pairs)
    scores = {"spearman": spearman(cosine, gold).item(), "pearson": pearson(cosine, gold).item()}
    return TaskResult("sts", scores, {"cosine": cosine, "gold": gold})


def ranking_result(values: np.ndarray) -> TaskResult:
    return TaskResult("ranking", {"ndcg@10": float(values.mean())}, {"ndcg@10": values})


def test_correlation_of_resampled_pairs_is_that_of_scipy() -> None:
    random = np.random.default_rng(5)
    x, y = random.integers(0, 9, 40) / 3, random.standard_normal(40).round(1)
    counts = random.multinomial(40, [1 / 40] * 40, size=25).astype(np.float64)
    for ours, theirs in ((spearman, stats.spearmanr), (pearson, stats.pearsonr)):
        expected = [theirs(np.repeat(x, c), np.repeat(y, c)).statistic for c in counts.astype(int)]
        np.testing.assert_allclose(ours(x, y, counts), expected, rtol=1e-12)
        assert ours(np.full(3, 0.1), np.full(3, 0.1)) == 0  # whose mean is not quite 0.1


def test_interval_of_a_mean_is_the_known_one() -> None:
    values = np.random.default_rng(6).uniform(0, 1, 2000)
    got = interval(ranking_result(values), "ndcg@10", samples=4000)
    margin = 1.96 * values.std() / math.sqrt(len(values))
    assert got.difference == values.mean()
    assert got.low == pytest.approx(values.mean() - margin, abs=margin / 10)
    assert got.high == pytest.approx(values.mean() + margin, abs=margin / 10)
    assert got.clear


def test_interval_of_spearman_covers_the_score_and_repeats() -> None:
    result = sts_result(noise=0.3)
    got = interval(result, "spearman")
    assert got.low < result.scores["spearman"] < got.high
    assert 0.01 < got.high - got.low < 0.06
    assert got == interval(result, "spearman", seed=0) != interval(result, "spearman", seed=1)


@pytest.mark.parametrize("metric", ["spearman", "pearson"])
def test_sts_difference(metric: str) -> None:
    good, bad, other = sts_result(0.1), sts_result(0.6), sts_result(0.1, seed=1)
    same = paired_difference(good, good, metric)
    assert (same.difference, same.low, same.high, same.clear) == (0, 0, 0, False)
    better, worse = paired_difference(good, bad, metric), paired_difference(bad, good, metric)
    assert better.clear and better.low > 0.1
    assert worse.clear and worse.high == pytest.approx(-better.low)
    alike = paired_difference(good, other, metric)
    assert not alike.clear and alike.low < 0 < alike.high


def test_pairing_finds_a_small_gain_that_unpaired_intervals_hide() -> None:
    random = np.random.default_rng(7)
    before = random.uniform(0, 1, 225)
    a = ranking_result(before + 0.01 + 0.02 * random.standard_normal(225))
    b = ranking_result(before)
    assert paired_difference(a, b, "ndcg@10").clear
    assert interval(a, "ndcg@10").low < interval(b, "ndcg@10").high


def test_results_that_cannot_be_compared_are_refused() -> None:
    a = sts_result(0.1)
    other_gold = TaskResult("sts", a.scores, a.items | {"gold": a.items["gold"][::-1]})
    for b in (sts_result(0.1, pairs=20), ranking_result(np.ones(1500)), other_gold):
        with pytest.raises(DataError, match=r"different test items.*Fix"):
            paired_difference(a, b, "spearman")
    with pytest.raises(DataError, match="unknown metric 'spearmen', did you mean 'spearman'"):
        interval(a, "spearmen")


def test_a_thousand_samples_of_1500_pairs_take_less_than_two_seconds() -> None:
    a, b = sts_result(0.1), sts_result(0.2)
    start = time.process_time()
    paired_difference(a, b, "spearman", samples=1000)
    assert time.process_time() - start < 2
