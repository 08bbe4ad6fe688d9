"""Training data is compared with itself and with tests, and written without what is wrong."""

from __future__ import annotations

import io
import json
import logging
import shlex

import numpy as np
import pytest

from unmasked.errors import DataError
from unmasked.recipe.schema import Pairs
from unmasked.train.checking.checking import check_data, removed_of
from unmasked.train.checking.copies import Copies
from unmasked.train.checking.leaks import Leaks, keys_in
from unmasked.train.data.pairs import read_rows

LONG = "The quick brown fox jumps over the lazy dog, and then it goes home to sleep until morning"


def written(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Pairs(path=str(path))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_copies_are_equal_apart_from_case_and_white_space_or_nearly():
    copies = Copies(0.8)
    assert copies.find(LONG, add_as="first") is None
    assert copies.find(f"  {LONG.upper()}\n") == ("first", 1.0)
    near = copies.find(LONG + " comes")
    assert near is not None and near.of == "first" and 0.8 <= near.share < 1
    assert copies.find("Something else altogether, of which nothing is the same.") is None
    assert Copies(1.0).find("a", add_as="a") is None


def test_a_limit_of_one_names_exact_copies_only():
    copies = Copies(1.0)
    copies.find(LONG, add_as="first")
    assert copies.find(LONG + ".") is None and copies.find(LONG) is not None


def test_a_text_that_is_added_is_found_beside_others_that_are_like_it():
    words = [f"word{i}" for i in range(24)]
    first, second, third = (" ".join(words[at : at + 20]) for at in (0, 2, 4))
    for labels in ({"second": second}, {"first": first, "second": second}):
        copies = Copies(0.8)
        for label, text in labels.items():
            copies.add(text, label)
        assert copies.find(second) == ("second", 1.0)
        near = copies.find(third)
        assert near is not None and near.of == "second"
    copies.add(f" {first.upper()}", "again")
    assert copies.find(first) == ("first", 1.0)


def test_a_test_text_that_is_like_another_is_no_less_removed(tmp_path):
    (tmp_path / "a.txt").write_text(f"{LONG}!\nAnother text\n")
    found = check_data([Pairs(path=str(tmp_path / "a.txt"))], {"t": [LONG, LONG + "!"]})
    assert found.reasons == {"a text of t": 1}
    assert "text 2 of t (100% alike)" in found.examples["a text of t"][0]


def test_texts_lose_their_copies_and_those_of_tests(tmp_path):
    texts = [
        "one text that stays here",
        LONG,
        "a test text of its own",
        LONG + "!",
        "ONE text that stays  here",
    ]
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    out = tmp_path / "out.jsonl"
    tests = {"sts.tsv": ["A test text of its own"]}
    found = check_data([Pairs(path=str(tmp_path / "a.txt"))], tests, write=out)
    assert lines(out) == [{"text": texts[0]}, {"text": texts[1]}]
    assert (found.rows, found.kept) == (5, 2)
    assert found.reasons == {
        "a text of sts.tsv": 1,
        "near copy of another row": 1,
        "exact copy of another row": 1,
    }
    removed = lines(removed_of(out))
    assert [line["row"]["text"] for line in removed] == texts[2:]
    assert removed[0]["of"] == "text 1 of sts.tsv (100% alike)" and "line 3" in removed[0]["place"]
    assert "line 1" in removed[2]["of"]
    assert found.lengths[0] == min(map(len, texts)) and found.lengths[3] == max(map(len, texts))


def test_rows_of_pairs_are_compared_by_every_text_and_written_as_training_reads_them(tmp_path):
    rows = [
        {"anchor": "who?", "positive": "she", "negative": "nobody"},
        {"anchor": "who?", "positive": "he", "negative": "nobody"},
        {"anchor": "Who?", "positive": "she ", "negative": "other"},
        {"anchor": "what?", "positive": "that", "negative": "the test"},
    ]
    out = tmp_path / "out.jsonl"
    found = check_data([written(tmp_path / "a.jsonl", rows)], {"t": ["the test"]}, write=out)
    assert found.kept == 2 and found.reasons["a text of t"] == 1
    left = list(read_rows(Pairs(path=str(out))))
    assert [(row.query, row.positive, row.negatives) for row in left] == [
        ("who?", "she", ["nobody"]),
        ("who?", "he", ["nobody"]),
    ]


class Angles:
    """An encoder whose vector of a number is that angle."""

    def encode_query(self, texts, **_):
        return np.array([[np.cos(float(t)), np.sin(float(t))] for t in texts], dtype=np.float32)

    encode_document = encode_query


def test_a_negative_as_near_as_the_answer_is_taken_out_of_its_row(tmp_path):
    rows = [
        {"query": "0", "positive": "0.5", "negatives": ["0.4", "1.4", "0.52", "-0.1"]},
        {"query": "0.1", "positive": "0.2"},
    ]
    out = tmp_path / "out.jsonl"
    data = [written(tmp_path / "a.jsonl", rows)]
    found = check_data(data, {}, encoder=Angles(), write=out, similarity=1)
    assert lines(out)[0]["negatives"] == ["1.4"] and found.kept == 2
    assert found.reasons == {"false negative": 3}
    assert [line["negative"] for line in lines(removed_of(out))] == ["0.4", "0.52", "-0.1"]


def test_a_column_of_texts_is_named_as_in_training_and_nothing_is_written_on_a_fault(tmp_path):
    written(tmp_path / "a.jsonl", [{"body": "one"}, {"body": "two"}, {"body": "One"}])
    found = check_data([f"{tmp_path / 'a.jsonl'}:text=body"], {})
    assert (found.rows, found.kept) == (3, 2)
    with pytest.raises(DataError, match="Fix:"):
        check_data([written(tmp_path / "b.jsonl", [{"query": "q", "positive": ""}])], {},
                   write=tmp_path / "out.jsonl")  # fmt: skip
    assert not list(tmp_path.glob("*out*"))


def test_languages_are_named_by_their_share(tmp_path):
    pytest.importorskip("lingua", reason="lingua is not installed")
    texts = [
        "Das ist ein deutscher Satz.",
        "이것은 한국어 문장입니다.",
        "Hier steht noch ein Satz.",
    ]
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    found = check_data([Pairs(path=str(tmp_path / "a.txt"))], {})
    assert found.languages == {"German": pytest.approx(2 / 3), "Korean": pytest.approx(1 / 3)}


def test_leaks_count_the_texts_of_each_test_and_give_a_command():
    leaks = Leaks({"a b.tsv": ["x", "y", "y"], "none.tsv": ["z"]})
    (line,) = leaks.told("mntp.data", ["c.txt"], keys_in(["y", "w", "y"]))
    assert "has 1 of the 2 texts of a b.tsv" in line
    assert "unmasked data check c.txt --against 'a b.tsv' --write checked.jsonl" in line


@pytest.mark.parametrize("stage", ["mntp", "simcse", "supervised"])
def test_a_stage_that_trains_on_a_text_of_a_test_says_so(tiny_decoder, tmp_path, caplog, stage):
    from unmasked import LLM2Vec
    from unmasked.recipe.files import make_recipe
    from unmasked.train.preflight import check_inputs

    texts = [f"a text with the number {i}" for i in range(40)]
    pairs = [{"query": text, "positive": f"{text}."} for text in texts]
    written(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "a.txt").write_text("\n".join(texts))
    few = {"steps": 1, "warmup_steps": 0, "batch_size": 2}
    few |= {"mntp": {"block_length": 8}}.get(stage, {})
    data = [str(tmp_path / ("pairs.jsonl" if stage == "supervised" else "a.txt"))]
    settings = {"name": "a", "model": {"base": str(tiny_decoder)}, stage: {"data": data, **few}}
    leaks = Leaks({"sts.tsv": [texts[3], texts[5], "not there"], "clean.tsv": ["nor this"]})
    encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    with caplog.at_level(logging.WARNING):
        check_inputs(make_recipe(settings), tmp_path, encoder, str, leaks)
    told = [record.getMessage() for record in caplog.records if "texts of" in record.getMessage()]
    assert len(told) == 1
    assert f"{stage}.data has 2 of the 3 texts of sts.tsv" in told[0]


def test_a_warning_of_several_tests_is_one_command():
    leaks = Leaks({"a.tsv": ["x"], "b.tsv": ["y", "z"], "none.tsv": ["w"]})
    (line,) = leaks.told("mntp.data", ["c.txt"], keys_in(["x", "y"]))
    assert "has 1 of the 1 texts of a.tsv, and 1 of the 2 texts of b.tsv, so" in line
    assert "check c.txt --against a.tsv --against b.tsv --write checked.jsonl" in line


@pytest.mark.parametrize(
    ("columns", "row", "teacher"),
    [
        ("query=frage,positive=antwort", {"frage": "q", "antwort": "p"}, None),
        ("max_rows=30", {"query": "q", "positive": "p"}, None),
        ("", {"sentence1": "q", "sentence2": "p", "score": 0.5}, "cosent"),
    ],
)
def test_the_command_of_a_warning_reads_the_rows_that_training_reads(
    cli, tmp_path, caplog, columns, row, teacher
):
    from unmasked import LLM2Vec
    from unmasked.recipe.files import make_recipe
    from unmasked.train.preflight import _check_pairs

    rows = [{k: f"{v} {i}" if isinstance(v, str) else v for k, v in row.items()} for i in range(40)]
    written(tmp_path / "l k.jsonl", rows)
    (tmp_path / "sts.tsv").write_text("score\tsentence1\tsentence2\n1\tq 3\tb\n2\tc\td\n")
    settings = {"data": f"l k.jsonl:{columns}".rstrip(":"), "batch_size": 2, "warmup_steps": 0}
    if teacher:
        settings["teacher"] = {"loss": teacher, "contrastive": 0}
    recipe = {"name": "a", "model": {"base": "nano"}, "supervised": settings}
    stage = make_recipe(recipe).supervised
    encoder = LLM2Vec.from_pretrained("nano", device="cpu")
    with caplog.at_level(logging.WARNING):
        _check_pairs(stage, encoder, 0, Leaks({"sts.tsv": ["q 3"]}))
    command = shlex.split(caplog.messages[-1].split("Fix: unmasked ")[1].split(", and")[0])
    code, _, err = cli(*command)
    assert code == 0, err
    left = lines(tmp_path / "checked.jsonl")
    assert len(left) == (29 if "max_rows" in columns else 39)
    assert [line.get("scores") for line in left] == [[0.5] if teacher else None] * len(left)


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ({"scores": [0.9, 0.1, 0.2, 0.3]}, {"scores": [0.9, 0.2]}),
        ({"pos_scores": [3], "neg_scores": [1, 2, 0]}, {"scores": [3.0, 2.0]}),
        ({"vectors": [[0.5, i] for i in range(5)]}, {"vectors": [[0.5, i] for i in (0, 1, 3)]}),
        ({"score": "high"}, {}),  # no teacher's
        ({"scores": [1, 2]}, {}),  # of which no teacher could learn
    ],
)
def test_a_teachers_columns_stay_with_the_texts_that_are_left(tmp_path, told, kept):
    row = {"query": "0", "positive": "0.5", "negatives": ["0.4", "1.4", "0.52"], **told}
    rows, out = [row, {**row, "query": "0.01"}], tmp_path / "out.jsonl"
    check_data([written(tmp_path / "a.jsonl", rows)], {}, encoder=Angles(), write=out, similarity=1)
    plain = {"query": "0", "positive": "0.5", "negatives": ["1.4"]}
    assert lines(out) == [plain | kept, plain | kept | {"query": "0.01"}]


