"""Training files of everyone: which column is what, what a cell holds, and what is told of it."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pandas as pd
import pytest

from unmasked.errors import DataError, RecipeError
from unmasked.recipe.files import make_recipe
from unmasked.recipe.schema import Pairs
from unmasked.recipe.teaching import Teacher
from unmasked.train.data.mixing import inputs_of
from unmasked.train.data.pairs import read_rows
from unmasked.train.data.texts import read_texts


def data_set(given: str) -> Pairs:
    """What ``--data`` makes of a word."""
    settings = {"name": "x", "model": {"base": "nano"}, "supervised": {"data": given}}
    return make_recipe(settings).supervised.data[0]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Reads rows, given as dictionaries, text or a data frame, from a file of a name."""
    monkeypatch.chdir(tmp_path)

    def read(given, name="a.jsonl", columns="", **settings):
        path = tmp_path / name
        if isinstance(given, list):
            path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
        elif isinstance(given, str):
            path.write_text(given, encoding="utf-8")
        elif name.endswith(".parquet"):
            given.to_parquet(path)
        else:
            given.to_csv(path, index=False)
        told: list[str] = []
        pairs = data_set(name + columns).model_copy(update=settings)
        found = list(read_rows(pairs, tell=told.append))
        assert len(told) == 1
        return found, told[0]

    return read


FORMATS = {
    "this package": ({"query": "q", "positive": "p", "negative": "n"}, ["n"]),
    "sentence-transformers triplets": ({"anchor": "q", "positive": "p", "negative": "n"}, ["n"]),
    "sentence-transformers n-tuples": (
        {"anchor": "q", "positive": "p", "negative_10": "c", "negative_2": "b", "negative_1": "a"},
        ["a", "b", "c"],
    ),
    "n-tuples with gaps": (
        {"query": "q", "positive": "p", "negative_1": "a", "negative_2": None, "negative_4": "c"},
        ["a", "c"],
    ),
    "one and several": (
        {"query": "q", "positive": "p", "negative": "a", "negatives": ["b", "c"]},
        ["a", "b", "c"],
    ),
    "hard negatives": ({"query": "q", "positive": "p", "hard_negatives": ["a"]}, ["a"]),
    "FlagEmbedding": ({"query": "q", "pos": ["p"], "neg": ["a", "b"]}, ["a", "b"]),
    "GritLM": ({"query": ["", "q"], "pos": [["", "p"]], "neg": [["", "a"], ["", "b"]]}, ["a", "b"]),
    "Tevatron": (
        {
            "query_id": "1",
            "query": "q",
            "positive_passages": [{"docid": "1", "title": "", "text": "p"}],
            "negative_passages": [{"docid": "2", "title": "T", "text": "a"}, {"text": "b"}],
        },
        ["T a", "b"],
    ),
    "question and answer": ({"question": "q", "answer": "p"}, []),
    "paraphrases": ({"sentence1": "q", "sentence2": "p"}, []),
    "SimCSE's NLI": ({"sent0": "q", "sent1": "p", "hard_neg": "a"}, ["a"]),
    "DPR": ({"question": "q", "positive_ctxs": [{"title": "p", "text": "p"}]}, []),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ".csv"])
def test_the_formats_in_use_are_read_as_they_are(rows, name, kind):
    row, negatives = FORMATS[name]
    if kind == ".csv" and isinstance(row.get("query"), list):
        pytest.skip("a query is text: a list in a cell of .csv is not taken apart")
    given = [row, row] if kind == ".jsonl" else pd.DataFrame([row, row])
    found, _ = rows(given, f"a{kind}")
    assert [(r.query, r.positive, r.negatives) for r in found] == [("q", "p", negatives)] * 2


def test_every_positive_is_a_row_and_every_column_is_told(rows):
    row = {"query": "q", "pos": ["p1", "p2"], "neg": ["n"], "pos_scores": [1, 2], "id": 7}
    found, told = rows([row, row])
    assert [(r.positive, r.negatives, r.number) for r in found] == [
        ("p1", ["n"], 0), ("p2", ["n"], 1), ("p1", ["n"], 2), ("p2", ["n"], 3),
    ]  # fmt: skip
    assert told == "a.jsonl: query: query; positive: pos; negatives: neg; not used: pos_scores, id"


def test_the_instructions_of_rows_stand_before_their_texts(rows):
    flag = {"query": "q", "pos": ["p"], "prompt": "Find: "}
    grit = {"query": ["ask", "q"], "pos": [["about", "p"]], "neg": [["about", "n"]]}
    found, _ = rows([flag, grit, {"query": "q", "pos": ["p"]}])
    data = [Pairs(path="x", instruction="all")]
    told = [tuple(i.instruction for i in inputs_of(data, [row._asdict()], 0)) for row in found]
    assert told == [("Find: ", ""), ("ask", "about"), ("all", "")]
    # What the recipe says goes before a column of instructions, which is then told as not used.
    found, said = rows([flag, flag], instruction=["mine"])
    assert found[0].query_instruction == "" and said.endswith("not used: prompt")


