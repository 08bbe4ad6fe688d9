"""The supervised stage: its rows, its batches, its loss, on one device and on two."""

from __future__ import annotations

import gzip
import json
import os
import signal
import sys
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import multiprocessing
from torch.nn.functional import cross_entropy, normalize

from unmasked import LLM2Vec
from unmasked.checkpoint import adapters
from unmasked.errors import DataError, MissingExtraError
from unmasked.recipe.lora import Lora
from unmasked.recipe.schema import Pairs, Recipe
from unmasked.text.templates import PLAIN
from unmasked.train.callback import Listener
from unmasked.train.data.mixing import OneSourceBatches, PairCollator, split_rows
from unmasked.train.data.pairs import read_rows, store_rows
from unmasked.train.data.texts import folded
from unmasked.train.losses import supervised
from unmasked.train.losses.supervised import RankingLoss
from unmasked.train.mining.mining import mine
from unmasked.train.preflight import check_inputs
from unmasked.train.run import Run

ROWS = [
    {"query": f"question {i}", "positive": f"answer {i} " * (1 + i % 5), "negative": f"other {i}"}
    for i in range(64)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def encoder(tiny_decoder):
    torch.manual_seed(0)
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    peft_model = adapters.attach(model.backbone.auto_model, rank=4, dropout=0.0)
    for name, weight in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.backbone.auto_model = peft_model
    return model


def as_rows(rows, source=0):
    return [
        {
            "query": row["query"],
            "positive": row["positive"],
            "negatives": [row["negative"]] if "negative" in row else [],
            "source": source,
            "number": number,
        }
        for number, row in enumerate(rows)
    ]


def features_of(model, rows, data=None, hard_negatives=1):
    data = data or [Pairs(path="x")]
    batch = PairCollator(model.preprocess, data, hard_negatives, 64)(rows)
    features = {k.removeprefix("text_"): v for k, v in batch.items() if k != "label"}
    return features, batch["label"]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --- rows -------------------------------------------------------------------------------------


def test_b42_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [
        {"query": "a, b", "positive": "답", "negative": "x"},
        {"query": "c\nd", "positive": "e"},
    ]
    full = [{"query": r["query"], "positive": r["positive"]} for r in rows]
    write(tmp_path / "a.jsonl", rows)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write((tmp_path / "a.jsonl").read_text(encoding="utf-8"))
    (tmp_path / "a.csv").write_text('query,positive\n"a, b",답\n"c\nd",e\n', encoding="utf-8")
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes())
    packed = pa.compress((tmp_path / "a.jsonl").read_bytes(), codec="zstd", asbytes=True)
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    pq.write_table(pa.Table.from_pylist(full), tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    for row, name in zip(rows, ("1.jsonl", "2.jsonl"), strict=True):
        write(tmp_path / "folder" / name, [row])
    names = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "b.csv", "a.parquet", "folder")
    for name in names:
        found = list(read_rows(Pairs(path=str(tmp_path / name))))
        assert [(r.query, r.positive) for r in found] == [("a, b", "답"), ("c\nd", "e")]
    assert [r.negatives for r in read_rows(Pairs(path=str(tmp_path / "a.jsonl")))] == [["x"], []]


def test_columns_have_names_and_negatives_may_be_a_list(tmp_path):
    rows = [{"q": f"q{i}", "p": f"p{i}", "negatives": ["n1", "n2"]} for i in range(4)]
    pairs = Pairs(path=str(write(tmp_path / "a.jsonl", rows)), query="q", positive="p", max_rows=3)
    assert [r.negatives for r in read_rows(pairs)] == [["n1", "n2"]] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    pairs = pairs.model_copy(update={"path": str(tmp_path / "a.parquet")})
    assert [r.negatives for r in read_rows(pairs)] == [["n1", "n2"]] * 3
    with pytest.raises(DataError, match="one row, but a query"):
        list(read_rows(pairs.model_copy(update={"max_rows": 1})))


def test_a_column_that_is_not_there_is_named_with_its_setting(tmp_path):
    (tmp_path / "a.csv").write_text("query,reply\na,b\nc,d\n", encoding="utf-8")
    pq.write_table(pa.table({"query": ["a"], "reply": ["b"]}), tmp_path / "a.parquet")
    for name, place in (("a.csv", "line 1"), ("a.parquet", "row 1")):
        told = f"{name}, {place}: no column 'positive' among query, reply. Fix: give "
        with pytest.raises(DataError, match=told + r".*:positive=NAME in place of "):
            list(read_rows(Pairs(path=str(tmp_path / name))))
    found = list(read_rows(Pairs(path=str(tmp_path / "a.csv"), positive="reply")))
    assert [r.positive for r in found] == ["b", "d"]


