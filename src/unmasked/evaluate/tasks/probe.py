"""What a model knows about single words: a linear probe on frozen vectors, from CoNLL-style files.

A file has one word per line, followed by its labels (separated by tabs or spaces), and a blank line
after each sentence. CoNLL-U is recognised by its ten columns, the first of which counts the words:
its parts of speech and relations are probed, and ranges (``2-3``) and empty nodes (``2.1``) are not
words. In other files whose first column counts the words, the words are in the second. Every column
of labels is probed separately, and named after its content (``pos``, ``chunk``, ``ner``) or by its
number. Two states of each word are probed: its own, and the one before it (``before``), from which
masked next token prediction learns to predict the word (arXiv 2404.05961, section 4). Token
accuracy counts every word, ``O`` included, as in the paper; for columns of spans (B-, I-) there is
also the F1 of whole spans (seqeval), which separates models better.

Cost: encoding all words, then one logistic regression per column and state: about ten seconds for
`TRAIN_WORDS` words of width 256.
"""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from unmasked.errors import DataError, MissingExtraError
from unmasked.evaluate.bootstrap import TaskResult
from unmasked.evaluate.tasks.task_files import fault, numbered_lines
from unmasked.evaluate.tasks.task_vectors import finite

logger = logging.getLogger(__name__)

