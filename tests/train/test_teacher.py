"""A teacher in the supervised stage: what is read, what is learned, and that resuming is exact."""

from __future__ import annotations

import json
import re
import shutil
import socket

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import multiprocessing
from torch.nn.functional import kl_div, normalize

from unmasked import LLM2Vec
from unmasked.errors import DataError, RecipeError
from unmasked.files.writing import write_text
from unmasked.recipe.schema import Pairs, Recipe, Supervised
from unmasked.recipe.teaching import Teacher
from unmasked.train.callback import Listener, StageCallback
from unmasked.train.data import taught as taught_vectors
from unmasked.train.data.mixing import PairCollator, inputs_of
from unmasked.train.data.pairs import read_rows, store_rows
from unmasked.train.data.taught import TeacherVectors, compute_vectors, projection, taught
from unmasked.train.losses.depth import depths
from unmasked.train.losses.supervised import RankingLoss
from unmasked.train.losses.teacher import TeacherLoss
from unmasked.train.run import Run

WIDTH = 32
ROWS = [
    {"query": f"question {i}", "positive": f"answer {i} " * (1 + i % 3), "negative": f"other {i}"}
    for i in range(24)
]
MARGIN = Teacher(loss="margin_mse")
ORDER = Teacher(loss="cosent", contrastive=0)


@pytest.fixture
def read(tmp_path):
    """The rows of a file that is made of the given ones."""

    def made(rows, taught, **settings):
        path = tmp_path / "a.jsonl"
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return list(read_rows(Pairs(path=str(path), **settings), teacher=taught))

    return made


def vectors_of(count, width=WIDTH):
    return np.random.default_rng(0).normal(size=(count, width)).round(3).tolist()


# --- what the rows say ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "scores"),
    [
        ({"score": 2.5}, [2.5, 0.0]),  # the margin of a triplet
        ({"score": "2.5"}, [2.5, 0.0]),  # as .csv has it
        ({"scores": [3, 1]}, [3.0, 1.0]),
        ({"scores": "[3, 1]"}, [3.0, 1.0]),
        ({"pos_scores": [3], "neg_scores": [1]}, [3.0, 1.0]),
    ],
)
def test_scores_are_read_where_a_teacher_asks_for_them(read, told, scores):
    rows = [{**row, **told} for row in ROWS[:2]]
    assert [row.scores for row in read(rows, MARGIN)] == [scores] * 2
    assert [row.scores for row in read(rows, None)] == [[]] * 2


def test_graded_pairs_are_read_by_a_teacher_and_refused_without(read):
    rows = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": i / 4} for i in range(4)]
    assert [row.scores for row in read(rows, ORDER)] == [[0.0], [0.25], [0.5], [0.75]]
    with pytest.raises(DataError, match=r"Fix: learn the scores \(supervised.teacher.loss=cosent"):
        read(rows, None)
    with pytest.raises(DataError, match="'label' says which pairs match, and 'score' how much"):
        read([{**row, "label": 1} for row in rows], ORDER)


def test_every_positive_of_a_row_has_its_own_score(read):
    row = {"query": "q", "pos": ["p1", "p2"], "neg": ["n"], "scores": [5, 4, 1]}
    found = read([row, row], MARGIN)
    assert [(r.positive, r.scores) for r in found[:2]] == [("p1", [5, 1]), ("p2", [4, 1])]
    taught = Teacher(loss="mse")
    row |= {"vectors": vectors_of(4, 2)}
    query, first, second, negative = (np.float64(v).tolist() for v in row["vectors"])
    assert [r.vectors for r in read([row, row], taught)[:2]] == [
        [query, first, negative],
        [query, second, negative],
    ]


