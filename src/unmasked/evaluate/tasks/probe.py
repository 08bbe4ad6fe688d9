"""What a model knows of single words: a linear probe on frozen vectors, from CoNLL-style files.

One word per line with its labels behind it (separated by tabs or spaces) and a blank line after
each sentence. Every column of labels is probed alone and called by what it holds: ``pos``,
``chunk``, ``ner``, or by its number. Two states of each word are probed: its own, and the one
before (``before``), where masked next token prediction puts what it knows (arXiv 2404.05961,
section 4). Token accuracy counts every word, ``O`` included, as the paper does; columns of spans
(B-, I-) also get the F1 of whole spans (seqeval), by which models differ more.

Cost: encoding all words, then one logistic regression per column and state: about ten seconds for
`TRAIN_WORDS` words of width 256.
"""

from __future__ import annotations

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

TRAIN_WORDS = 30_000  # in whole sentences, drawn from all
LONGEST = 60  # words; longer sentences are cut into pieces of this many, so that no model cuts them
STATES = {"": False, " before": True}
_UNIVERSAL = {"ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "NOUN", "PRON", "PROPN", "SCONJ"}
_ENTITIES = {"PER", "LOC", "ORG", "MISC", "O"}
_PHRASES = {"NP", "VP", "PP"}
_SPLIT = re.compile(r"(dev|valid|testa|testb|test)(?=[^a-z]*\.[a-z]+$|$)")
_SPAN = re.compile(r"O|[BIES]-.+")

Labels = list[list[str]]
"""Of the words of each sentence."""
Sentence = tuple[list[str], list[list[str]]]
"""Words, and the labels of all words for each column."""


@dataclass(frozen=True, slots=True)
class WordTask:
    """Words and their labels, to train a probe and to judge it."""

    name: str  # the stem of the file
    columns: tuple[str, ...]  # what each column of labels is called
    train: list[Sentence]
    test: list[Sentence]

    def score(self, model: Any) -> TaskResult:
        """Accuracy, and F1 for spans, of each column and state; the model has ``encode_words``.

        Raises:
            DataError: a vector is not finite.
        """
        found, train = TaskResult(self.name, {}, {}), self._sample()
        for suffix, previous in STATES.items():
            known, asked = (_vectors(model, part, previous) for part in (train, self.test))
            for number, column in enumerate(self.columns):
                gold = _column(self.test, number)
                said = _predict(known, _column(train, number), asked, gold)
                for metric, (hits, of) in _measure(gold, said).items():
                    name = f"{column}{suffix} {metric}"
                    found.scores[name] = float(hits.sum() / max(of.sum(), 1))
                    found.items.update({f"{name} hits": hits, f"{name} of": of})
        return found

    def _sample(self) -> list[Sentence]:
        """Sentences drawn until there are enough words."""
        order = np.random.default_rng(0).permutation(len(self.train))
        lengths = np.cumsum([len(self.train[i][0]) for i in order])
        return [self.train[i] for i in order[: int(np.searchsorted(lengths, TRAIN_WORDS)) + 1]]


def load_probe(path: str | Path) -> WordTask:
    """Read the words to judge by, and those to train on, which lie beside them.

    Args:
        path: a file whose name says ``dev`` or ``test``; its partner says ``train`` there.

    Raises:
        DataError: a file is missing or malformed; the message names file and line.
        MissingExtraError: spans are to be scored and seqeval is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file. Fix: check the path behind 'words:'.")
    partner = path.with_name(_SPLIT.sub("train", path.name))
    if partner == path or not partner.is_file():
        given = f"there is no file to train on beside it ({partner.name})"
        raise fault(path, given, "give NAME_dev or NAME_test with NAME_train beside it")
    train, test = _read(partner), _read(path)
    width, columns = len(test[0][1]), []
    if len(train[0][1]) != width:
        raise fault(path, f"other columns than {partner.name}", "give files of one layout")
    for number in range(width):
        if len(set().union(*_column(train, number))) < 2:
            raise fault(partner, f"column {number + 2} has one label only", "leave it out")
        columns.append(_name(number, set().union(*_column(test, number))))
        if re.match("chunk|ner|span", columns[-1]) and find_spec("seqeval") is None:
            raise MissingExtraError("seqeval", "eval")
    return WordTask(path.resolve().stem, tuple(columns), train, test)


def _read(path: Path) -> list[Sentence]:
    sentences: list[list[list[str]]] = [[]]  # of rows: a word, then its labels
    separator, width, first = None, 0, ""
    for number, line in numbered_lines(path):
        if not line.strip() or line.startswith("-DOCSTART-"):
            sentences.append([])
            continue
        if not width and (not line.startswith("#") or "\t" in line):
            separator = "\t" if "\t" in line else None
            width, first = len(line.split(separator)), line
        cells = line.split(separator)
        if len(cells) != width:
            if line.startswith("#"):
                continue  # a comment
            given = f"{len(cells)} columns instead of {width} as in {first[:40]!r}"
            raise fault(path, given, "give every word the same labels", number)
        if width == 1:
            raise fault(path, f"no label behind {line[:40]!r}", "write: word TAB label", number)
        sentences[-1].append(cells)
    if not width:
        raise fault(path, "there are no words in it", "write one word per line, then its labels")
    found = []
    for rows in sentences:
        for start in range(0, len(rows), LONGEST):
            words, *columns = map(list, zip(*rows[start : start + LONGEST], strict=True))
            found.append((words, columns))
    return found


def _name(number: int, labels: set[str]) -> str:
    """What a column of labels is called, as its labels tell."""
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
    """What a logistic regression says of the words of each sentence of `gold`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopped alike for every model
        probe.fit(train, [label for row in labels for label in row])
    said = iter(probe.predict(test).tolist())
    return [[next(said) for _ in row] for row in gold]


def _measure(gold: Labels, said: Labels) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each metric and sentence, how many were hit, and of how many."""
    pairs = list(zip(gold, said, strict=True))
    right = [sum(g == s for g, s in zip(*pair, strict=True)) for pair in pairs]
    measured = {"accuracy": (np.array(right), np.array([len(g) for g, _ in pairs]))}
    if all(_SPAN.fullmatch(label) for row in gold for label in row):
        from seqeval.metrics.sequence_labeling import get_entities

        spans = [(set(get_entities(g)), set(get_entities(s))) for g, s in pairs]
        hits = np.array([2 * len(g & s) for g, s in spans])
        measured["f1"] = (hits, np.array([len(g) + len(s) for g, s in spans]))
    return measured
