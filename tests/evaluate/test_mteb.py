"""Our scores are mteb's on the same vectors; its own tasks run by name, resumed, instructed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mteb", reason="mteb is not installed (extra 'eval')")

import mteb
from scipy.stats import spearmanr
from support import mteb_tasks as local

from unmasked import LLM2Vec
from unmasked.errors import DataError
from unmasked.evaluate import load_task
from unmasked.evaluate.compare import compare_encoders
from unmasked.evaluate.scorer import make_scorer
from unmasked.evaluate.tasks.public import (
    INSTRUCTIONS,
    Instructed,
    find_instruction,
    find_tasks,
    public_name,
    score_public,
)
from unmasked.recipe.files import load_recipe, shipped_recipes


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


def test_retrieval_as_it_is_published(tmp_path):
    (tmp_path / "qrels").mkdir()
    queries = [{"_id": key, "text": text} for key, text in local.ODD_QUERIES.items()]
    for name, rows in (("corpus", local.ODD_DOCUMENTS), ("queries", queries)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = [(q, d, g) for q, grades in local.ODD_QRELS.items() for d, g in grades.items()]
    table(tmp_path / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", judged)
    got, expected = ours(tmp_path), theirs(local.LocalOddRetrieval())
    assert 0.02 < got["ndcg@10"] < 0.98
    pairs = {"ndcg@10": "ndcg_at_10", "recall@1": "recall_at_1", "recall@10": "recall_at_10"}
    for mine, its in (pairs | {"mrr@10": "mrr_at_10"}).items():
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


# Public tasks


@pytest.fixture(scope="module")
def model(tiny_decoder):
    return LLM2Vec.from_pretrained(tiny_decoder, device="cpu")


class Spy:
    """A model that remembers what it was asked, and how often."""

    def __init__(self, model) -> None:
        self.model, self.asked = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def encode(self, texts, **options):
        self.asked.append(texts[0])
        return self.model.encode(texts, **options)


def test_mteb_takes_an_llm2vec_as_it_is(model):
    """mteb gives a model without prompts no instruction: its score is that of the bare texts."""
    result = mteb.evaluate(model, local.LocalSTS(), cache=None, show_progress_bar=False)
    first, second = (model.encode(list(texts)) for texts in zip(*local.PAIRS, strict=True))
    cosine = np.diag(model.similarity(first, second).numpy())
    assert result[0].get_score() == pytest.approx(
        spearmanr(cosine, local.SCORES).statistic, abs=1e-6
    )


def test_only_what_is_missing_is_computed(model, tmp_path):
    spy = Spy(model)
    first = score_public(local.LocalSTS(), spy, tmp_path)
    assert list(first.scores) == ["cosine_spearman"] and len(spy.asked) == 2
    again = score_public(local.LocalSTS(), spy, tmp_path)
    assert again.scores == pytest.approx(first.scores, abs=1e-6)  # a file of mteb has six digits
    assert len(spy.asked) == 2
    score_public(local.LocalPairs(), spy, tmp_path)
    (kept,) = tmp_path.glob("results/*/*/LocalSTS.json")
    assert json.loads(kept.read_text())["scores"]["test"][0]["cosine_spearman"] == pytest.approx(
        first.scores["cosine_spearman"], abs=1e-6
    )
    assert mteb.results.TaskResult.from_disk(kept).get_score() == pytest.approx(
        first.scores["cosine_spearman"], abs=1e-6
    )
    assert kept.parent.name == model.fingerprint()[:12]


@pytest.mark.parametrize(
    "options", [{"pooling_mode": "last_token"}, {"enable_bidirectional": False}]
)
def test_another_model_inherits_no_score(model, tiny_decoder, tmp_path, options):
    score_public(local.LocalSTS(), model, tmp_path)
    spy = Spy(LLM2Vec.from_pretrained(tiny_decoder, device="cpu", **options))
    score_public(local.LocalSTS(), spy, tmp_path)
    assert len(spy.asked) == 2


def test_results_lie_under_the_name_of_their_model(model, tmp_path):
    for run in ("first", "second"):
        model.save(tmp_path / run / "model")
        encoder = LLM2Vec.from_pretrained(tmp_path / run / "model", device="cpu")
        score_public(local.LocalSTS(), encoder, tmp_path / "mteb")
    kept = sorted(path.parent.name for path in (tmp_path / "mteb" / "results").glob("*/*"))
    assert kept == ["first__model", "second__model"]
    found = mteb.ResultCache(tmp_path / "mteb").load_results(tasks=["LocalSTS"])
    assert {result.model_name for result in found} == {"first/model", "second/model"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nano", "unmasked/nano"),
        ("gpt2", "unmasked/gpt2"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("a decoder", "unmasked/a-decoder"),
    ],
)
def test_names_that_mteb_takes(given, said):
    assert public_name(given) == said


def test_folders_are_called_by_their_last_two_names(tmp_path, monkeypatch):
    (tmp_path / "my runs" / "encoder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "my runs")
    for given in ("encoder", "./encoder/", "../my runs/encoder"):
        assert public_name(given) == "my-runs/encoder"


def test_queries_are_instructed_and_documents_are_not(model, tmp_path, monkeypatch):
    spy = Spy(model)
    monkeypatch.setitem(INSTRUCTIONS, "LocalRetrieval", "Find it:")
    score_public(local.LocalRetrieval(), spy, tmp_path)
    queries, documents = sorted(spy.asked, key=lambda given: isinstance(given, str))
    assert queries == ["Find it:", "query 0"]
    assert isinstance(documents, str)
    spy.asked.clear()
    score_public(local.LocalClustering(), spy, tmp_path)
    assert {instruction for instruction, _ in spy.asked} == {
        "Identify categories in user passages:"
    }


KOREAN = {
    "KLUE-STS", "KorSTS", "Ko-StrategyQA", "LawIRKo", "AutoRAGRetrieval", "PublicHealthQA",
    "MIRACLRetrieval", "MIRACLReranking",
}  # fmt: skip


def test_instructions_of_korean_tasks_are_those_that_mteb_publishes(model):
    """Of the task itself, or of its type; pinned, so that another mteb changes no score."""
    korean = {task.metadata.name: task.metadata for task in find_tasks("MTEB(kor, v2)")}
    assert set(korean) >= KOREAN
    published = {
        name: Instructed(model).get_instruction(korean[name], mteb.types.PromptType.query)
        for name in KOREAN
    }
    assert {name: find_instruction(name) for name in KOREAN} == {
        name: f"{text.rstrip('.')}:" for name, text in published.items()
    }
    assert set(INSTRUCTIONS) >= KOREAN, "they are pinned and not asked for"


def test_published_instructions():
    assert len(INSTRUCTIONS) == 67 + len(KOREAN)
    assert {name: text for name, text in INSTRUCTIONS.items() if not text.endswith(":")} == {}
    expected = {
        "FEVER": "Given a claim, retrieve documents that support or refute the claim:",
        "FEVERHardNegatives": "Given a claim, retrieve documents that support or refute the claim:",
        "STSBenchmark": "Retrieve semantically similar text:",
        "STS22.v2": "Retrieve semantically similar text:",
        "BiorxivClusteringP2P.v2": "Identify the main category of Biorxiv papers based on the "
        "titles and abstracts:",
        "SummEvalSummarization.v2": "Given a news summary, retrieve other semantically similar "
        "summaries:",
    }
    assert {name: find_instruction(name) for name in expected} == expected
    assert find_instruction("FEVER", "mteb's own.") == expected["FEVER"]
    assert find_instruction("Unheard of") == ""
    assert find_instruction("Unheard of", "Do it.") == "Do it:"


def test_names_benchmarks_and_languages():
    assert len(find_tasks("MTEB(eng, v2)")) == 41
    assert [task.metadata.name for task in find_tasks("STS12")] == ["STS12"]
    (korean,) = find_tasks("STS17", ["kor"])
    assert korean.hf_subsets == ["ko-ko"]
    with pytest.raises(DataError, match="STS12: none of its tasks is in kor.*Fix"):
        find_tasks("STS12", ["kor"])
    with pytest.raises(DataError, match=r"no task or benchmark.*did you mean 'SICK-R'.*Fix"):
        make_scorer(["SICK-RR"])


def test_vectors_that_are_nan_are_named(model, tmp_path):
    class Broken(Spy):
        def encode(self, texts, **options):
            return np.full((len(texts), 4), np.nan)

    with pytest.raises(DataError, match="NaN or infinite vectors for 90 of 90 texts.*'text 0"):
        score_public(local.LocalSTS(), Broken(model), tmp_path)


def test_scores_without_items_have_no_interval(model, tmp_path):
    result = score_public(local.LocalSTS(), model, tmp_path)
    first, second = compare_encoders({"a": [result], "b": [result]})
    assert first.score.low == first.score.high == first.score.difference
    assert second.gain is None


def test_some_tasks_of_a_benchmark_are_as_they_are_in_it():
    both = find_tasks("MTEB(eng, v1):STS17+ SciFact")
    assert [task.metadata.name for task in both] == ["STS17", "SciFact"]
    assert both[0].hf_subsets == ["en-en"] and len(find_tasks("STS17")[0].hf_subsets) > 5
    with pytest.raises(DataError, match=r"MTEB\(eng, v1\): unknown task 'STS71', did you mean"):
        find_tasks("MTEB(eng, v1):STS71")
    with pytest.raises(DataError, match="mteb has no task or benchmark of that name"):
        find_tasks("MTEB(eng, v9):STS17")


def test_korean_tasks_of_a_benchmark_are_korean():
    tasks = {task.metadata.name: task for task in find_tasks("MTEB(kor, v2)")}
    assert tasks["MIRACLRetrieval"].hf_subsets == ["ko"]
    assert tasks["PublicHealthQA"].hf_subsets == ["korean"]


def test_every_published_benchmark_of_a_shipped_recipe_is_one_of_mtebs():
    sizes = {}
    for name in shipped_recipes():
        for anchor in load_recipe(name).anchors:
            found = [task for given in anchor.tasks for task in find_tasks(given)]
            sizes.setdefault(anchor.benchmark, set()).add(len(found))
            assert all(find_instruction(task.metadata.name) for task in found if instructed(task))
    assert sizes == {"15 tasks of MTEB v1": {15}, "MTEB(eng, v1)": {56}}


def instructed(task) -> bool:
    """CQADupstack is twelve tasks, which have their instructions each."""
    return task.metadata.name != "CQADupstackRetrieval"