@pytest.mark.parametrize(
    ("told", "teacher", "said"),
    [
        ({"scores": [1.0]}, MARGIN, "'scores' has 1 numbers, and the row has 2 documents"),
        ({"scores": [1.0, None]}, MARGIN, "'scores' holds None. Fix: give finite numbers"),
        ({"scores": [1.0, True]}, MARGIN, "'scores' holds True"),
        ({"score": "high"}, MARGIN, "'score' is 'high'"),
        ({"pos_scores": [1], "neg_scores": []}, MARGIN, "'neg_scores' has 0 numbers"),
        ({"score": 0.5}, ORDER, "'score' has 1 numbers, and the row has 2 documents"),
        ({}, MARGIN, "no column 'scores', which supervised.teacher reads"),
        ({"score": 1, "scores": [1, 2]}, MARGIN, "'scores' and 'score' could both be the teacher"),
        ({"vectors": [[1.0], [2.0]]}, Teacher(), "'vectors' has 2 vectors of 1 numbers"),
        ({"vectors": [[1.0], [2.0], [3.0, 4.0]]}, Teacher(), "3 vectors of 1, 2 numbers"),
        ({"vectors": [1.0, 2.0]}, Teacher(), "'vectors' is a list. Fix: give a list of vectors"),
    ],
)
def test_what_is_not_one_for_each_text_is_refused_with_its_line(read, told, teacher, said):
    with pytest.raises(DataError, match="line 1") as error:
        read([{**row, **told} for row in ROWS[:2]], teacher)
    assert said in str(error.value)
    assert "Fix: " in str(error.value)


def test_a_column_of_scores_may_have_a_name_of_its_own(read):
    rows = [{**row, "ce": [2, 1], "score": 7} for row in ROWS[:2]]
    assert read(rows, MARGIN, teacher="ce")[0].scores == [2, 1]
    with pytest.raises(DataError, match="no column 'ces' among .*:teacher=ce in place of"):
        read(rows, MARGIN, teacher="ces")


def test_scores_of_a_pair_without_negatives_teach_no_margin(read):
    rows = [{"query": "q", "positive": f"p{i}", "scores": [1]} for i in range(2)]
    with pytest.raises(
        DataError, match="a row without negatives, from which the loss margin_mse learns"
    ):
        read(rows, MARGIN)


# --- the losses -------------------------------------------------------------------------------


@pytest.fixture
def student(tiny_decoder):
    return LLM2Vec.from_pretrained(tiny_decoder, device="cpu")


def batch_of(student, rows, taught, hard_negatives=2):
    batch = PairCollator(student.preprocess, [Pairs(path="x")], hard_negatives, 64, taught)(rows)
    features = {k.removeprefix("text_"): v for k, v in batch.items() if k != "label"}
    return features, batch["label"]


def as_rows(rows, **told):
    given = [
        {"query": r["query"], "positive": r["positive"], "negatives": [r["negative"]], "number": n}
        for n, r in enumerate(rows)
    ]
    return [
        {**row, "source": 0, **{k: v[i] for k, v in told.items()}} for i, row in enumerate(given)
    ]


def taught_loss(student, teacher, rows, taught, **limits):
    """The loss without the contrastive part, and the student's vectors by the collator's order."""
    alone = teacher.model_copy(update={"contrastive": 0.0})
    loss = RankingLoss(student, **limits, teacher=TeacherLoss(student, alone))
    features, labels = batch_of(student, rows, taught)
    found = loss([dict(features)], labels)
    inputs = [i.text for i in inputs_of([Pairs(path="x")], rows, 2)]
    vectors = torch.from_numpy(student.encode(inputs))
    return found, [normalize(part, dim=1) for part in vectors.split(len(rows))], vectors