def test_a_data_set_of_the_hub_has_a_subset_and_a_split(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", ROWS[:4])
    write(tmp_path / "set" / "test.jsonl", ROWS[4:6])
    path = f"hf:{tmp_path / 'set'}"
    assert [r.query for r in read_rows(Pairs(path=path))] == [r["query"] for r in ROWS[:4]]
    for pairs in (Pairs(path=path, split="test"), Pairs(path=f"{path}::test")):
        found = list(read_rows(pairs))
        assert [(r.query, r.negatives) for r in found] == [
            (r["query"], [r["negative"]]) for r in ROWS[4:6]
        ]
    with pytest.raises(DataError, match="row 1: no column 'answer' among query, positive"):
        list(read_rows(Pairs(path=path, positive="answer")))
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *given, **more: asked.append((given, more)))
    for pairs in (
        Pairs(path="owner/name", subset="triplet", split="dev"),
        Pairs(path="hf:owner/name:triplet:dev"),
    ):
        with pytest.raises(AttributeError):
            list(read_rows(pairs))
    assert asked == [(("owner/name", "triplet"), {"split": "dev", "streaming": True})] * 2


@pytest.mark.parametrize("name", ["a.txt", "a.pdf", "-"])
def test_what_holds_no_pairs_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for file in ("a.txt", "a.pdf"):
        (tmp_path / file).write_text("one\ntwo\n")
    with pytest.raises(DataError, match=r"unknown kind .* Allowed: \.jsonl, \.csv, \.tsv, "):
        list(read_rows(Pairs(path=name)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"query": "a"}\n', "line 1: no column 'positive' among query"),
        (b'{"query": "a", "positve": "b"}\n', "did you mean 'positve'"),
        (b'{"query": "a", "positive": ""}\n', "line 1: 'positive' is empty"),
        (b'{"query": "a", "positive": 3}\n', "line 1: 'positive' is a int"),
        (b'\n{"query": "a", "positive": "b", "negative": " "}\n', "line 2: 'negative' is empty"),
        (b'{"query": "a", "positive": "b", "negative": {}}\n', "'negative' is a dict"),
        (b'{"query": "a", "positive": "b"}\n', "one row, but a query"),
        (b"", "no row, but a query"),
        (b"[1]\n", "line 1: a list. Fix: write one object per line"),
        (b"nope\n", "line 1: not JSON"),
        (b'{"query": "\xff"}\n', "line 1: not UTF-8"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path, content, says):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=says):
        list(read_rows(Pairs(path=str(tmp_path / "a.jsonl"))))


def test_a_split_of_files_is_refused_as_nothing_reads_it(tmp_path):
    path = str(write(tmp_path / "a.jsonl", ROWS))
    for given in ({"split": "test"}, {"subset": "ko"}):
        with pytest.raises(DataError, match="which only a data set on the hub has. Fix: leave"):
            list(read_rows(Pairs(path=path, **given)))


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(DataError, match=r"did you mean 'pairs\.jsonl'"):
        list(read_rows(Pairs(path=str(tmp_path / "pears.jsonl"))))


def test_b42_rows_lie_on_disk_and_some_are_held_out(tmp_path):
    data = [Pairs(path=str(write(tmp_path / f"{i}.jsonl", ROWS)), max_rows=40) for i in range(2)]
    store_rows(data, tmp_path / "rows.arrow")
    rows = Dataset.from_file(str(tmp_path / "rows.arrow"))
    assert rows.cache_files  # mapped, not in memory
    assert rows["source"][:] == [0] * 40 + [1] * 40
    assert rows["number"][:] == [*range(40)] * 2
    train, held_out = split_rows(rows, 6, seed=1)
    assert len(held_out) == 6
    taken = {(row["source"], row["number"]) for row in held_out}
    assert not taken & {(row["source"], row["number"]) for row in train}


def test_a_query_is_not_on_both_sides_of_what_is_held_out(tmp_path):
    """Its other answers, and copies of its row, would be trained on and measured."""
    rows = [{"query": f"Question {i % 50}", "positive": f"answer {i}"} for i in range(200)]
    rows += [{"query": f"question  {i}", "positive": f"late {i}"} for i in range(50)]
    store_rows([Pairs(path=str(write(tmp_path / "a.jsonl", rows)))], tmp_path / "rows.arrow")
    stored = Dataset.from_file(str(tmp_path / "rows.arrow"))
    train, held_out = split_rows(stored, 22, seed=1)
    asked = [{" ".join(q.casefold().split()) for q in side["query"]} for side in (train, held_out)]
    assert len(held_out) == 20  # four whole queries of five rows each
    assert not asked[0] & asked[1]
    assert len(split_rows(stored, 4, seed=1)[1]) == 0  # less than one query has


