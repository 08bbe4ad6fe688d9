"""What a model knows of single words: a linear probe on frozen vectors, from CoNLL-style files.

One word a line, its labels behind it (separated by tabs or spaces), a blank line after a sentence.
Every column of labels is a task of its own, called by what it holds: ``pos``, ``chunk``, ``ner``,
or by its number. Of a word both states are probed: its own, and the one before (``before``), where
masked next token prediction puts what it knows (arXiv 2404.05961, section 4).

Token accuracy counts every word, ``O`` included, as the paper does; columns of spans (B-, I-) also
get the F1 of whole spans (seqeval), by which models differ more.

Cost: encoding all words, then one logistic regression a column and state: about ten seconds for
`TRAIN_WORDS` words of width 256.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unmasked.errors import DataError, MissingExtraError
from unmasked.evaluate.bootstrap import TaskResult, ratio_keys
from unmasked.evaluate.tasks.files import fault, read_lines
from unmasked.evaluate.tasks.vectors import finite

TRAIN_WORDS = 30_000  # of whole sentences, drawn from all
LONGEST = 60  # words; what is longer is cut into pieces of this many, so no model cuts it
STATES = {"": False, " before": True}
_UNIVERSAL = {"ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "NOUN", "PRON", "PROPN", "SCONJ"}
_ENTITIES = {"PER", "LOC", "ORG", "MISC", "O"}
_PHRASES = {"NP", "VP", "PP"}
_SPLIT = re.compile(r"(dev|valid|testa|testb|test)(?=[^a-z]*\.[a-z]+$|$)")
_SPAN = re.compile(r"O|[BIES]-.+")

Sentence = tuple[list[str], list[tuple[str, ...]]]
"""Words, and the labels of each."""


@dataclass(frozen=True, slots=True)
class WordTask:
    """Words and their labels, to train a probe and to judge it.

    Attributes:
        name: the file's stem.
        columns: what each column of labels is called.
        train, test: sentences.
    """

    name: str
    columns: tuple[str, ...]
    train: list[Sentence]
    test: list[Sentence]
    kind: str = "words"

    def score(self, model: Any) -> TaskResult:
        """Accuracy, and F1 for spans, of each column and state.

        Args:
            model: has ``encode_words``.

        Raises:
            DataError: a vector is not finite.
        """
        scores: dict[str, float] = {}
        items: dict[str, np.ndarray] = {}
        train = self._sample()
        for suffix, previous in STATES.items():
            known = [_vectors(model, part, previous) for part in (train, self.test)]
            for number, column in enumerate(self.columns):
                labels = [_column(part, number) for part in (train, self.test)]
                said = _probe(known[0], labels[0], known[1], self.test)
                for metric, (hits, of) in _measure(labels[1], said).items():
                    name = f"{column}{suffix} {metric}"
                    scores[name] = float(hits.sum() / max(of.sum(), 1))
                    items |= dict(zip(ratio_keys(name), (hits, of), strict=True))
        return TaskResult(self.name, scores, items)

    def _sample(self) -> list[Sentence]:
        """Sentences drawn until there are enough words."""
        order = np.random.default_rng(0).permutation(len(self.train))
        lengths = np.cumsum([len(self.train[i][0]) for i in order])
        return [self.train[i] for i in order[: int(np.searchsorted(lengths, TRAIN_WORDS)) + 1]]


def load_probe(path: str | Path) -> WordTask:
    """Reads the words to judge by, and those to train on, which lie beside them.

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
        given = f"no file to train on beside it ({partner.name})"
        raise fault(path, given, "give NAME_dev or NAME_test with NAME_train beside it")
    train, test = _read(partner), _read(path)
    widths = [len(labels) for part in (train, test) for _, rows in part for labels in rows]
    if len(set(widths)) > 1:
        raise fault(path, f"other columns than {partner.name}", "give files of one layout")
    columns = tuple(
        _name(number, {label for rows in _column(test, number) for label in rows})
        for number in range(widths[0])
    )
    for number, column in enumerate(columns):
        if len({label for rows in _column(train, number) for label in rows}) < 2:
            raise fault(partner, f"column {number + 2} has one label only", "leave it out")
        if column in ("chunk", "ner") or column.startswith("span"):
            _entities()
    return WordTask(path.resolve().stem, columns, train, test)