def test_each_loss_of_scores_is_its_formula(student):
    scores = [[0.9 - i / 10, 0.1 * i] for i in range(6)]
    rows, told = as_rows(ROWS[:6], scores=scores), torch.tensor(scores)
    found, (q, p, n), _ = taught_loss(
        student, Teacher(loss="margin_mse", scale=2), rows, taught_vectors.scores_of_rows
    )
    margins = (q * p).sum(1) - (q * n).sum(1)
    wanted = ((margins - (told[:, 0] - told[:, 1]) / 2) ** 2).mean()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)

    found, _, _ = taught_loss(student, Teacher(loss="kl"), rows, taught_vectors.scores_of_rows)
    ours = torch.stack([(q * p).sum(1), (q * n).sum(1)], dim=1) / 0.05
    wanted = kl_div(ours.log_softmax(1), (told / 0.05).softmax(1), reduction="batchmean")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    teacher = Teacher(loss="cosent", contrastive=0)
    found, _, _ = taught_loss(student, teacher, rows, taught_vectors.scores_of_rows)
    pairs, order = torch.cat([(q * p).sum(1), (q * n).sum(1)]), told.T.flatten()
    worse = [
        20 * (pairs[i] - pairs[j]) for i in range(12) for j in range(12) if order[i] < order[j]
    ]
    wanted = torch.logsumexp(torch.stack([torch.zeros(()), *worse]), dim=0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_each_loss_of_vectors_is_its_formula(student):
    told = [vectors_of(3) for _ in range(6)]
    rows = as_rows(ROWS[:6], vectors=told)
    for name in ("mse", "cosine"):
        found, _, ours = taught_loss(
            student, Teacher(loss=name), rows, taught_vectors.vectors_of_rows
        )
        theirs = torch.tensor(told).transpose(0, 1).flatten(0, 1)
        wanted = ((ours - theirs) ** 2).mean()
        if name == "cosine":
            wanted = 1 - torch.cosine_similarity(ours, theirs).mean()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["kl", "margin_mse", "cosent"])
def test_a_model_teaches_how_near_queries_are_to_all_documents_of_the_batch(student, loss):
    theirs = torch.tensor(vectors_of(18, 8))
    teacher = Teacher(model="x", loss=loss, contrastive=0)
    rows = as_rows(ROWS[:6])
    found, (q, p, n), _ = taught_loss(student, teacher, rows, lambda *_: theirs)
    unit = normalize(theirs, dim=1)
    ours, told = q @ torch.cat([p, n]).T, unit[:6] @ unit[6:].T
    if loss == "kl":
        shares = (told / 0.05).softmax(1)
        wanted = kl_div((ours / 0.05).log_softmax(1), shares, reduction="batchmean")
    elif loss == "margin_mse":
        wanted = (((ours.diag()[:, None] - ours) - (told.diag()[:, None] - told)) ** 2).mean()
    else:
        pairs = torch.cat([ours.diag(), ours[:, 6:].diag()])
        order = torch.cat([told.diag(), told[:, 6:].diag()])
        worse = [
            20 * (pairs[i] - pairs[j]) for i in range(12) for j in range(12) if order[i] < order[j]
        ]
        wanted = torch.logsumexp(torch.stack([torch.zeros(()), *worse]), dim=0)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("of_model", [False, True], ids=["rows", "model"])