# --- batches ----------------------------------------------------------------------------------


def test_a_batch_is_of_one_data_set_on_all_devices():
    sources = np.repeat([0, 1, 2], [64, 48, 20])
    batches = OneSourceBatches(sources, 4, [1, 0.5, 2], processes=2, seed=3)
    drawn = list(batches)
    assert len(drawn) == len(batches) == 2 * (8 + 3 + 5)
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        assert len({sources[i] for i in (*first, *second)}) == 1
        assert len({*first, *second}) == 8
    counts = np.bincount(np.concatenate(drawn), minlength=132)
    assert counts[:64].tolist() == [1] * 64  # weight 1: every row once
    assert counts[64:112].sum() == 24  # 0.5: half of them
    assert counts[112:].sum() == 40  # 2: two passes, 16 rows of 20 in whole batches each


def test_b42_batches_are_drawn_anew_in_every_epoch_and_the_same_again():
    sources = np.zeros(64, dtype=int)
    batches, again = (OneSourceBatches(sources, 8, [1.0], seed=1) for _ in range(2))
    first = list(batches)
    assert first == list(again)
    batches.set_epoch(1)
    assert list(batches) != first


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_weight_below_one_has_used_every_row_after_as_many_epochs(epochs):
    batches = OneSourceBatches(np.zeros(24, int), 2, [1 / epochs], processes=2, seed=3)
    used = []
    for epoch in range(2 * epochs):
        batches.set_epoch(epoch)
        assert [*batches] == [*batches]
        used.append(sorted(row for batch in batches for row in batch))
    for turn in (used[:epochs], used[epochs:]):
        assert sorted(row for rows in turn for row in rows) == [*range(24)]
    assert used[0] != used[epochs]


def test_a_data_set_smaller_than_a_batch_is_named():
    with pytest.raises(DataError, match="data set 2 of supervised.data has 6 rows"):
        OneSourceBatches(np.repeat([0, 1], [64, 6]), 8, [1.0, 1.0])


def test_b34_a_symmetric_set_has_its_row_instruction_on_both_sides(encoder):
    seen = []

    def preprocess(inputs, max_length):
        seen.extend(inputs)
        return encoder.preprocess(inputs, max_length=max_length)

    data = [
        Pairs(path="nli", instruction=["even", "odd"], symmetric=True),
        Pairs(path="search", instruction="find"),
        Pairs(path="other", instruction="ask", document_instruction="passage"),
    ]
    collate = PairCollator(preprocess, data, 1, 64)
    for source in range(3):
        collate(as_rows(ROWS[:2], source))
    instructions = [instruction for instruction, _ in seen]
    assert instructions[:6] == ["even", "odd"] * 3
    assert instructions[6:12] == ["find", "find", "", "", "", ""]
    assert instructions[12:] == ["ask", "ask", *["passage"] * 4]


def test_b33_b35_a_training_text_has_the_ids_that_encode_gives_it(encoder):
    data = [Pairs(path="x", instruction="Find it:")]
    features, _ = features_of(encoder, as_rows(ROWS[:1]), data)
    first = int((features["place"] == 0).nonzero())
    expected = encoder.preprocess([ROWS[0]["query"]], prompt=PLAIN.join("Find it:"))
    length = expected["input_ids"].shape[1]
    for name in ("input_ids", "text_mask"):
        assert features[name][first, :length].tolist() == expected[name][0].tolist()


# --- the loss ---------------------------------------------------------------------------------


def expected_loss(model, rows, temperature=0.05, width=None):
    """The formula, on vectors of `encode`."""
    columns = [[r["query"] for r in rows], [r["positive"] for r in rows]]
    columns.append([n for r in rows for n in r["negatives"]])
    vectors = [torch.from_numpy(model.encode(c))[:, :width] for c in columns if c]
    queries, *documents = (normalize(v, dim=1) for v in vectors)
    return cross_entropy(queries @ torch.cat(documents).T / temperature, torch.arange(len(rows)))


@pytest.mark.parametrize("hard", [True, False])
def test_the_loss_is_infonce_over_positives_and_negatives(encoder, hard):
    rows = as_rows(ROWS[:12])
    for row in rows:
        row["negatives"] = row["negatives"] if hard else []
    features, labels = features_of(encoder, rows)
    loss = RankingLoss(encoder.eval(), 0.05)([features], labels)
    torch.testing.assert_close(loss, expected_loss(encoder, rows), atol=1e-5, rtol=1e-5)