def _read(path: Path) -> list[Sentence]:
    sentences: list[Sentence] = [([], [])]
    separator, width, expected = None, 0, ""
    for number, line in read_lines(path, blank=True):
        if not line.strip() or line.startswith("-DOCSTART-"):
            sentences.append(([], []))
            continue
        if not width:
            if line.startswith("#") and "\t" not in line:
                continue
            separator = "\t" if "\t" in line else None
            width, expected = len(line.split(separator)), line
        word, *labels = line.split(separator)
        if len(labels) + 1 != width:
            if line.startswith("#"):
                continue  # a comment
            given = f"{len(labels) + 1} columns instead of {width} as in {expected[:40]!r}"
            raise fault(path, given, "give every word the same labels", number)
        if not labels:
            raise fault(path, f"no label behind {word[:40]!r}", "write: word TAB label", number)
        sentences[-1][0].append(word)
        sentences[-1][1].append(tuple(labels))
    found = [
        (words[start : start + LONGEST], rows[start : start + LONGEST])
        for words, rows in sentences
        for start in range(0, len(words), LONGEST)
    ]
    if not found:
        raise fault(path, "there are no words in it", "write one word a line, then its labels")
    return found


def _name(number: int, labels: set[str]) -> str:
    """What a column of labels is called, told from the labels."""
    if all(_SPAN.fullmatch(label) for label in labels):
        kinds = {label.partition("-")[2] for label in labels} - {""}
        if kinds & _PHRASES:
            return "chunk"
        return "ner" if kinds <= _ENTITIES else f"span{number + 2}"
    if labels & _UNIVERSAL and len(labels) < 20:
        return "upos"
    return "pos" if {"NN", "IN"} <= labels else f"column{number + 2}"


def _column(sentences: Sequence[Sentence], number: int) -> list[list[str]]:
    return [[labels[number] for labels in rows] for _, rows in sentences]


def _vectors(model: Any, sentences: Sequence[Sentence], previous: bool) -> np.ndarray:
    words = [words for words, _ in sentences]
    vectors = np.concatenate(model.encode_words(words, previous=previous))
    return finite(vectors, [word for sentence in words for word in sentence], None)


def _probe(
    train: np.ndarray, labels: list[list[str]], test: np.ndarray, sentences: Sequence[Sentence]
) -> list[list[str]]:
    """What a logistic regression says of the words of each sentence."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler().fit(train)
    classifier = LogisticRegression(max_iter=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopped alike for every model
        classifier.fit(scale.transform(train), [label for row in labels for label in row])
    said = classifier.predict(scale.transform(test)).tolist()
    ends = np.cumsum([len(words) for words, _ in sentences])
    return [said[end - len(words) : end] for end, (words, _) in zip(ends, sentences, strict=True)]


def _measure(
    gold: list[list[str]], said: list[list[str]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each metric and sentence, what was hit and of how much."""
    pairs = list(zip(gold, said, strict=True))
    right = [sum(g == s for g, s in zip(*pair, strict=True)) for pair in pairs]
    measured = {"accuracy": (np.array(right), np.array([len(g) for g, _ in pairs]))}
    if all(_SPAN.fullmatch(label) for row in gold for label in row):
        get = _entities()
        spans = [(set(get(g)), set(get(s))) for g, s in pairs]
        hits = np.array([2 * len(g & s) for g, s in spans])
        measured["f1"] = (hits, np.array([len(g) + len(s) for g, s in spans]))
    return measured


def _entities() -> Any:
    try:
        from seqeval.metrics.sequence_labeling import get_entities
    except ImportError as error:
        raise MissingExtraError("seqeval", "eval") from error
    return get_entities