def test_every_kind_of_source_that_a_stage_on_texts_takes_is_checked(tmp_path, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for name in ("a.md", "b.md"):
        (tmp_path / "docs" / name).write_text("the same text\n")
    found = check_data([Pairs(path="documents:docs")], {})
    assert found.examples["exact copy of another row"][0].startswith("docs/b.md: docs/a.md ")
    parquet.write_table(pa.table({"text": ["one", "One"]}), "c.parquet")
    found = check_data([Pairs(path="c.parquet")], {})
    assert found.examples["exact copy of another row"][0].startswith("c.parquet, row 2: ")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\n\nONE\n")))
    found = check_data([Pairs(path="-")], {})
    assert found.examples["exact copy of another row"][0].startswith("standard input, line 3: ")
    written(tmp_path / "d" / "rows.jsonl", [{"query": f"q{i}", "positive": "p"} for i in range(2)])
    (tmp_path / "d" / "notes.txt").write_text("not read by training\n")
    assert check_data([Pairs(path="d")], {}).rows == 2


def test_the_place_of_a_row_is_its_line_in_its_file(tmp_path):
    several = {"query": "a", "positive": ["first", "second", "third"]}
    labelled = [
        {"sentence1": "x", "sentence2": f"neutral {i}", "label": "neutral"} for i in range(3)
    ]
    judged = {"sentence1": "y", "sentence2": "z", "label": "entailment"}
    copied = {"query": "b", "positive": "c"}
    written(tmp_path / "d" / "1.jsonl", [several, copied])
    written(tmp_path / "d" / "2.jsonl", [copied, *labelled, judged, labelled[0], judged])
    found = check_data([Pairs(path=str(tmp_path / "d"))], {})
    first, second = found.examples["exact copy of another row"]
    assert "2.jsonl, line 1: " in first and "1.jsonl, line 2 (" in first
    assert "2.jsonl, line 7: " in second and "2.jsonl, line 5 (" in second


def test_places_name_the_file_of_a_folder_and_the_text_that_was_found(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("one\ntwo\n")
    written(tmp_path / "data" / "b.jsonl", [{"text": "three"}, {"text": "TWO"}])
    found = check_data([Pairs(path=str(tmp_path / "data"))], {})
    (example,) = found.examples["exact copy of another row"]
    assert "b.jsonl, line 2" in example and "a.txt, line 2" in example
    rows = [{"query": "q", "positive": "p", "negative": "the test"}]
    rows += [{"query": "q2", "positive": "p2"}]
    found = check_data([written(tmp_path / "c.jsonl", rows)], {"t": ["the test"]})
    assert found.examples["a text of t"][0].endswith(": the test")
