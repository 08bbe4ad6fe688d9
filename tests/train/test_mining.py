"""Mining in shards: the same negatives as with everything in memory, cut off or not."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives

from unmasked.errors import DataError, OutputError
from unmasked.forward.nearest import best_scores
from unmasked.forward.nearest.best_scores import BestScores, add_products
from unmasked.recipe.schema import Pairs
from unmasked.train.data.pairs import read_rows
from unmasked.train.mining import band, work_folder
from unmasked.train.mining.mining import mine

WIDTH = 8


class StandIn:
    """An encoder whose vectors depend on the text's digest; it can be cut off at any call."""

    device = torch.device("cpu")

    def __init__(self, left=10**9):
        self.left, self.calls, self.prompts = left, 0, set()

    def fingerprint(self):
        return "stand-in"

    def encode_document(self, texts, prompt=None, **_):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left, self.calls = self.left - 1, self.calls + 1
        self.prompts.add(prompt)
        seeds = [int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8).digest()) for t in texts]
        vectors = np.stack([np.random.default_rng(seed).normal(size=WIDTH) for seed in seeds])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    encode_query = encode_document

    def similarity(self, first, second):
        return torch.as_tensor(first) @ torch.as_tensor(second).T

    def similarity_pairwise(self, first, second):
        return (torch.as_tensor(first) * torch.as_tensor(second)).sum(1)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(work_folder, "SHARD", 7)


@pytest.fixture
def pairs(tmp_path):
    rows = [{"query": f"q {i % 30}", "positive": f"a {i % 40}"} for i in range(60)]
    return pairs_of(tmp_path / "pairs.jsonl", rows)


def pairs_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Pairs(path=str(path))


