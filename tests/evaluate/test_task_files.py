"""What kind of task a file is, what is wrong with it, and intervals for every kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from unmasked.errors import DataError
from unmasked.evaluate import encode_once, evaluate, interval, load_task, paired_difference
from unmasked.evaluate.bootstrap import average_precision

DATA = Path(__file__).parents[3] / "shared" / "data"
LABELLED = "label\ttext\n" + "".join(f"{n % 3}\ttext {n} of {n % 3}\n" for n in range(30))
PAIRED = "label\tsentence1\tsentence2\n" + "".join(f"{n % 2}\ta{n}\tb{n}\n" for n in range(20))
RANKED = json.dumps({"query": "q", "positive": "good", "negative": ["bad", "worse"]}) + "\n"


def noisy(noise: float):
    """An encoder that knows the last character of a text, as far as the noise lets it."""

    def encode(texts: Sequence[str], role: str | None) -> np.ndarray:
        rows = [np.random.default_rng(list(t.encode())).standard_normal(16) for t in texts]
        signal = np.eye(16)[[ord(text[-1]) % 16 for text in texts]]
        return (signal + noise * np.array(rows)).astype(np.float32)

    return encode


def write(folder: Path, **files: str) -> None:
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def test_the_columns_say_the_kind(tmp_path):
    write(
        tmp_path,
        sts__tsv="score\tsentence1\tsentence2\n1\ta\tb\n2\tc\td\n",
        pairs__tsv=PAIRED,
        topics__tsv=LABELLED,
        intent_train__tsv=LABELLED,
        intent_test__tsv=LABELLED,
        rank__jsonl=RANKED,
    )
    (tmp_path / "split").mkdir()
    write(tmp_path / "split", train__tsv=LABELLED, test__tsv=LABELLED)
    kinds = {
        "sts.tsv": "sts",
        "pairs.tsv": "pair classification",
        "topics.tsv": "clustering",
        "intent_test.tsv": "classification",
        "split": "classification",
        "rank.jsonl": "reranking",
    }
    for name, kind in kinds.items():
        task = load_task(tmp_path / name)
        assert (task.kind, task.name) == (kind, Path(name).stem.removesuffix("_test"))
        scores = task.score(noisy(1)).scores
        assert scores and all(0 <= score <= 1 for score in scores.values() if kind != "sts")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", "label\ttext\nyes\ta\nyes\tb\n", r"every label is 'yes' \(2 rows\)"),
        ("x.tsv", "label\ttxet\na\tb\n", "line 1: no column 'text'.*did you mean 'txet'"),
        ("x.tsv", "label\ttext\na\tb\tc\n", "line 2: 3 columns instead of 2"),
        ("x.tsv", PAIRED + "2\ta\tb\n", "line 22: label '2' is not 0 or 1"),
        ("x.tsv", "label\tsentence1\tsentence2\n1\ta\tb\n1\tc\td\n", "every label is '1'"),
        ("x.tsv", "label\tsentence1\tsentense2\n1\ta\tb\n", "line 1: no column 'sentence2'"),
        ("x_train.tsv", LABELLED, "the task of x_test.tsv is trained on"),
        ("x_test.tsv", LABELLED + "9\tb\n", "line 32: label '9' does not occur in x_train.tsv"),
        ("x.jsonl", "", "the file is empty"),
        ("x.jsonl", RANKED + "{", "line 2: not JSON"),
        ("x.jsonl", '{"querry": "q"}\n', "line 1: no column 'query' among querry, did you mean"),
        ("x.jsonl", '{"query": "q", "negative": ["b"]}', "line 1: query 'q' has no relevant doc"),
        ("x.jsonl", '{"query": "q", "positive": "a", "negative": []}', "has no other documents"),
        ("x.jsonl", '["q"]\n', "line 1: a list"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    write(tmp_path, x_train__tsv=LABELLED, x_test__tsv=LABELLED)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}.*{message}") as caught:
        load_task(tmp_path / name)
    assert "Fix: " in str(caught.value)


def test_a_folder_with_one_half_of_a_classification_task(tmp_path):
    write(tmp_path, train__tsv=LABELLED)
    with pytest.raises(DataError, match=r"train\.tsv and test\.tsv; one is missing.*Fix"):
        load_task(tmp_path)


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


def test_average_precision_is_that_of_scikit_learn():
    from sklearn.metrics import average_precision_score

    random = np.random.default_rng(0)
    gold, similarity = random.integers(0, 2, 50), random.integers(0, 20, 50) / 20
    counts = random.multinomial(50, [1 / 50] * 50, size=20)
    expected = [average_precision_score(gold, similarity, sample_weight=row) for row in counts]
    np.testing.assert_allclose(average_precision(similarity, gold, counts), expected)
    once = average_precision(similarity, gold).item()
    assert once == pytest.approx(average_precision_score(gold, similarity))


def test_tasks_share_vectors(tmp_path):
    write(tmp_path, a__tsv=LABELLED, b_train__tsv=LABELLED, b_test__tsv=LABELLED)
    seen: list[str] = []

    def encode(texts: Sequence[str], role: str | None) -> np.ndarray:
        seen.extend(texts)
        return noisy(1)(texts, role)

    evaluate([load_task(tmp_path / "a.tsv"), load_task(tmp_path / "b_test.tsv")], encode)
    assert len(seen) == len(set(seen)) == 30
    encode_once(encode)(["new", "new"], None)
    assert len(seen) == 31


@pytest.mark.parametrize(
    ("path", "kind", "texts"),
    [
        ("clustering/stackoverflow.tsv", "clustering", 20_000),
        ("classification/banking77_test.tsv", "classification", 10_003 + 3080),
        ("sts/sick_en_train.tsv", "sts", 9000),
        ("pairs/nli_en.jsonl", "reranking", None),
    ],
)
def test_the_development_data_loads(path, kind, texts):
    if not (DATA / path).is_file():
        pytest.skip(f"the development data ({path}) is not here")
    task = load_task(DATA / path)
    assert task.kind == kind
    assert texts is None or len(task.texts[None]) == texts