@pytest.mark.parametrize("header", [True, False])
def test_tables_with_tabs_are_read_with_and_without_a_header(rows, header):
    lines = "what is it\tthis\tthat\nand this\tthat\tthis\n"
    found, _ = rows(("query\tpositive\tnegative\n" if header else "") + lines, "a.tsv")
    assert [(r.query, r.positive, r.negatives) for r in found] == [
        ("what is it", "this", ["that"]),
        ("and this", "that", ["this"]),
    ]
    with pytest.raises(DataError, match=r"line 1: no column 'query' among qury, positive"):
        rows("qury\tpositive\na\tb\nc\td\n", "a.tsv")
    with pytest.raises(DataError, match="line 2: 2 columns instead of 3"):
        rows("a text\tb\tc\nd\te\n", "a.tsv")


def test_a_line_without_a_header_looks_like_texts_and_is_told(rows):
    unknown = "title\tbody\turl\nCats\tCats are animals\thttp://a\nDogs\tDogs bark\thttp://b\n"
    with pytest.raises(DataError, match="line 1: no columns 'query' and 'positive' among title"):
        rows(unknown, "a.tsv")
    _, told = rows("what is it\tthis\nand this\tthat\n", "a.tsv")
    assert told.endswith("; no header: columns by their place")
    _, told = rows("query\tpositive\nwhat is it\tthis\nand this\tthat\n", "a.tsv")
    assert "no header" not in told


@pytest.mark.parametrize(
    ("cell", "negatives"),
    [
        ("['n1', 'n2']", ["n1", "n2"]),
        ('["n1", "n2"]', ["n1", "n2"]),
        ("[\"it's\", 'x']", ["it's", "x"]),
        ("['n1',\n 'n2']", ["n1", "n2"]),
        ("[]", []),
        ("", []),
        ("[Music]", ["[Music]"]),
        ("[1, 2]", ["[1, 2]"]),
        ("a [list]", ["a [list]"]),
    ],
)
def test_a_cell_may_hold_a_list(rows, cell, negatives):
    frame = pd.DataFrame([{"query": "q", "positive": "p", "negatives": cell}] * 2)
    for name in ("a.csv", "a.parquet"):
        assert [r.negatives for r in rows(frame, name)[0]] == [negatives] * 2


@pytest.mark.parametrize("cell", ["['n1' 'n2']", "['n1'\n 'n2']", "['n1', 'n2' ...]", "['n1', 3]"])
def test_what_looks_like_a_list_and_is_none_is_refused(rows, cell):
    with pytest.raises(DataError, match=r"a\.csv, line \d: 'negatives' looks like a list"):
        rows(pd.DataFrame([{"query": "q", "positive": "p", "negatives": cell}] * 2), "a.csv")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("cell", ['["DJF", ...],\nand splits [1]', '["a", "b"]', "['a' 'b']"])
def test_a_text_that_begins_like_a_list_is_a_text_where_files_have_lists(rows, name, cell):
    """Documentation of code is full of them; in a column of lists they are still told."""
    row = {"query": "q", "positive": cell, "negative": cell, "negative_2": cell}
    given = (lambda row: [row] * 2) if name == "a.jsonl" else lambda row: pd.DataFrame([row] * 2)
    for found in rows(given(row), name)[0]:
        assert (found.positive, found.negatives) == (cell, [cell] * 2)
    with pytest.raises(DataError, match="'negatives' looks like a list"):
        rows(given({"query": "q", "positive": "p", "negatives": "['a' 'b']"}), name)


