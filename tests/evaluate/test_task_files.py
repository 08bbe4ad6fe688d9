"""What kind of task a file is, what is read from it, and what is wrong with it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from support.tasks import DATA, HEADER, QRELS, noisy, write

from unmasked.errors import DataError
from unmasked.evaluate import load_task

LABELLED = "label\ttext\n" + "".join(f"{n % 3}\ttext {n} of {n % 3}\n" for n in range(30))
PAIRED = "label\tsentence1\tsentence2\n" + "".join(f"{n % 2}\ta{n}\tb{n}\n" for n in range(20))
RANKED = json.dumps({"query": "q", "positive": "good", "negative": ["bad", "worse"]}) + "\n"


def test_a_slip_in_the_path_of_a_task_is_seen(tmp_path):
    (tmp_path / "similar.tsv").touch()
    with pytest.raises(DataError, match=r"is not a file or folder, did you mean 'similar\.tsv'\?"):
        load_task(tmp_path / "simliar.tsv")


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
        lowest = -1 if kind == "sts" else 0
        assert scores and all(lowest <= score <= 1 for score in scores.values())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", "label\ttext\nyes\ta\nyes\tb\n", r"every label is 'yes' \(2 rows\)"),
        ("x.tsv", "label\ttxet\na\tb\n", "line 1: no column 'text'.*did you mean 'txet'"),
        ("x.tsv", "label\ttext\na\tb\tc\n", "line 2: 3 columns instead of 2"),
        ("x.tsv", PAIRED + "2\ta\tb\n", "line 22: label '2' is not 0 or 1"),
        (
            "x.tsv",
            "label\tsentence1\tsentence2\n0\ta\tb\n3.8\tc\td\n5\te\tf\n",
            r"line 3: label '3.8' is not 0 or 1. Fix: labels run from 0.*sed -i 1s/label/score/",
        ),
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


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"title": "Wings", "text": "lift an aircraft."}, "Wings lift an aircraft."),
        ({"title": "Wings", "text": "Wings lift."}, "Wings Wings lift."),
        ({"title": "Only a title", "text": ""}, "Only a title"),
        ({"title": None, "text": "No title."}, "No title."),
        ({"title": "", "text": " White space "}, "White space"),
        ({"title": "", "text": ""}, ""),
    ],
)
def test_the_title_of_a_document_goes_before_its_text(
    tiny: Path, fields: dict[str, str], expected: str
) -> None:
    with (tiny / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "d4"} | fields))
    assert load_task(tiny).texts["document"] == ["doc 1", "doc 2", "doc 3", expected]


def test_the_title_of_a_query_is_not_read(tiny: Path) -> None:
    (tiny / "queries.jsonl").write_text('{"_id": "q1", "title": "A", "text": "query "}\n')
    assert load_task(tiny).texts["query"] == ["query "]


def test_queries_of_another_split_are_left_out(tiny: Path, caplog) -> None:
    with (tiny / "queries.jsonl").open("a") as file:
        file.write('{"_id": "q2", "text": "for training"}\n')
    assert load_task(tiny).texts["query"] == ["query"]
    assert "test.tsv: 1 queries are not judged and are left out (q2)" in caplog.text
    caplog.clear()
    (tiny / "qrels" / "train.tsv").write_text(QRELS + "q2\td1\t1\n")
    assert load_task(tiny).texts["query"] == ["query"]
    assert caplog.text == ""
    (tiny / "qrels" / "test.tsv").write_text(QRELS + "q1\td1\t1\nq2\td1\t0\n")
    assert load_task(tiny).texts["query"] == ["query", "for training"]
    assert "1 queries have no document with a score above 0 and count as 0 (q2)" in caplog.text


def test_ids_that_are_not_there_are_told(tiny: Path, caplog) -> None:
    rows = "q1\td1\t1\nq1\tgone\t2\nlost\td1\t1\n"
    (tiny / "qrels" / "test.tsv").write_text(QRELS + rows)
    task = load_task(tiny)
    assert (task.grades, task.absent) == ([{0: 1.0}], [[2.0]])
    assert "1 ids are not in queries.jsonl and are left out (lost)" in caplog.text
    assert "1 ids are not in corpus.jsonl and count as not found (gone)" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty. Fix"),
        (b"\n\n", "the file is empty. Fix"),
        (HEADER.encode(), "empty below its header"),
        (b"score\tsentence\tsentence2\n1\ta\tb\n", "line 1: no column 'sentence1'.*did you mean"),
        (
            b"1\ta\tb\n",
            "line 1: no column 'score' among 1, a.*begin with the header score, sentence1",
        ),
        (HEADER.encode() + b"1\ta\tb\n\nfive\ta\tb\n", "line 4: score 'five' is not a number"),
        (HEADER.encode() + b"nan\ta\tb\n", "line 2: score 'nan' is not a number"),
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
        ("qrels/test.tsv", b"q9\td1\t1\n", "none of its ids is in queries.jsonl .'q9', but 'q1'"),
        ("qrels/test.tsv", b"q1\td9\t1\n", "none of its ids is in corpus.jsonl .'d9', but 'd1'"),
        ("qrels/test.tsv", b"q1\td1\tyes\n", "line 2: score 'yes' is not a number"),
        ("qrels/test.tsv", b"q1\td1\t1\nq1\td1\t2\n", "line 3: query 'q1', document 'd1'"),
        ("qrels/test.tsv", b"q1\td1\t0\n", "no query has a document with a score above 0"),
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
        (tmp_path / "absent.tsv", "is not a file or folder"),
        (tmp_path / "pairs.csv", "'.csv' given"),
    ):
        with pytest.raises(DataError, match=message):
            load_task(path)


def test_only_newlines_and_tabs_separate(tmp_path: Path) -> None:
    path = tmp_path / "odd.tsv"
    text = '\ufeffsentence2\tid\tscore\tsentence1\r\nb\x85"b\t7\t1\ta\u2028a\r\nd\t8\t2\tc'
    path.write_bytes(text.encode())
    assert load_task(path).texts[None] == ["a\u2028a", "c", 'b\x85"b', "d"]


def test_cranfield_and_stsb_load() -> None:
    if not (DATA / "retrieval" / "cranfield").is_dir():
        pytest.skip("the development data (cranfield, stsb_en_dev) is not here")
    cranfield = load_task(DATA / "retrieval" / "cranfield")
    stsb = load_task(DATA / "sts" / "stsb_en_dev.tsv")
    assert len(cranfield.texts["document"]) == 1400
    assert len(cranfield.texts["query"]) == 225
    assert len(stsb.texts[None]) == 2 * 1500
    assert cranfield.texts["document"][0].startswith(
        # The title goes before every text, as in mteb, also where the text begins with it.
        "experimental investigation of the aerodynamics of a wing in a slipstream . experimental"
    )


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


def test_scores_that_are_called_labels_are_mended_as_advised(tmp_path):
    path = tmp_path / "a file.tsv"
    path.write_text("label\tsentence1\tsentence2\n0\ta\tb\n3.8\tc\td\n5\te\tf\n")
    with pytest.raises(DataError) as caught:
        load_task(path)
    subprocess.run(["bash", "-c", str(caught.value).split("'score': ")[1][:-1]], check=True)
    assert load_task(path).kind == "sts"