def negatives_of(path):
    return [json.loads(line)["negatives"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("margin", [0.05, 0.0, 0.3])
def test_shards_give_what_sentence_transformers_finds_in_memory(tmp_path, margin):
    rows = [{"query": f"q {i % 30}", "positive": f"a {i % 25}"} for i in range(40)]
    corpus = [f"more {i}" for i in range(10)]
    pairs = pairs_of(tmp_path / "pairs.jsonl", rows)
    mine(StandIn(), pairs, tmp_path / "out.jsonl", corpus=corpus, negatives=4, margin=margin)
    model = StandIn()
    model.model_card_data = model.get_embedding_dimension = None
    found = mine_hard_negatives(
        Dataset.from_list(rows), model, corpus=corpus, relative_margin=margin, num_negatives=4,
        range_max=34, verbose=False,
    )  # fmt: skip
    wanted = {(row["query"], row["positive"]): [] for row in rows}
    for row in found:
        wanted[row["query"], row["positive"]].append(row["negative"])
    assert negatives_of(tmp_path / "out.jsonl") == list(wanted.values())
    assert not list(tmp_path.glob(".*.work"))


def test_a_band_of_ranks_counts_documents_that_are_no_answers(pairs, tmp_path):
    mine(StandIn(), pairs, tmp_path / "all.jsonl", negatives=99, margin=-1e6)
    mine(StandIn(), pairs, tmp_path / "band.jsonl", negatives=99, margin=-1e6, skip=3, depth=9)
    every = negatives_of(tmp_path / "all.jsonl")
    assert min(map(len, every)) > 30
    assert negatives_of(tmp_path / "band.jsonl") == [found[3:9] for found in every]


def test_what_was_cut_off_ends_with_the_same_bytes(pairs, tmp_path):
    whole = StandIn()
    mine(whole, pairs, tmp_path / "whole.jsonl")
    for cut in range(whole.calls):
        first, then = StandIn(cut), StandIn()
        with pytest.raises(KeyboardInterrupt):
            mine(first, pairs, tmp_path / "out.jsonl")
        assert not (tmp_path / "out.jsonl").exists()
        mine(then, pairs, tmp_path / "out.jsonl")
        assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert first.calls + then.calls == whole.calls
        (tmp_path / "out.jsonl").unlink()


def test_a_search_that_was_cut_off_goes_on_behind_its_last_shard(pairs, tmp_path):
    mine(StandIn(), pairs, tmp_path / "whole.jsonl")

    def cut(what, done, total):
        if (what, done) == ("searching", 20):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mine(StandIn(), pairs, tmp_path / "out.jsonl", progress=cut)
    seen = []
    told = {"progress": lambda what, done, total: seen.append((what, done, total))}
    mine(StandIn(0), pairs, tmp_path / "out.jsonl", **told)  # nothing is encoded again
    searched = [done for what, done, _ in seen if what == "searching"]
    assert searched[0] == 19 and searched[-1] == seen[-1][2] == 30
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_other_texts_begin_anew_and_other_settings_use_the_vectors_again(pairs, tmp_path):
    said = []
    with pytest.raises(KeyboardInterrupt):
        mine(StandIn(8), pairs, tmp_path / "out.jsonl")
    again = StandIn(8)
    with pytest.raises(KeyboardInterrupt):
        mine(again, pairs, tmp_path / "out.jsonl", corpus=["one more"], tell=said.append)
    assert again.calls == 8 and "texts or model: it is cleared" in said[-1]
    again = StandIn()
    settings = {"corpus": ["one more"], "depth": 20, "tell": said.append}
    mine(again, pairs, tmp_path / "out.jsonl", **settings)
    assert again.calls == 3 and "vectors are used again" in said[-1]
    mine(StandIn(), pairs, tmp_path / "new.jsonl", corpus=["one more"], depth=20)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "new.jsonl").read_bytes()


def test_no_copy_of_an_answer_or_of_the_query_is_a_negative(tmp_path):
    rows = [
        {"query": "Where?", "positive": "Here", "negatives": ["HERE ", "there"]},
        {"query": " where?", "positive": "over  there"},
        {"query": "other", "positive": "Over there"},
        {"query": "third", "positive": "where?"},
        {"query": "fourth", "positive": "here"},
        {"query": "fifth", "positive": "elsewhere"},
    ]
    pairs = pairs_of(tmp_path / "pairs.jsonl", rows)
    mined = mine(StandIn(), pairs, tmp_path / "out.jsonl", margin=-2, negatives=9)
    found = negatives_of(tmp_path / "out.jsonl")
    assert set(found[0]) == {"there", "elsewhere"} and set(found[1]) == {"elsewhere"}
    assert set(found[3]) == {"Here", "here", "Over there", "over  there", "elsewhere"}
    assert mined.answers == 1


def test_a_band_that_leaves_nothing_is_an_error_and_nothing_is_written(pairs, tmp_path):
    settings = {"skip": 1, "depth": 3, "margin": 1.0}
    with pytest.raises(DataError, match=r"--margin 0 \(now 1\), --skip 0 \(now 1\)") as error:
        mine(StandIn(), pairs, tmp_path / "out.jsonl", **settings)
    assert not (tmp_path / "out.jsonl").exists()
    assert (tmp_path / ".out.jsonl.work").is_dir() and ".out.jsonl.work" in str(error.value)
    assert mine(StandIn(0), pairs, tmp_path / "out.jsonl", depth=3, skip=1, margin=-9).negatives


def test_an_instruction_stands_before_the_queries_alone(pairs, tmp_path):
    model = StandIn()
    pairs = pairs.model_copy(update={"instruction": ["Find:"]})
    mine(model, pairs, tmp_path / "out.jsonl")
    assert None in model.prompts and any(p and re.match("Find:", p) for p in model.prompts)


def test_an_instruction_is_written_to_the_rows_without_their_own(tmp_path):
    rows = [{"query": f"q {i}", "positive": f"a {i}", "instruction": None} for i in range(20)]
    rows[3]["instruction"] = "Its own:"
    pairs = pairs_of(tmp_path / "pairs.jsonl", rows)
    pairs = pairs.model_copy(update={"instruction": ["Find:"]})
    mine(StandIn(), pairs, tmp_path / "out.jsonl")
    told = [row.query_instruction for row in read_rows(Pairs(path=str(tmp_path / "out.jsonl")))]
    assert told == ["Its own:" if i == 3 else "Find:" for i in range(20)]


def test_a_second_search_for_the_same_file_is_refused_and_the_first_goes_on(pairs, tmp_path):
    seen = []

    def second(what, done, total):
        if not seen:
            seen.append(what)
            with pytest.raises(OutputError, match=r"at work in .*\.out\.jsonl\.work.* Fix:"):
                mine(StandIn(0), pairs, tmp_path / "out.jsonl")

    mine(StandIn(), pairs, tmp_path / "out.jsonl", progress=second)
    mine(StandIn(), pairs, tmp_path / "alone.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert seen and not list(tmp_path.glob(".*.work"))


def test_a_column_of_a_teacher_is_refused_because_new_negatives_have_none(tmp_path):
    with pytest.raises(DataError, match="'sim' is named .* Fix: leave it out"):
        mine(StandIn(0), Pairs(path="nowhere.jsonl", teacher="sim"), tmp_path / "out.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["numpy", "faiss"])
def test_the_best_of_blocks_are_the_best_of_all(monkeypatch, way):
    if way == "faiss":
        pytest.importorskip("faiss", reason="faiss is not installed")
    else:
        monkeypatch.setattr(best_scores, "faiss_for", lambda queries: None)
    random = np.random.default_rng(0)
    vectors = random.normal(size=(100, WIDTH)).astype(np.float32)
    vectors[60] = vectors[10]
    queries = random.normal(size=(25, WIDTH)).astype(np.float32)
    best = BestScores(25, 12)
    for place in range(0, 100, 8):
        add_products(best, queries, vectors[place : place + 8], place)
    scores = queries @ vectors.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :12]
    if way == "numpy":
        np.testing.assert_array_equal(best.result().places, order)
    wanted = np.take_along_axis(scores, order, axis=1)
    np.testing.assert_allclose(best.result().scores, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"skip": -5}, "skip -5 should be 0 or more. Fix"),
        ({"depth": 0}, "depth 0 should be 1 or more. Fix"),
        ({"negatives": 0}, "negatives 0 should be 1 or more. Fix"),
        ({"margin": float("nan")}, "margin nan should be 1 or less. Fix"),
        ({"margin": 1.5}, "margin 1.5 should be 1 or less. Fix"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_anything_is_read(tmp_path, given, said):
    with pytest.raises(DataError, match=said):
        mine(StandIn(0), Pairs(path="nowhere.jsonl"), tmp_path / "out.jsonl", **given)
    assert not list(tmp_path.iterdir())


def test_a_query_of_many_answers_takes_no_more_memory_and_finds_the_same(
    tmp_path, pairs, monkeypatch
):
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    rows += [{"query": "q 3", "positive": f"one of many {i}"} for i in range(30)]
    pairs, kept = pairs_of(tmp_path / "many.jsonl", rows), []
    stock = BestScores.__init__

    def noted(self, queries, count):
        kept.append(count)
        stock(self, queries, count)

    monkeypatch.setattr(BestScores, "__init__", noted)
    for name, many in (("afterwards", 10**6), ("meanwhile", 4)):
        monkeypatch.setattr(band, "MANY", many)
        kept.clear()
        mine(StandIn(), pairs, tmp_path / name, negatives=99, margin=-9, skip=1, depth=6)
        assert (max(kept) > 30) == (name == "afterwards")
    assert (tmp_path / "afterwards").read_text() == (tmp_path / "meanwhile").read_text()
    assert max(map(len, negatives_of(tmp_path / "meanwhile"))) == 5