def test_lists_of_numpy_and_missing_values_in_parquet(rows):
    negatives = [np.array(["n1", "n2"]), None, np.array([], dtype=object)]
    frame = pd.DataFrame({"query": ["a", "b", "c"], "pos": [["p"]] * 3, "negatives": negatives})
    found, _ = rows(frame, "a.parquet")
    assert [r.negatives for r in found] == [["n1", "n2"], [], []]


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"query": "q", "positive": "p", "answer": "a"}, ":positive=answer", "'positive' and "),
        ({"query": "q", "question": "x", "pos": "p"}, ":query=query", "'query' and 'question'"),
        ({"sentence1": "q", "sentence2": "p", "score": 1}, ":query=sentence1,positive=sentence2",
         "'score' says how much 'sentence1' and 'sentence2' match"),
        ({"qury": "q", "positive": "p"}, ":query=qury", "did you mean 'qury'"),
        ({"query": "q", "text": "p"}, ":positive=text", "no column 'positive' among query, text"),
    ],
)  # fmt: skip
def test_two_readings_are_refused_and_the_fix_is_one_of_them(rows, row, columns, said):
    with pytest.raises(DataError, match=said) as caught:
        rows([row, row])
    fix = str(caught.value).split("Fix: ")[1]
    assert re.search(r"a\.jsonl:\w+=\w+", fix)[0].startswith(f"a.jsonl:{columns[1:].split('=')[0]}")
    found, _ = rows([row, row], columns=columns)
    assert len(found) == 2
    if "NAME" not in fix:  # the advice as it is printed
        word = next(w.rstrip(".") for w in shlex.split(fix) if w.startswith("a.jsonl:"))
        assert len(list(read_rows(data_set(word)))) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"sentence_A": "q", "sentence_B": "p"},  # of two as near, the first is the query
        {"question1": "q", "answer_text": "p"},
        {"anchr": "q", "psitive": "p", "negativs": "n"},
        {"query": "q", "positve": "p", "neg": "n"},
        {"qury": "q", "positive": "p", "neg": "n"},
    ],
)
def test_advice_that_is_followed_ends_with_the_file_read(rows, row):
    """It names both columns where both are missing."""
    with pytest.raises(DataError) as error:
        rows([row, row])
    fix = str(error.value).split("Fix: ")[1].rstrip(".")
    given, instead = [word for word in shlex.split(fix) if word.startswith("a.jsonl")]
    assert instead == "a.jsonl" and "NAME" not in fix
    found, _ = rows([row, row], columns=given.removeprefix("a.jsonl"))
    assert (found[0].query, found[0].positive) == ("q", "p")


def test_advice_keeps_the_negatives_that_are_right(rows):
    row = {"query": "q", "positive": "p", "wrong": "n", "bad": "n"}
    with pytest.raises(DataError) as error:
        rows([row, row], columns=":negative=bad,negative=wrng")
    assert "a.jsonl:negative=bad,negative=wrong in place of" in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
@pytest.mark.parametrize("role", ["query", "positive", "negative"])
def test_a_column_that_was_asked_for_has_to_be_there(rows, name, role):
    row = {"query": "q", "positive": "p", "negative": "n"}
    given = [row, row] if name == "a.jsonl" else pd.DataFrame([row, row])
    with pytest.raises(DataError, match=f"'{role[:-1]}x'.*did you mean '{role}'") as caught:
        rows(given, name, f":{role}={role[:-1]}x")
    assert f"{name}:{role}={role} " in str(caught.value)


def test_columns_behind_a_path_are_settings_of_its_data_set():
    found = data_set("a.jsonl:query=anchor,positive=text,negative=a,negative=b,weight=0.5")
    assert (found.path, found.query, found.positive) == ("a.jsonl", "anchor", "text")
    assert (found.negative, found.weight) == (["a", "b"], 0.5)
    found = data_set("hf:owner/name:subset:test:query=anchor")
    assert (found.path, found.query) == ("hf:owner/name:subset:test", "anchor")
    assert data_set("hf:owner/name:subset:test").path == "hf:owner/name:subset:test"
    with pytest.raises(RecipeError, match="unknown key, did you mean 'query'"):
        data_set("a.jsonl:qury=anchor")
    with pytest.raises(RecipeError, match="gives 'query' twice"):
        data_set("a.jsonl:query=anchor,query=text")