@pytest.mark.parametrize("name", ["kl", "margin_mse", "cosent", "cosine", "mse"])
def test_a_positive_in_the_place_of_a_missing_negative_counts_nowhere(student, name, of_model):
    counts = (2, 0, 1, 2)  # negatives
    rows = [
        {**row, "negatives": [f"other {n} of {i}" for n in range(count)]}
        for i, (row, count) in enumerate(zip(as_rows(ROWS[:4]), counts, strict=True))
    ]
    texts = [[r["query"], r["positive"], *r["negatives"]] for r in rows]
    told = [torch.tensor(vectors_of(4, 8))[: len(of_row)] for of_row in texts]
    ours = [torch.from_numpy(student.encode(of_row)) for of_row in texts]
    if of_model:
        teacher = Teacher(model="x", loss=name, contrastive=0)
        known = {t: v for row in zip(texts, told, strict=True) for t, v in zip(*row, strict=True)}

        def source(rows, inputs):
            return torch.stack([known[item.text] for item in inputs])
    elif name in ("cosine", "mse"):
        rows = [row | {"vectors": of_row.tolist()} for row, of_row in zip(rows, told, strict=True)]
        teacher, source = Teacher(loss=name), taught_vectors.vectors_of_rows
    else:
        rows = [row | {"scores": v[1:, 0].tolist()} for row, v in zip(rows, told, strict=True)]
        teacher, source = Teacher(loss=name, contrastive=0), taught_vectors.scores_of_rows
    found, _, _ = taught_loss(student, teacher, rows, source)

    if name in ("cosine", "mse"):
        a, b = torch.cat(ours)[:, :8], torch.cat(told)
        wanted = (
            ((a - b) ** 2).mean() if name == "mse" else 1 - torch.cosine_similarity(a, b).mean()
        )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        return
    whole = of_model and name != "cosent"
    parts = []  # of each row: the student's and the teacher's scores, the positive's first
    for row in range(4):
        others = [i for i in range(4) if i != row] if whole else []
        a, b = (
            normalize(torch.cat([side[row], *(side[i][1:] for i in others)]), dim=1)
            for side in (ours, told)
        )
        theirs = b[0] @ b[1:].T if of_model else told[row][1:, 0]
        parts.append((a[0] @ a[1:].T, theirs))
    if name == "kl":
        each = [
            kl_div((a / 0.05).log_softmax(0), (b / 0.05).softmax(0), reduction="sum")
            for a, b in parts
        ]
        wanted = torch.stack(each).mean()
    elif name == "margin_mse":
        first = 0 if whole else 1  # of a whole batch the positive's own margin, 0, counts, too
        each = [((a[0] - a) - (b[0] - b))[first:] ** 2 for a, b in parts]
        wanted = torch.cat(each).mean()
    else:
        a, b = (torch.cat(side) for side in zip(*parts, strict=True))
        worse = (20 * (a[:, None] - a))[b[:, None] < b]
        wanted = torch.logsumexp(torch.cat([torch.zeros(1), worse]), dim=0)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn(student):
    rows = as_rows(ROWS[:6])
    inputs = [i.text for i in inputs_of([Pairs(path="x")], rows, 2)]
    own = torch.from_numpy(student.encode(inputs))
    for loss in ("cosine", "mse", "kl", "margin_mse"):
        found, _, _ = taught_loss(student, Teacher(model="x", loss=loss), rows, lambda *_: own)
        assert float(found.detach()) < 1e-5, loss


def test_gradient_caching_gives_the_gradient_of_the_whole_batch(student):
    told = [vectors_of(3) for _ in range(8)]
    rows = as_rows(ROWS[:8], vectors=told)
    found = []
    for limit in (None, 40):
        student.zero_grad()
        loss = RankingLoss(
            student, mini_batch_tokens=limit, teacher=TeacherLoss(student, Teacher(weight=0.5))
        )
        features, labels = batch_of(student, rows, taught_vectors.vectors_of_rows)
        loss([dict(features)], labels).backward()
        assert loss.measured.keys() >= {"contrastive_loss", "teacher_loss"}
        found.append(
            {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        )
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-3, atol=1e-5)


def test_rows_with_fewer_negatives_show_their_positive_again():
    rows = [
        {"scores": [3, 2, 1], "vectors": [[0], [1], [2]]},
        {"scores": [5], "vectors": [[6], [7]]},
    ]
    assert taught_vectors.scores_of_rows(rows, [None] * 6).tolist() == [[3, 2], [5, 5]]
    assert taught_vectors.vectors_of_rows(rows, [None] * 6).flatten().tolist() == [0, 6, 1, 7, 2, 7]


# --- two devices ------------------------------------------------------------------------------


def known_vectors(rows, inputs):
    """Vectors of a teacher that has always the same one for a text."""
    made = [np.random.default_rng(list(i.text.encode())).normal(size=8) for i in inputs]
    return torch.tensor(np.array(made), dtype=torch.float32)