def test_b40_the_same_text_is_no_negative(encoder):
    """A second row with one's positive, or one's query again, changes nothing for a row."""
    loss = RankingLoss(encoder.eval(), 0.05)
    rows = as_rows(ROWS[:4])
    for row in rows:
        row["negatives"] = []
    double = [*rows, {**rows[0], "query": "another question"}]
    features, labels = features_of(encoder, double)
    losses = -torch.log_softmax(scores_of(encoder, double)[:, :5], dim=1)
    assert losses.diag().mean() > loss([features], labels) + 1e-3  # masked: smaller
    again = [*rows, {**rows[0], "positive": rows[0]["query"]}]  # its query as a document
    vectors = scores_of(encoder, again)
    vectors[0, 4] = vectors[4, 0] = -torch.inf
    expected = cross_entropy(vectors, torch.arange(5))
    features, labels = features_of(encoder, again)
    torch.testing.assert_close(loss([features], labels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_b40_an_answer_is_no_negative_wherever_it_stands(monkeypatch, world):
    """An answer to a query is never its negative, wherever it is in the batch, on any device."""
    rows, hard, draw = 6, 2, np.random.default_rng(0)
    for _ in range(20):
        queries = draw.integers(0, 5, (world, rows))  # few texts, so that they meet
        documents = draw.integers(3, 16, (world, 1 + hard, rows))  # some are queries as well
        keys = [torch.tensor(documents[w].ravel()) for w in range(world)]
        asked = [torch.tensor(queries[w]) for w in range(world)]
        everything = [*documents.reshape(world, -1).ravel()]
        pairs = zip(queries.ravel(), documents[:, 0].ravel(), strict=True)
        answers = {(int(q), int(d)) for q, d in pairs}
        repeated = documents == documents[:, :1]  # in the place of a missing negative
        repeated[:, 0] = False
        for rank in range(world):
            gathered = iter([torch.cat(asked), torch.cat(keys)])
            monkeypatch.setattr(supervised, "_gathered", lambda _, all_of=gathered: next(all_of))
            own = rank * len(keys[0]) + torch.arange(rows)
            found = supervised._no_negatives(asked[rank], keys[rank], own)
            expected = [
                [
                    (int(q), int(d)) in answers or q == d or again
                    for d, again in zip(everything, repeated.ravel().tolist(), strict=True)
                ]
                for q in queries[rank]
            ]
            assert found.tolist() == expected


def test_b40_an_answer_is_one_in_capitals_and_with_other_white_space_as_well(encoder):
    """As `mine` and `data check` see it."""
    texts = [("q1", "An answer", "n1"), ("q2", "p2", " an  answer\n"), ("Q1 ", "p3", "n3")]
    rows = as_rows(
        [dict(zip(("query", "positive", "negative"), row, strict=True)) for row in texts]
    )
    features, _ = features_of(encoder, rows)
    found = supervised._no_negatives(*features["key"].split([3, 6]), torch.arange(3))
    documents = [row[column] for column in (1, 2) for row in texts]
    seen = [[d for d, out in zip(documents, row, strict=True) if not out] for row in found]
    assert seen == [
        ["p2", "n1", "n3"],
        ["An answer", "p3", "n1", " an  answer\n", "n3"],
        ["p2", "n1", "n3"],
    ]


def test_korean_syllables_written_as_letters_are_the_same_text():
    whole = "판결 요지"
    assert unicodedata.normalize("NFD", whole) != whole
    assert folded(unicodedata.normalize("NFD", whole)) == folded(whole) == whole


def scores_of(model, rows):
    queries, documents = (
        normalize(torch.from_numpy(model.encode([r[k] for r in rows])), dim=1)
        for k in ("query", "positive")
    )
    return queries @ documents.T / 0.05


def test_b40_what_is_closer_than_the_positive_may_be_left_out(encoder):
    rows = [{**row, "negatives": []} for row in as_rows(ROWS[:16])]
    features, labels = features_of(encoder.eval(), rows)
    scores = scores_of(encoder, rows)
    close = scores > scores.diag()[:, None] + 0.01 / 0.05
    assert close.any()
    expected = cross_entropy(scores.masked_fill(close, -torch.inf), torch.arange(16))
    loss = RankingLoss(encoder, 0.05, margin=0.01)([features], labels)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_rows_without_a_negative_share_a_batch_with_those_that_have_several(encoder):
    """What fills the places of missing negatives is a negative of no query."""
    rows = as_rows(ROWS[:6])
    rows[2]["negatives"] = []
    rows[4]["negatives"] = ["one more", "two more", "three more"]
    features, labels = features_of(encoder.eval(), rows, hard_negatives=3)
    assert len(features["place"]) == 6 * 5
    loss = RankingLoss(encoder, 0.05)([features], labels)
    torch.testing.assert_close(loss, expected_loss(encoder, rows), atol=1e-5, rtol=1e-5)


def test_matryoshka_is_the_mean_over_the_lengths(encoder):
    rows = as_rows(ROWS[:8])
    features, labels = features_of(encoder.eval(), rows)
    width = encoder.get_embedding_dimension()
    loss = RankingLoss(encoder, 0.05, dimensions=[8, 4])([features], labels)
    each = [expected_loss(encoder, rows, width=w) for w in (width, 8, 4)]
    torch.testing.assert_close(loss, torch.stack(each).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dimensions", [(), (8,)], ids=["plain", "matryoshka"])
def test_b41_gradcache_has_the_gradient_of_the_large_batch(encoder, dimensions):
    """GradCache in forward passes of 200 tokens has the gradient of one pass over all 256 rows."""
    rows = [
        {
            "query": f"query {i} {i * 7}",
            "positive": f"text {i} " * (1 + i % 9),
            "negative": f"no {i}",
        }
        for i in range(256)
    ]
    features, labels = features_of(encoder.train(), as_rows(rows))
    seen, found = [], {}
    encoder[1].register_forward_hook(lambda _, args, out: seen.append(len(args[0]["input_ids"])))
    for limit in (None, 200):
        encoder.zero_grad()
        loss = RankingLoss(encoder, 0.05, limit, dimensions=dimensions)([features], labels)
        loss.backward()
        found[limit] = (loss.detach(), gradients(encoder))
    assert seen[0] == 768
    assert len(seen) > 20
    assert max(seen[1:]) < 100
    torch.testing.assert_close(found[200][0], found[None][0], atol=1e-5, rtol=1e-5)
    for name, gradient in found[None][1].items():
        torch.testing.assert_close(found[200][1][name], gradient, atol=1e-5, rtol=1e-4)


class Kept:
    """Counts the bytes that autograd keeps for the backward pass, and their highest sum."""

    now = highest = 0

    def __init__(self, tensor):
        self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
        Kept.now += self.bytes
        Kept.highest = max(Kept.highest, Kept.now)

    def __del__(self):
        Kept.now -= self.bytes


def highest_memory(model, rows, limit):
    features, labels = features_of(model, rows)
    model.zero_grad()
    Kept.now = Kept.highest = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        RankingLoss(model, 0.05, limit)([features], labels).backward()
    return Kept.highest, int(features["attention_mask"].sum())


def test_b41_a_batch_of_1024_fits_where_32_rows_do(encoder):
    rows = as_rows(
        [
            {"query": f"q {i % 97} {i}", "positive": f"text {i} " * 4, "negative": f"no {i} " * 3}
            for i in range(1024)
        ]
    )
    small, tokens = highest_memory(encoder.train(), rows[:32], None)
    large, all_tokens = highest_memory(encoder, rows, tokens)
    whole, _ = highest_memory(encoder, rows[:256], None)
    assert all_tokens > 30 * tokens
    assert whole > 6 * small  # what it would take: 32 times as much for all 1024
    scores = 1024 * 2048 * 4  # of all queries and documents, which no model's size changes
    assert large < small + 2 * scores


def test_b41_gradcache_repeats_the_dropout_of_the_first_pass(tiny_decoder):
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu").train()
    model.backbone.auto_model = adapters.attach(model.backbone.auto_model, dropout=0.5)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    captured = []
    model[1].register_forward_hook(
        lambda _, args, out: captured.append(out["sentence_embedding"].detach())
    )
    features, labels = features_of(model, as_rows(ROWS[:16]))
    RankingLoss(model, 0.05, 100)([features], labels).backward()
    half = len(captured) // 2
    assert half > 2
    torch.testing.assert_close(torch.cat(captured[:half]), torch.cat(captured[half:]))


# --- two devices ------------------------------------------------------------------------------


def some_without_negatives(rows, count):
    return [row | {"negatives": []} if i < count else row for i, row in enumerate(as_rows(rows))]


def on_one_of_two(rank, folder, limit, without, port):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    model = build(folder)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    rows = some_without_negatives(ROWS[:16], without)
    features, labels = features_of(model, rows[rank * 8 : rank * 8 + 8])
    RankingLoss(ddp, 0.05, limit)([features], labels).backward()
    torch.save(gradients(model), f"{folder}/rank-{rank}.pt")
    del ddp  # it would end the group while it holds the GIL, which gloo's threads wait for
    torch.distributed.destroy_process_group()


def build(folder):
    torch.manual_seed(0)
    model = LLM2Vec.from_pretrained(f"{folder}/model", device="cpu").eval()
    peft_model = adapters.attach(model.backbone.auto_model, rank=4, dropout=0.0)
    for name, weight in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.backbone.auto_model = peft_model
    return model


@pytest.mark.parametrize(
    ("limit", "without"), [(None, 0), (60, 0), (None, 8)], ids=["at_once", "cached", "uneven"]
)
def test_b37_b38_two_devices_have_the_gradient_of_one_with_all(
    tiny_decoder, tmp_path, limit, without
):
    """Two devices have the gradient of one, also where the second alone has negatives."""
    import shutil
    import socket

    shutil.copytree(tiny_decoder, tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(on_one_of_two, (str(tmp_path), limit, without, port), nprocs=2)
    model = build(tmp_path)
    features, labels = features_of(model, some_without_negatives(ROWS[:16], without))
    RankingLoss(model, 0.05)([features], labels).backward()
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    for name, gradient in gradients(model).items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], gradient, atol=1e-5, rtol=1e-4)


# --- runs -------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tiny_decoder, tmp_path):
    first, second = (write(tmp_path / f"{n}.jsonl", ROWS[i:]) for i, n in enumerate("ab"))
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"base": str(tiny_decoder), "max_length": 64},
            "supervised": {
                "data": [{"path": str(first), "instruction": "Find:"}, str(second)],
                "steps": 6, "warmup_steps": 1, "batch_size": 8, "max_length": 32, "held_out": 6,
                "log_steps": 1, "eval_steps": 3, "save_steps": 2, "lora": {"rank": 4},
                "learning_rate": 1e-3,
            },
        }
    )  # fmt: skip