TRAIN_WORDS = 30_000  # words to train on, in whole sentences drawn at random
LONGEST = 60  # words; longer sentences are divided, so that no model truncates them
STATES = {"": False, " before": True}  # part of the metric's name → `previous` of `encode_words`
_UNIVERSAL = {"ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "NOUN", "PRON", "PROPN", "SCONJ"}
_ENTITIES = {"PER", "LOC", "ORG", "MISC", "O"}
_PHRASES = {"NP", "VP", "PP"}
_SPLIT = re.compile(r"(?<![a-z])(dev|validation|valid|val|testa|testb|test)(?=[^a-z]*\.[a-z]+$|$)")
_NUMBER = re.compile(r"\d+([-.]\d+)?")
_CONLLU = {1: "form", 3: "upos", 4: "xpos", 7: "deprel"}
"""Columns of CoNLL-U and CoNLL-X, from 0: the words, and the labels that are probed."""
_MOST_LABELS = 1000
_SPAN = re.compile(r"O|[BIES]-.+")

Labels = list[list[str]]  # one column's labels of the words of each sentence
Sentence = tuple[list[str], list[list[str]]]
"""The words of a sentence, and for each column the labels of the words."""


@dataclass(frozen=True, slots=True)
class WordTask:
    """Words and their labels, to train a probe and to test it."""

    name: str  # the stem of the file
    columns: tuple[str, ...]  # the names of the columns of labels
    train: list[Sentence]
    test: list[Sentence]

    def score(self, model: Any) -> TaskResult:
        """Accuracy, and F1 of spans, for each column and state; uses the model's `encode_words`."""
        found, train = TaskResult(self.name, {}, {}), self._sample()
        for suffix, previous in STATES.items():
            known, tested = (_vectors(model, part, previous) for part in (train, self.test))
            for number, column in enumerate(self.columns):
                gold = _column(self.test, number)
                predicted = _predict(known, _column(train, number), tested, gold)
                for metric, (hits, of) in _measure(gold, predicted).items():
                    name = f"{column}{suffix} {metric}"
                    found.scores[name] = float(hits.sum() / max(of.sum(), 1))
                    found.items.update({f"{name} hits": hits, f"{name} of": of})
        return found

    def _sample(self) -> list[Sentence]:
        """Random sentences with `TRAIN_WORDS` words in all."""
        order = np.random.default_rng(0).permutation(len(self.train))
        lengths = np.cumsum([len(self.train[i][0]) for i in order])
        return [self.train[i] for i in order[: int(np.searchsorted(lengths, TRAIN_WORDS)) + 1]]


def load_probe(path: str | Path) -> WordTask:
    """Read the words to test on, and those to train on, from the file beside them.

    Args:
        path: a file with ``dev`` or ``test`` in its name; the other file has ``train`` instead.

    Raises:
        DataError: a file is missing or malformed; the message names file and line.
        MissingExtraError: spans are to be scored and seqeval is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file. Fix: check the path after 'words:'.")
    partner = path.with_name(_SPLIT.sub("train", path.name))
    if partner == path or not partner.is_file():
        given = f"there is no file to train on beside it ({partner.name})"
        raise fault(path, given, "give NAME_dev or NAME_test with NAME_train beside it")
    (names, train), (others, test) = _read(partner), _read(path)
    if names != others:
        raise fault(path, f"other columns than {partner.name}", "give files of one layout")
    columns: dict[int, str] = {}  # number → name of each column that is probed
    for number, name in enumerate(names):
        known = set().union(*_column(train, number))
        if not 1 < len(known) <= _MOST_LABELS:
            count = "one label only" if len(known) < 2 else f"{len(known):,} different labels"
            if not name:
                raise fault(partner, f"column {number + 2} has {count}", "leave it out")
            logger.warning("%s: %s is not probed, as it has %s.", partner, name, count)
            continue
        columns[number] = name or _name(number, set().union(*_column(test, number)))
        if re.match("chunk|ner|span", columns[number]) and find_spec("seqeval") is None:
            raise MissingExtraError("seqeval", "eval")
    if not columns:
        raise fault(partner, "no column has labels that differ", "give another file")
    train, test = (
        [(words, [labels[number] for number in columns]) for words, labels in part]
        for part in (train, test)
    )
    return WordTask(path.resolve().stem, tuple(columns.values()), train, test)


def _read(path: Path) -> tuple[list[str], list[Sentence]]:
    """The names of the columns of labels, empty if the format has none, and the sentences."""
    numbers, rows, width = _rows(path)
    counted = _counts_words(rows)
    if counted:  # without ranges and empty nodes
        rows = [[row for row in sentence if row[0].isdecimal()] for sentence in rows]
    names = [""] * (width - 1 - counted)
    if counted and width == 10:
        every = [row for sentence in rows for row in sentence]
        used = [n for n in _CONLLU if n == 1 or any(row[n] != "_" for row in every)]
        rows = [[[row[n] for n in used] for row in sentence] for sentence in rows]
        names = [_CONLLU[n] for n in used[1:]]
    elif counted:
        rows = [[row[1:] for row in sentence] for sentence in rows]
    if not names:
        first = numbers[0] if numbers else None
        given = f"no label after {' '.join(rows[0][0])[:40]!r}"
        raise fault(path, given, "write: word TAB label", first)
    found = []
    for words_of in rows:
        for start in range(0, len(words_of), LONGEST):
            words, *columns = map(list, zip(*words_of[start : start + LONGEST], strict=True))
            found.append((words, columns))
    return names, found


def _rows(path: Path) -> tuple[list[int], list[list[list[str]]], int]:
    """Line numbers of the words, their cells sentence by sentence, and the number of columns.

    A line that begins with ``#`` is a comment, unless it looks like a word: it has as many cells as
    the other lines, and a label that other words have.
    """
    lines: list[tuple[int, str]] = list(numbered_lines(path))
    plain = [line for _, line in lines if line.strip() and not _is_mark(line)]
    if not plain:
        raise fault(path, "there are no words in it", "write one word per line, then its labels")
    tabs = "\t" in next((line for line in plain if not line.startswith("#")), plain[0])
    sure = [_cells(line, tabs) for line in plain if not line.startswith("#")]
    width = len(sure[0]) if sure else len(_cells(plain[0], tabs))
    known = [{cells[n] for cells in sure if n < len(cells)} for n in range(width)]
    numbers, sentences = [], list[list[list[str]]]([[]])
    for number, line in lines:
        if not line.strip() or _is_mark(line):
            sentences.append([])
            continue
        cells = _cells(line, tabs)
        if line.startswith("#") and sure and not _is_word(cells, known):
            continue
        if len(cells) != width:
            shown = plain[0] if not sure else "\t".join(sure[0])
            given = f"{len(cells)} columns instead of {width} as in {shown[:40]!r}"
            raise fault(path, given, "give every word the same labels", number)
        numbers.append(number)
        sentences[-1].append(cells)
    return numbers, [sentence for sentence in sentences if sentence], width


def _is_mark(line: str) -> bool:
    return line.startswith("-DOCSTART-")


def _cells(line: str, tabs: bool) -> list[str]:
    """The cells of a line; white space other than tab and space is part of a word."""
    return line.split("\t") if tabs else re.split(r"[ \t]+", line.strip(" \t"))


def _is_word(cells: list[str], known: list[set[str]]) -> bool:
    """Whether a line that begins with ``#`` has a label that words have in the same column."""
    pairs = zip(cells[1:], known[1:], strict=False)
    return len(cells) == len(known) > 1 and any(cell in labels for cell, labels in pairs)


def _counts_words(sentences: list[list[list[str]]]) -> bool:
    """Whether the first column numbers the words of every sentence: 1, 2, 2-3, 3, 3.1 and so on."""
    for sentence in sentences:
        if not all(_NUMBER.fullmatch(row[0]) for row in sentence):
            return False
        whole = [int(row[0]) for row in sentence if row[0].isdecimal()]
        if whole != list(range(1, len(whole) + 1)):
            return False
    return any(len(row) > 1 for sentence in sentences for row in sentence)


def _name(number: int, labels: set[str]) -> str:
    """The name of a column of labels, judged by its labels."""
    if all(_SPAN.fullmatch(label) for label in labels):
        kinds = {label.partition("-")[2] for label in labels} - {""}
        if kinds & _PHRASES:
            return "chunk"
        return "ner" if kinds <= _ENTITIES else f"span{number + 2}"
    if labels & _UNIVERSAL and len(labels) < 20:
        return "upos"
    return "pos" if {"NN", "IN"} <= labels else f"column{number + 2}"


def _column(sentences: list[Sentence], number: int) -> Labels:
    return [columns[number] for _, columns in sentences]


def _vectors(model: Any, sentences: list[Sentence], previous: bool) -> np.ndarray:
    words = [words for words, _ in sentences]
    vectors = np.concatenate(model.encode_words(words, previous=previous))
    return finite(vectors, [word for sentence in words for word in sentence], None)


def _predict(train: np.ndarray, labels: Labels, test: np.ndarray, gold: Labels) -> Labels:
    """Train a logistic regression, and predict the labels of the test words, shaped as `gold`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the same limit for every model
        probe.fit(train, [label for row in labels for label in row])
    predicted = iter(probe.predict(test).tolist())
    return [[next(predicted) for _ in row] for row in gold]


def _measure(gold: Labels, predicted: Labels) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each metric, numerator and denominator of each sentence."""
    pairs = list(zip(gold, predicted, strict=True))
    right = [sum(g == s for g, s in zip(*pair, strict=True)) for pair in pairs]
    measured = {"accuracy": (np.array(right), np.array([len(g) for g, _ in pairs]))}
    if all(_SPAN.fullmatch(label) for row in gold for label in row):
        from seqeval.metrics.sequence_labeling import get_entities

        spans = [(set(get_entities(g)), set(get_entities(s))) for g, s in pairs]
        hits = np.array([2 * len(g & s) for g, s in spans])
        measured["f1"] = (hits, np.array([len(g) + len(s) for g, s in spans]))
    return measured