def gradients_of(student, model, rows):
    """At two depths: for losses on the scores of the batch, on vectors, on scores of the rows."""
    found = {}
    told = {"scores": taught_vectors.scores_of_rows, None: known_vectors}
    for teacher in (
        Teacher(model="x", loss="kl", weight=2),
        Teacher(model="x", loss="mse"),
        Teacher(loss="margin_mse"),
    ):
        student.zero_grad()
        loss = TeacherLoss(student, teacher)
        features, labels = batch_of(student, rows, told[teacher.wants])
        with depths(student, [1]):
            RankingLoss(model, depths=2, teacher=loss)([features], labels).backward()
        found |= {
            f"{teacher.loss} {n}": p.grad.clone()
            for n, p in student.named_parameters()
            if p.grad is not None
        }
    return found


def rows_of_both():
    scores = [[0.1 * i, 0.5][: 1 + (i > 3)] for i in range(8)]
    rows = as_rows(ROWS[:8], scores=scores)
    return [r | {"negatives": r["negatives"] * (i > 3)} for i, r in enumerate(rows)]


def on_one_of_two(rank, base, folder, port):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    student = LLM2Vec.from_pretrained(base, device="cpu").eval()
    ddp = torch.nn.parallel.DistributedDataParallel(student)
    found = gradients_of(student, ddp, rows_of_both()[rank * 4 : rank * 4 + 4])
    torch.save(found, f"{folder}/rank-{rank}.pt")
    del ddp  # it would end the group while it holds the GIL, which gloo's threads wait for
    torch.distributed.destroy_process_group()