def test_a_text_column_stands_behind_a_path_as_well(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one", "id": 1.5}\n{"body": "two"}\n')
    assert read_texts([f"{path}:text=body"]) == ["one", "two"]
    with pytest.raises(DataError, match=r"no column 'text' among body, id. Fix: give .*:text=NAME"):
        read_texts([path])
    said = r"'body'. Fix: give \S+a.jsonl:text=NAME in place of \S+a.jsonl:text=bdy\."
    with pytest.raises(DataError, match=said):
        read_texts([f"{path}:text=bdy"])
    with pytest.raises(DataError, match=r"has one column, 'text'. Fix: .*:text=body"):
        read_texts([f"{path}:txt=body"])


def test_pairs_of_inference_become_triplets_as_in_simcse(rows):
    given = [
        ("a man", "a person", "entailment"), ("a man", "he eats", "neutral"),
        ("a man", "no man", "contradiction"), ("a dog", "a cat", "contradiction"),
        ("a tree", "a plant", "entailment"), ("a tree", "an oak", "-"),
    ]  # fmt: skip
    keys = ("premise", "hypothesis", "gold_label")
    found, told = rows([dict(zip(keys, row, strict=True)) for row in given])
    assert [(r.query, r.positive, r.negatives) for r in found] == [
        ("a man", "a person", ["no man"]),
        ("a tree", "a plant", []),
    ]
    assert told.endswith("label: gold_label; 3 rows left out by their label")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_labels_of_one_and_nought_say_which_pairs_match(rows, name):
    given = [("q1", "n1", 0), ("q1", "p1", 1), ("q1", "n2", 0), ("q2", "p2", 1), ("q3", "n3", 0)]
    frame = pd.DataFrame(given, columns=["query", "passage", "label"])
    found, told = rows(frame.to_dict("records") if name == "a.jsonl" else frame, name)
    assert [(r.query, r.positive, r.negatives) for r in found] == [
        ("q1", "p1", ["n1", "n2"]),
        ("q2", "p2", []),
    ]
    assert "; 1 row left out by their label" in told
    assert len(rows(frame, "b.csv", ":query=query,positive=passage")[0]) == 5


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"premise": "q", "hypothesis": "p", "label": 0}, "'label' is 0, and the only labels"),
        ({"sentence1": "q", "sentence2": "p", "label": 3}, "'label' is 3, and"),
        ({"sentence1": "q", "sentence2": "p", "label": 0.8}, "'label' is 0.8, and"),
        ({"sentence1": "q", "sentence2": "p", "label": None}, "'label' is None, and"),
    ],
)
def test_a_label_with_two_readings_is_refused(rows, row, said):
    with pytest.raises(DataError, match=f"line 1: {said}"):
        rows([row, row])


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"Query": "q", "Positive": "p", "Negative": "n"}, ("q", "p", ["n"])),
        ({"QUESTION": "q", "Answer": "p", "Hard Negatives": ["n"]}, ("q", "p", ["n"])),
        ({"Sentence_1": "q", "Sentence_2": "p"}, ("q", "p", [])),
        (
            {" anchor": "q", "positive ": "p", "Negative-2": "b", "NEG_1": "a"},
            ("q", "p", ["a", "b"]),
        ),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv"])
def test_columns_are_found_however_they_are_written(rows, row, found, name):
    flat = {key: value[0] if isinstance(value, list) else value for key, value in row.items()}
    between = "\t" if name == "a.tsv" else ","
    given = (
        [row, row]
        if name == "a.jsonl"
        else "\n".join(map(between.join, (flat, flat.values(), flat.values())))
    )
    read, told = rows(given, name)
    assert [(r.query, r.positive, r.negatives) for r in read] == [found] * 2
    assert "not used" not in told


@pytest.mark.parametrize("name", ["Label", "GOLD_LABEL", "Labels"])
def test_a_label_is_read_however_it_is_written(rows, name):
    kept = [{"Sentence1": f"q{i}", "Sentence2": "p", name: int(i < 2)} for i in range(4)]
    read, told = rows(kept)
    assert [row.query for row in read] == ["q0", "q1"] and f"label: {name}" in told
    with pytest.raises(DataError, match="'Score' says how much"):
        rows([{"sentence1": "q", "sentence2": "p", "Score": 3.5}] * 2)


@pytest.mark.parametrize(
    "cell", ["[{[1, 2]: 3}]", "[{{}}]", "[" * 100_000 + "]" * 100_000, "[" * 900 + "]" * 900]
)
def test_a_cell_that_looks_like_a_list_ends_in_a_text_or_an_error_of_its_line(rows, cell):
    try:
        found, _ = rows(f'query,positive\n"q","{cell}"\n"r","s"\n', "a.csv")
    except DataError as error:
        assert "a.csv, line 2: " in str(error)
    else:
        assert found[0].positive == cell


@pytest.mark.parametrize(
    "cell",
    [10**400, "[" * 100_000 + "]" * 100_000, [[[[0.5]]]]],
    ids=["huge", "nested text", "nested"],
)
@pytest.mark.parametrize("loss", ["cosent", "cosine"])
def test_numbers_that_no_float_can_hold_are_refused_with_their_line(tmp_path, cell, loss):
    row = {"query": "q", "positive": "p", "scores": cell, "vectors": [[cell], [1.0]]}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    pairs, teacher = Pairs(path=str(tmp_path / "a.jsonl")), Teacher(loss=loss, contrastive=0)
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: "):
        list(read_rows(pairs, teacher=teacher))


def test_no_id_is_suggested_for_a_text(rows):
    row = {"queryID": "1", "query_id": "2", "id": 3, "texts": "p", "positive": "p"}
    with pytest.raises(DataError) as error:
        rows([row, row])
    assert "query=NAME" in str(error.value) and "did you mean" not in str(error.value)