def test_a_supervised_run_learns_and_saves(recipe, tmp_path):
    before = LLM2Vec.from_pretrained(recipe.model.base, device="cpu").encode(["question 3"])
    encoder = Run(recipe, tmp_path / "run").run()
    assert not np.allclose(before, encoder.encode(["question 3"]), atol=1e-3)
    saved = LLM2Vec.from_pretrained(tmp_path / "run" / "model", device="cpu")
    assert np.allclose(saved.encode(["question 3"]), encoder.encode(["question 3"]), atol=1e-5)
    rows = [json.loads(x) for x in (tmp_path / "run/supervised/metrics.jsonl").open()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run" / "supervised" / "rows.arrow").exists()
    card = (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert "- **Training Data:** \n    - a.jsonl\n    - b.jsonl\n" in card


def test_b39_held_out_rows_are_measured_and_so_is_the_space(recipe, tmp_path):
    Run(recipe, tmp_path / "run").run()
    rows = [json.loads(x) for x in (tmp_path / "run/supervised/metrics.jsonl").open()]
    measured = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in measured] == [0, 3, 6]
    assert all(np.isfinite(row["eval_loss"]) for row in measured)
    assert measured[-1]["eval_loss"] < measured[0]["eval_loss"]
    trained = [row for row in rows if "loss" in row]
    assert all(0 < row["alignment"] < 4 and row["uniformity"] < 0 for row in trained)


def test_nothing_is_written_before_all_rows_are_read(recipe, tmp_path):
    bad = write(tmp_path / "bad.jsonl", [{"query": "a"}])
    section = recipe.supervised.model_copy(update={"data": [Pairs(path=str(bad))]})
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1"):
        Run(recipe.model_copy(update={"supervised": section}), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def weights(folder):
    found = [f for f in folder.glob("*model.safetensors")]
    assert len(found) == 1
    return load_file(found[0])


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_b29_every_method_resumes_to_the_same_weights(recipe, tmp_path, method):
    lora = Lora(method=method, **{} if method == "full" else {"rank": recipe.supervised.lora.rank})
    stage = recipe.supervised.model_copy(update={"lora": lora, "learning_rate": 1e-4})
    recipe = recipe.model_copy(update={"supervised": stage})
    encoder = Run(recipe, tmp_path / "whole").run()

    def interrupt(step, steps, measured):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Run(recipe, tmp_path / "broken", None, Listener(step=interrupt)).run()
    Run(recipe, tmp_path / "broken").run()
    whole, broken = (weights(tmp_path / f / "supervised") for f in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert any("magnitude" in key for key in whole) == (method == "dora")
    assert any("embed_tokens" in key for key in whole) == (method == "full")
    saved = LLM2Vec.from_pretrained(tmp_path / "broken" / "model", device="cpu")
    assert np.allclose(saved.encode(["question 3"]), encoder.encode(["question 3"]), atol=1e-5)


def test_a_stage_after_full_training_starts_from_it(recipe, tmp_path):
    lora = {"method": "full"}
    text = tmp_path / "t.txt"
    text.write_text("\n".join(r["positive"] + str(i) for i, r in enumerate(ROWS)), encoding="utf-8")
    stage = {"data": [str(text)], "steps": 2, "batch_size": 8, "max_length": 16, "held_out": 0}
    full = Recipe.model_validate(recipe.model_dump() | {"simcse": {**stage, "lora": lora}})
    scored = []

    class Result:
        name = "probe"

        def __init__(self, model):
            self.items = {}
            scored.append(model.encode(["question 3"]))
            self.scores = {"x": 0.0}

    Run(full, tmp_path / "run", lambda model: [Result(model)]).run()
    assert len(scored) == 6
    assert np.abs(scored[4] - scored[3]).max() > 1e-4  # SimCSE, all weights
    assert np.abs(scored[5] - scored[4]).max() > 1e-4  # and the adapter on them
    alone = LLM2Vec.from_pretrained(tmp_path / "run" / "simcse", device="cpu")
    assert np.allclose(alone.encode(["question 3"]), scored[4], atol=1e-5)


def test_b43_an_adapter_is_merged_or_trained_on(recipe, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("\n".join(r["positive"] + str(i) for i, r in enumerate(ROWS)), encoding="utf-8")
    simcse = {"data": [str(text)], "steps": 2, "batch_size": 8, "max_length": 16, "held_out": 0}
    given = recipe.model_dump() | {"simcse": {**simcse, "lora": {"rank": 4}}}
    given["supervised"] |= {"learning_rate": 1e-12, "warmup_steps": 0}
    given["supervised"]["lora"]["start"] = "continue"
    Run(Recipe.model_validate(given), tmp_path / "run").run()
    first, second = (weights(tmp_path / "run" / name) for name in ("simcse", "supervised"))
    for key in first:
        torch.testing.assert_close(first[key], second[key], atol=1e-6, rtol=0)
    model = LLM2Vec.from_pretrained(tmp_path / "run" / "model", device="cpu")
    once = LLM2Vec.from_pretrained(recipe.model.base, tmp_path / "run" / "simcse", device="cpu")
    assert np.allclose(model.encode(["a text"]), once.encode(["a text"]), atol=1e-4)
    given["supervised"]["lora"]["rank"] = 8
    with pytest.raises(ValueError, match="has other settings"):
        Recipe.model_validate(given)


def test_b33_the_instruction_is_saved_as_the_prompt_of_queries(recipe, tmp_path):
    section = recipe.supervised.model_copy(update={"data": recipe.supervised.data[:1]})
    encoder = Run(recipe.model_copy(update={"supervised": section}), tmp_path / "run").run()
    saved = LLM2Vec.from_pretrained(tmp_path / "run" / "model", device="cpu")
    for model in (encoder, saved):
        assert model.prompts["query"] == model.prompts["a"] == PLAIN.join("Find:")
        asked = model.encode_query(["question 3"])
        assert np.allclose(asked, model.encode([["Find:", "question 3"]]), atol=1e-5)


@pytest.mark.parametrize("other", ["Find:", "Find another:", ""])
def test_b33_an_instruction_that_all_rows_have_is_saved_as_well(recipe, tmp_path, other, caplog):
    """As in the rows that `mine` has written: encoding must not leave out what training gave."""
    rows = [{**row, "instruction": "Find:"} for row in ROWS]
    rows[-1]["instruction"] = other
    data = [Pairs(path=str(write(tmp_path / "own.jsonl", rows)))]
    section = recipe.supervised.model_copy(update={"data": data, "steps": 1})
    encoder = Run(recipe.model_copy(update={"supervised": section}), tmp_path / "run").run()
    expected = PLAIN.join("Find:") if other == "Find:" else None
    assert (encoder.prompts["query"] or None) == encoder.prompts.get("own") == expected
    said = [r.getMessage() for r in caplog.records if "saved as a prompt" in r.getMessage()]
    if other == "Find:":
        assert said == []
        return
    (line,) = said  # of the queries; no document has one
    several = (
        "2 different instructions" if other else "an instruction in some rows and none in others"
    )
    assert (
        f"the queries of {tmp_path / 'own.jsonl'} have {several}, so none of these is saved" in line
    )


@pytest.mark.parametrize("of_rows", [False, True])
def test_an_instruction_without_room_for_a_text_is_refused_before_any_stage(
    recipe, tmp_path, of_rows
):
    told = {"instruction": "Find a passage that answers the question: " * 9}
    path = write(tmp_path / "own.jsonl", [{**row, **(told if of_rows else {})} for row in ROWS])
    data = [Pairs(path=str(path), **({} if of_rows else told))]
    stage = recipe.supervised.model_copy(update={"data": data})
    with pytest.raises(DataError, match="which leaves no room for the text. Fix"):
        Run(recipe.model_copy(update={"supervised": stage}), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("longest", [256, 257])
def test_texts_that_stretch_the_positions_of_their_batch_are_warned_of(
    longrope_decoder, recipe, tmp_path, caplog, longest
):
    model = recipe.model.model_copy(update={"base": str(longrope_decoder)})
    stage = recipe.supervised.model_copy(update={"max_length": longest, "steps": 1})
    changed = recipe.model_copy(update={"model": model, "supervised": stage})
    check_inputs(changed, tmp_path / "run", LLM2Vec.from_pretrained(longrope_decoder), print)
    said = [r.getMessage() for r in caplog.records if "LongRoPE" in r.getMessage()]
    assert len(said) == (longest > 256)
    assert all("Fix: supervised.max_length=256, or less." in line for line in said)


def test_qlora_needs_bitsandbytes_and_says_so(encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[qlora\]"):
        adapters.attach(encoder.backbone.auto_model.get_base_model(), method="qlora")


def test_qlora_trains_an_adapter_over_four_bits(recipe, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    lora = recipe.supervised.lora.model_copy(update={"method": "qlora"})
    stage = recipe.supervised.model_copy(update={"lora": lora})
    Run(recipe.model_copy(update={"supervised": stage}), tmp_path / "run").run()
    trained = weights(tmp_path / "run" / "supervised")
    assert all("lora_" in key for key in trained)
    assert any(value.abs().max() > 0 for key, value in trained.items() if "lora_B" in key)


# --- mining -----------------------------------------------------------------------------------


def test_mined_negatives_are_near_but_no_positive_and_not_nearer_than_it(encoder, tmp_path):
    rows = [*ROWS[:20], {**ROWS[3], "positive": "another answer to three"}]
    rows = [{"query": row["query"], "positive": row["positive"]} for row in rows]
    pairs = Pairs(path=str(write(tmp_path / "a.jsonl", rows)))
    mined = mine(encoder, pairs, tmp_path / "b.jsonl", negatives=3, margin=0.01, corpus=["x y z"])
    found = list(read_rows(Pairs(path=str(tmp_path / "b.jsonl"))))
    assert [(r.query, r.positive) for r in found] == [(r["query"], r["positive"]) for r in rows]
    assert mined[:3] == (
        21,
        sum(len(r.negatives) for r in found),
        sum(not r.negatives for r in found),
    )
    assert mined.negatives > 10
    answers = {q: {r.positive for r in found if r.query == q} for q in {r.query for r in found}}
    for row in found:
        assert not set(row.negatives) & answers[row.query]
        if row.negatives:
            query, positive, *others = encoder.encode([row.query, row.positive, *row.negatives])
            scores = encoder.similarity(query, np.stack([positive, *others]))[0]
            assert (scores[1:] <= scores[0] * 0.99 + 1e-5).all()


def test_b40_an_answer_is_mined_for_no_row_of_its_query(encoder, tmp_path):
    rows = [
        {"query": "q1", "positive": "p1", "negatives": ["p2", "q1", "n1"]},
        {"query": "q1", "positive": "p2", "negatives": ["n2"], "prompt": "Find: "},
        {"query": "q3", "positive": "p3", "negatives": ["p1", "p2"]},
    ]
    said: list[str] = []
    pairs = Pairs(path=str(write(tmp_path / "a.jsonl", rows)))
    mined = mine(encoder, pairs, tmp_path / "b.jsonl", negatives=3, margin=0, tell=said.append)
    found = list(read_rows(Pairs(path=str(tmp_path / "b.jsonl"))))
    for row in found:
        answers = {r.positive for r in found if r.query == row.query}
        assert not {row.query, *answers} & {*row.negatives}
    assert "n1" in found[0].negatives and {"p1", "p2"} <= {*found[2].negatives}
    assert [row.query_instruction for row in found] == ["", "Find: ", ""]
    assert mined.answers >= 2 and "the search does not use them" in said[1]


def test_too_few_documents_to_mine_are_named(encoder, tmp_path):
    pairs = Pairs(path=str(write(tmp_path / "a.jsonl", ROWS[:3])))
    with pytest.raises(DataError, match="3 distinct documents"):
        mine(encoder, pairs, tmp_path / "b.jsonl", skip=2)