def test_two_devices_learn_from_a_teacher_what_one_with_all_rows_does(tiny_decoder, tmp_path):
    """At two depths, and where the second device alone has negatives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(on_one_of_two, (str(tiny_decoder), str(tmp_path), port), nprocs=2)
    student = LLM2Vec.from_pretrained(tiny_decoder, device="cpu").eval()
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    for name, gradient in gradients_of(student, student, rows_of_both()).items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], gradient, atol=1e-5, rtol=1e-3)


# --- a model as the teacher -------------------------------------------------------------------


def stage_of(tmp_path, teacher, **settings):
    path = tmp_path / "pairs.jsonl"
    if not path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in ROWS))
    return Supervised(data=[Pairs(path=str(path))], teacher=teacher, **settings)


def test_vectors_are_computed_once_and_continue_behind_the_last_whole_part(
    tiny_decoder, tmp_path, monkeypatch
):
    monkeypatch.setattr(taught_vectors, "_CHUNK", 20)
    teacher = Teacher(model=str(tiny_decoder))
    stage, folder = stage_of(tmp_path, teacher), tmp_path / "teacher"
    compute_vectors(stage, folder, WIDTH, lambda said: None)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert len(before) == 2 * 4 + 1  # 72 texts, in parts of 20
    (folder / "vectors-000002.npy").unlink()
    encoded = []
    plain = taught_vectors._encode
    monkeypatch.setattr(
        taught_vectors,
        "_encode",
        lambda model, given: encoded.append(len(given)) or plain(model, given),
    )
    compute_vectors(stage, folder, WIDTH, lambda said: None)
    assert encoded == [20]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    monkeypatch.setattr(taught_vectors, "_load_teacher", None)  # what is whole needs no teacher
    compute_vectors(stage, folder, WIDTH, lambda said: None)
    rows = as_rows(ROWS[3:6])
    inputs = inputs_of(stage.data, rows, 1)
    found = TeacherVectors(folder, WIDTH, teacher)(rows, inputs)
    alone = LLM2Vec.from_pretrained(tiny_decoder, device="cpu").encode([i.text for i in inputs])
    np.testing.assert_allclose(found.numpy(), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stock", [False, True], ids=["own", "stock"])
@pytest.mark.parametrize("pooling", [False, True], ids=["weights", "pooling"])
@pytest.mark.parametrize("whole", [False, True], ids=["cut off", "whole"])
def test_vectors_of_a_teacher_that_changed_are_all_computed_anew(
    tiny_decoder, tmp_path, monkeypatch, stock, pooling, whole
):
    monkeypatch.setattr(taught_vectors, "_CHUNK", 20)
    encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    teacher = Teacher(model=str(tmp_path / "better"))
    stage, folder = stage_of(tmp_path, teacher), tmp_path / "teacher"

    def computed(model):
        model.save(tmp_path / "better")
        if stock:
            (tmp_path / "better" / "llm2vec_config.json").unlink()
        compute_vectors(stage, folder, WIDTH, lambda said: None)
        assert len(list(folder.glob("vectors-*.npy"))) == 4
        return np.load(folder / "vectors-000000.npy")

    before = computed(encoder)
    if not whole:
        (folder / "vectors-000002.npy").unlink()
    if pooling:
        other = LLM2Vec.from_pretrained(tiny_decoder, pooling_mode="last_token", device="cpu")
        assert np.abs(computed(other) - before).mean() > 0.1
        return
    with torch.no_grad():
        encoder.backbone.auto_model.norm.weight.mul_(2)
    np.testing.assert_allclose(computed(encoder), 2 * before, rtol=1e-4)


def test_a_column_that_nothing_reads_is_refused(tiny_decoder, tmp_path):
    stage = stage_of(tmp_path, None)
    stage = stage.model_copy(update={"data": [stage.data[0].model_copy(update={"teacher": "ce"})]})
    with pytest.raises(RecipeError, match="names 'ce' as the column of a teacher, but nothing"):
        Run(recipe_of(tiny_decoder, stage), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given", [{"false_negative_margin": 0.1}, {"matryoshka": [8]}, {"matryoshka_layers": [1]}]
)
def test_what_only_the_contrastive_loss_reads_is_refused_without_it(tiny_decoder, tmp_path, given):
    stage = stage_of(tmp_path, Teacher(model=str(tiny_decoder), contrastive=0), **given)
    (name, value), *_ = given.items()
    said = re.escape(f"leaves out the loss that reads {name} {value}. Fix: leave that out, or")
    with pytest.raises(RecipeError, match=said):
        Run(recipe_of(tiny_decoder, stage), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("told", "settings", "said"),
    [
        ({"scores": [2, 1]}, {"hard_negatives": 0}, "supervised.hard_negatives 0 leaves one"),
        ({"scores": [2, 1, 0]}, {}, "'scores' has 3 numbers, and the row has 2 documents"),
    ],
)
def test_scores_that_teach_nothing_leave_nothing_behind(
    tiny_decoder, tmp_path, told, settings, said
):
    rows = [{**row, **told} for row in ROWS]
    write_text(tmp_path / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(tiny_decoder, stage_of(tmp_path, Teacher(loss="kl"), **settings))
    with pytest.raises((RecipeError, DataError), match=said):
        Run(recipe, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_settings_that_learn_nothing_or_two_things_at_once_are_refused():
    for given, said in (
        ({"weight": 0, "contrastive": 0}, "both 0"),
        ({"loss": "cosent"}, "Fix: contrastive: 0"),
    ):
        with pytest.raises(ValueError, match=said):
            Teacher(**given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"loss": "mse", "temperature": 0.02},
            r"temperature 0\.02 has no effect on the loss mse\.",
        ),
        ({"loss": "kl", "model": "x", "scale": 2}, r"scale 2\.0 .* on the loss kl of a model\."),
        ({"loss": "kl", "projection": "pca"}, "projection pca has no effect on the loss kl"),
    ],
)
def test_a_setting_that_the_loss_does_not_read_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Teacher(**given)


def test_a_projection_keeps_the_largest_directions_and_is_kept(tmp_path):
    wide = np.zeros((50, 6), dtype=np.float32)
    wide[:, [1, 4]] = np.random.default_rng(0).normal(size=(50, 2)) * (3, 1)
    kept = tmp_path / "p.npz"
    found = projection([wide[:20], wide[20:]], 2, kept, "wide")
    assert np.abs(found).round(3).argmax(axis=0).tolist() == [1, 4]
    np.testing.assert_allclose(wide @ found @ found.T, wide, atol=1e-5)
    assert projection([], 2, kept, "wide").tolist() == found.tolist()
    assert projection([wide], 6, tmp_path / "other.npz", "wide") is None
    other = projection([wide[:, [1, 0, 2, 3, 5, 4]]], 2, kept, "other")
    assert np.abs(other).round(3).argmax(axis=0).tolist() == [0, 5]


@pytest.mark.parametrize("wide", [48, 64])
def test_a_projection_of_earlier_rows_is_not_used_for_others(tmp_path, wide):
    def shares(folder, seed, width):
        scale = np.random.default_rng(seed).permutation([30] * 4 + [1] * (width - 4))
        told = np.random.default_rng(1).normal(size=(20, 2, width)) * scale
        rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(20)]
        rows = [{**row, "vectors": each.tolist()} for row, each in zip(rows, told, strict=True)]
        write_text(tmp_path / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        stage = stage_of(tmp_path, Teacher(projection="pca"))
        store_rows(stage.data, tmp_path / "rows.arrow", teacher=stage.teacher)
        stored = Dataset.from_file(str(tmp_path / "rows.arrow"))
        batch = [stored[i] for i in range(4)]
        return taught(stage, stored, folder, 8)(batch, inputs_of(stage.data, batch, 0)).numpy()

    shares(tmp_path / "kept", 0, 48)
    wanted = shares(tmp_path / "fresh", 5, wide)
    np.testing.assert_array_equal(shares(tmp_path / "kept", 5, wide), wanted)


def recipe_of(tiny_decoder, stage, **model):
    taught = {
        "steps": 4,
        "save_steps": 2,
        "log_steps": 1,
        "batch_size": 4,
        "held_out": 4,
        "warmup_steps": 0,
    }
    lora = {"rank": 2}
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"base": str(tiny_decoder), "max_length": 32, **model},
            "supervised": {**stage.model_dump(), **taught, "lora": lora, "max_length": 16},
        }
    )


@pytest.mark.parametrize("kind", ["model", "rows"])
def test_a_teacher_of_another_width_needs_a_projection_and_nothing_is_written(
    tiny_decoder, tmp_path, monkeypatch, kind
):
    if kind == "rows":
        rows = [{**row, "vectors": vectors_of(3, 48)} for row in ROWS]
        write_text(tmp_path / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        given = {}
    else:
        given = {"model": str(tiny_decoder)}
        monkeypatch.setattr(LLM2Vec, "encode_query", lambda *_, **__: pytest.fail("encoded"))
        plain = LLM2Vec.get_embedding_dimension
        monkeypatch.setattr(
            LLM2Vec,
            "get_embedding_dimension",
            lambda self: 48 if self is loaded[-1] and len(loaded) == 2 else plain(self),
        )
        loaded = []
        load = LLM2Vec.from_pretrained.__func__
        monkeypatch.setattr(
            LLM2Vec,
            "from_pretrained",
            classmethod(lambda cls, *a, **k: loaded.append(load(cls, *a, **k)) or loaded[-1]),
        )
    recipe = recipe_of(tiny_decoder, stage_of(tmp_path, Teacher(**given)))
    with pytest.raises(RecipeError, match=r"48 numbers, and the student's 32.*projection=pca"):
        Run(recipe, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_vectors_of_the_rows_are_projected(tiny_decoder, tmp_path):
    rows = [{**row, "vectors": vectors_of(3, 48)} for row in ROWS]
    write_text(tmp_path / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    stage = stage_of(tmp_path, Teacher(projection="pca", loss="mse"))
    Run(recipe_of(tiny_decoder, stage), tmp_path / "run").run()
    assert any("teacher_loss" in line for line in outcome(tmp_path / "run")[1])


def test_any_encoder_of_sentence_transformers_is_a_teacher(tiny_decoder, tmp_path):
    transformer = Transformer(str(tiny_decoder))
    pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken")
    stock = SentenceTransformer(
        modules=[transformer, pooling], device="cpu", prompts={"query": "ask: ", "document": ""}
    )
    stock.tokenizer.pad_token = stock.tokenizer.eos_token
    stock.save(str(tmp_path / "stock"))
    teacher, folder = Teacher(model=str(tmp_path / "stock")), tmp_path / "teacher"
    stage, rows = stage_of(tmp_path, teacher), as_rows(ROWS[:3])
    compute_vectors(stage, folder, WIDTH, lambda said: None)
    inputs = inputs_of(stage.data, rows, 1)
    found = TeacherVectors(folder, WIDTH, teacher)(rows, inputs).numpy()
    asked, answers = ([i.text for i in inputs if i.is_query is kind] for kind in (True, False))
    wanted = [stock.encode(asked, prompt="ask: "), stock.encode(answers)]
    np.testing.assert_allclose(found, np.concatenate(wanted), rtol=1e-3, atol=1e-4)


def outcome(folder):
    weights = load_file(folder / "supervised" / "adapter_model.safetensors")
    lines = (folder / "supervised" / "metrics.jsonl").read_text().splitlines()
    told = [{k: v for k, v in json.loads(line).items() if k != "machine"} for line in lines]
    return {name: value.numpy().tobytes() for name, value in weights.items()}, told


def cut_off(recipe, folder):
    def stop(step, steps, measured):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(recipe, folder, None, Listener(step=stop)).run()


@pytest.mark.parametrize("vectors", ["kept", "lost"])
def test_a_stage_does_not_continue_with_a_teacher_that_has_changed(tiny_decoder, tmp_path, vectors):
    encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    encoder.save(tmp_path / "better")
    stage = stage_of(tmp_path, Teacher(model=str(tmp_path / "better")))
    recipe, folder = recipe_of(tiny_decoder, stage), tmp_path / "run"
    cut_off(recipe, folder)
    if vectors == "lost":
        shutil.rmtree(folder / "teacher")
    else:
        kept = {file.name: file.read_bytes() for file in (folder / "teacher").iterdir()}
    weight = encoder.backbone.auto_model.norm.weight
    for factor in (-2, -0.5):
        with torch.no_grad():
            weight.mul_(factor)
        encoder.save(tmp_path / "better")
        if factor == -2:
            told = "teacher .*better has changed since the last checkpoint of supervised.* Fix: put"
            with pytest.raises(DataError, match=told):
                Run(recipe, folder).run()
            if vectors == "kept":
                assert kept == {f.name: f.read_bytes() for f in (folder / "teacher").iterdir()}
    Run(recipe, folder).run()  # with its former weights


@pytest.mark.parametrize("loss", ["cosine", "kl"])
def test_a_stage_with_a_teacher_continues_to_the_same_weights(tiny_decoder, tmp_path, loss):
    teacher = Teacher(model=str(tiny_decoder), loss=loss, weight=2)
    recipe = recipe_of(tiny_decoder, stage_of(tmp_path, teacher))
    Run(recipe, tmp_path / "whole").run()
    wanted = outcome(tmp_path / "whole")
    assert not (tmp_path / "whole" / "teacher").exists()

    plain = StageCallback.on_step_end

    def stop(self, args, state, control, **more):
        plain(self, args, state, control, **more)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageCallback, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            Run(recipe, tmp_path / "cut").run()
    assert (tmp_path / "cut" / "teacher").is_dir()
    Run(recipe, tmp_path / "cut").run()
    assert outcome(tmp_path / "cut") == wanted
    assert any("teacher_loss" in line for line in wanted[1])
