"""Files of words and their labels as they come: which column is the word, what is a comment."""

from __future__ import annotations

import logging

import pytest

from unmasked.errors import DataError
from unmasked.evaluate.tasks.probe import load_probe

CONLLU = """# sent_id = 1
# text = I don't know Ann.
1\tI\tI\tPRON\tPRP\tCase=Nom\t4\tnsubj\t4:nsubj\t_
2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No
2\tdo\tdo\tAUX\tVBP\t_\t4\taux\t_\t_
3\tn't\tnot\tPART\tRB\t_\t4\tadvmod\t_\t_
4\tknow\tknow\tVERB\tVB\t_\t0\troot\t_\t_
5\tNew York\tNew York\tPROPN\tNNP\t_\t4\tobj\t_\t_
5.1\tknows\tknow\tVERB\t_\t_\t_\t_\t_\t_
6\t#\t#\tPUNCT\t.\t_\t4\tpunct\t_\t_

1\tDogs\tdog\tNOUN\tNNS\t_\t2\tnsubj\t_\t_
2\tbark\tbark\tVERB\tVBP\t_\t0\troot\t_\t_

"""
WORDS = [["I", "do", "n't", "know", "New York", "#"], ["Dogs", "bark"]]


@pytest.fixture
def words(tmp_path):
    """Reads the words and columns of a text that is given as both halves of a task."""

    def read(text: str, names=("x_train.txt", "x_dev.txt")):
        for name in names:
            (tmp_path / name).write_text(text, encoding="utf-8")
        task = load_probe(tmp_path / names[1])
        return [found for found, _ in task.test], task.columns

    return read


@pytest.mark.parametrize("text", [CONLLU, CONLLU.replace("\n", "\r\n"), "\ufeff" + CONLLU])
def test_conllu_has_its_words_in_the_second_column(words, text):
    assert words(text) == (WORDS, ("upos", "xpos", "deprel"))


def test_columns_of_conllu_that_nothing_can_be_learnt_of_are_left_out(words, caplog):
    lines = [line.split("\t") for line in CONLLU.split("\n")]
    for cells in lines:
        if len(cells) == 10 and "-" not in cells[0]:
            cells[4], cells[7] = "_", "dep"
    with caplog.at_level(logging.WARNING):
        assert words("\n".join(map("\t".join, lines))) == (WORDS, ("upos",))
    assert "deprel is not probed, as it has one label only" in caplog.text


def test_a_first_column_that_counts_the_words_is_no_word(words):
    text = "# source\n1\tAnna\tB-PER\n2\tin\tO\n\n1\tBonn\tB-LOC\n"
    assert words(text) == ([["Anna", "in"], ["Bonn"]], ("ner",))
    # Numbers that do not count are words.
    assert words("1\tCD\n3\tCD\nx\tNN\nof\tIN\n") == ([["1", "3", "x", "of"]], ("pos",))


@pytest.mark.parametrize("between", [" ", "\t", "  "])
def test_other_white_space_is_part_of_a_word(words, between):
    lines = [f"New\u00a0York{between}B-LOC", f"10\u202f000{between}O", f"\u3000{between}O"]
    found, _ = words("\n".join(lines))
    assert found == [["New\u00a0York", "10\u202f000", "\u3000"]]


@pytest.mark.parametrize("between", [" ", "\t"])
def test_a_word_may_begin_with_the_sign_of_a_comment(words, between):
    rows = [("#", "NN", "O"), ("1", "CD", "O"), ("Oslo", "IN", "B-LOC"), ("#oslo", "NN", "B-LOC")]
    text = "\n".join(between.join(row) for row in rows)
    assert words(text)[0] == [["#", "1", "Oslo", "#oslo"]]
    assert words("# a comment\n" + text + "\n# sent_id = 2\n")[0] == [["#", "1", "Oslo", "#oslo"]]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("x_train.txt", "x_validation.txt"),
        ("train.conll", "validation.conll"),
        ("x-train.txt", "x-val.txt"),
        ("x_train.txt", "x_valid.txt"),
        ("eng.train", "eng.testa"),
    ],
)
def test_the_other_half_is_found_by_its_name(words, train, test):
    assert words("a X\nb Y\n", (train, test))[0] == [["a", "b"]]


def test_a_column_of_words_is_no_column_of_labels(words):
    text = "\n".join(f"word{i} lemma{i} {'NV'[i % 2]}" for i in range(1200))
    with pytest.raises(DataError, match=r"column 2 has 1,200 different labels. Fix: leave it out"):
        words(text)
