"""Reads evaluation tasks from plain files; what kind of task a file is, its columns say.

    .tsv  score, sentence1, sentence2     similarity people see (STS)
    .tsv  label, sentence1, sentence2     pair classification, label 1 or 0
    .tsv  label, text                     clustering; classification if it is called NAME_test.tsv
                                          and NAME_train.tsv lies beside it
    .jsonl  query, positive, negative     reranking, one query a line, texts or lists of texts
    folder  train.tsv, test.tsv           classification
    folder  corpus.jsonl, queries.jsonl, qrels/test.tsv        retrieval, BEIR layout

Every fault names the file, the line and the fix. Cost: one pass over each file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unmasked.errors import DataError, nearest
from unmasked.evaluate.tasks.kinds import (
    ClassificationTask,
    ClusteringTask,
    PairTask,
    RerankingTask,
    RetrievalTask,
    StsTask,
    Task,
    Texts,
)
from unmasked.files import readers

SCORED = ("score", "sentence1", "sentence2")
PAIRED = ("label", "sentence1", "sentence2")
LABELLED = ("label", "text")
BEIR = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")
SPLITS = ("train.tsv", "test.tsv")
_LAYOUTS = (SCORED, PAIRED, LABELLED)  # of equally likely ones the first is meant


def load_task(path: str | Path) -> Task:
    """Reads a task from local files; see the module for the formats.

    Raises:
        DataError: A file is missing or malformed; the message names file, line and fix.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder. Fix: check the path.")
    if path.suffix == ".jsonl":
        return _load_reranking(path)
    if path.suffix != ".tsv":
        allowed = (
            "a task is a .tsv file (score, sentence1, sentence2; label, sentence1, sentence2; or "
            "label, text), a .jsonl file (query, positive, negative) or a folder"
        )
        raise fault(path, f"'{path.suffix}' given, but {allowed}", "convert or rename the file")
    _, first = next(read_lines(path), (0, ""))
    header = first.split("\t")
    layout = max(_LAYOUTS, key=lambda columns: _likeness(columns, header))
    if layout == SCORED:
        return _load_sts(path)
    return _load_pairs(path) if layout == PAIRED else _load_labelled(path)


def _likeness(columns: Sequence[str], header: Sequence[str]) -> tuple[int, int]:
    """How well a header fits a layout: columns that it has, then columns that it nearly has."""
    missing = [column for column in columns if column not in header]
    return len(columns) - len(missing), sum(bool(nearest(column, header, "")) for column in missing)


def _load_folder(folder: Path) -> Task:
    if all((folder / name).is_file() for name in SPLITS):
        name = folder.resolve().name
        return _load_classification(name, *(folder / name for name in SPLITS))
    if any((folder / name).is_file() for name in SPLITS):
        given = f"a classification task is a folder with {' and '.join(SPLITS)}; one is missing"
        raise fault(folder, given, "add the file")
    return _load_retrieval(folder)


def _load_sts(path: Path) -> StsTask:
    rows = list(_rows(path, SCORED))
    gold = np.array([_number(path, line, score) for line, (score, _, _) in rows])
    if np.ptp(gold) == 0:
        given = f"every score is {gold[0]:g} ({len(gold)} pairs), so no correlation is defined"
        raise fault(path, given, "give pairs with different scores")
    first, second = ([fields[column] for _, fields in rows] for column in (1, 2))
    return StsTask(path.resolve().stem, {None: first + second}, gold)


def _load_pairs(path: Path) -> PairTask:
    rows = list(_rows(path, PAIRED))
    for line, (label, _, _) in rows:
        if label not in ("0", "1"):
            raise fault(path, f"label '{label[:60]}' is not 0 or 1", "write 1 for a match", line)
    labels = np.array([int(label) for _, (label, _, _) in rows])
    _check_labels(path, [label for _, (label, _, _) in rows], "pairs of both kinds, 0 and 1")
    first, second = ([fields[column] for _, fields in rows] for column in (1, 2))
    return PairTask(path.resolve().stem, {None: first + second}, labels)


def _load_labelled(path: Path) -> Task:
    """Classification if the other half lies beside the file, else clustering."""
    stem = path.resolve().stem
    train = path.with_name(f"{stem.removesuffix('_test')}_train.tsv")
    test = path.with_name(f"{stem.removesuffix('_train')}_test.tsv")
    if stem.endswith("_test") and train.is_file():
        return _load_classification(stem.removesuffix("_test"), train, path)
    if stem.endswith("_train") and test.is_file():
        given = f"this is what the task of {test.name} is trained on"
        raise fault(path, given, f"give {test.name}, or rename this file to cluster it")
    labels, texts = _labelled(path)
    return ClusteringTask(stem, {None: texts}, np.array(labels))


def _load_classification(name: str, train: Path, test: Path) -> ClassificationTask:
    (train_labels, train_texts), (labels, texts) = _labelled(train), _labelled(test)
    for (line, (label, _)), _ in zip(_rows(test, LABELLED), labels, strict=True):
        if label not in train_labels:
            given = f"label '{label[:60]}' does not occur in {train.name}"
            raise fault(test, f"{given}{nearest(label, set(train_labels))}", "add it there", line)
    return ClassificationTask(name, train_texts, train_labels, texts, labels)


def _labelled(path: Path) -> tuple[list[str], list[str]]:
    rows = [fields for _, fields in _rows(path, LABELLED)]
    labels, texts = [label for label, _ in rows], [text for _, text in rows]
    _check_labels(path, labels, "texts of at least two labels")
    return labels, texts


def _check_labels(path: Path, labels: Sequence[str], wanted: str) -> None:
    if len(set(labels)) == 1:
        given = f"every label is '{labels[0][:60]}' ({len(labels)} rows), so nothing can be told"
        raise fault(path, f"{given} apart", f"give {wanted}")


def _load_reranking(path: Path) -> RerankingTask:
    queries, candidates, relevant = [], [], []
    for line, record in _checked(path, readers.read(str(path), {})):
        query: Any = record.get("query")
        wrong = readers.string_fault("query", query)
        if "query" not in record:
            wrong = readers.absent("query", record, "add it")
        if wrong is not None:
            raise fault(path, *wrong, line)
        sides = []
        for key in ("positive", "negative"):
            texts = record.get(key)
            texts = [texts] if isinstance(texts, str) else texts
            if not (isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)):
                given = (
                    f"query '{query[:60]}' has no {'relevant' if key == 'positive' else 'other'}"
                )
                fix = f"give '{key}', a text or a list of texts"
                raise fault(path, f"{given} documents under '{key}'", fix, line)
            sides.append(texts)
        queries.append(query)
        candidates.append([*sides[0], *sides[1]])
        relevant.append(len(sides[0]))
    if not queries:
        raise fault(path, "the file is empty", "give one JSON object a line")
    return RerankingTask(path.resolve().stem, queries, candidates, relevant)


def _load_retrieval(folder: Path) -> RetrievalTask:
    for name in BEIR:
        if not (folder / name).is_file():
            given = f"a retrieval task is a folder with {', '.join(BEIR)}, and {name} is missing"
            raise fault(folder, given, "add the file")
    corpus, questions, qrels = (folder / name for name in BEIR)
    documents, queries = _records(corpus), _records(questions)
    positions = {document: position for position, document in enumerate(documents)}
    judged: dict[str, dict[int, float]] = {}
    for line, (query, document, score) in _rows(qrels, ("query-id", "corpus-id", "score")):
        for name, known, path in ((query, queries, questions), (document, positions, corpus)):
            if name not in known:
                given = f"id '{name}' is none of the {len(known)} of {path.name}"
                fix = "add it there or remove this line"
                raise fault(qrels, f"{given} (such as '{next(iter(known))}')", fix, line)
        grades, grade = judged.setdefault(query, {}), _number(qrels, line, score)
        if grades.setdefault(positions[document], grade) != grade:
            given = f"query '{query}', document '{document}': score {score}, another one above"
            raise fault(qrels, given, "keep one of the lines", line)
    tested = _tested(queries, judged, qrels)
    asked = [queries[query] for query in tested]
    texts: Texts = {"document": list(documents.values()), "query": asked}
    name, grades_of = folder.resolve().name, list(tested.values())
    return RetrievalTask(name, texts, list(documents), grades_of)


def _tested(
    queries: Iterable[str], judged: dict[str, dict[int, float]], qrels: Path
) -> dict[str, dict[int, float]]:
    """The relevant documents of each query; queries of other splits alone are left out."""
    others = [path for path in sorted(qrels.parent.glob("*.tsv")) if path.name != qrels.name]
    elsewhere = {line.split("\t", 1)[0] for path in others for _, line in read_lines(path)}
    tested = {}
    for query in queries:
        grades = {d: grade for d, grade in judged.get(query, {}).items() if grade > 0}
        if grades:
            tested[query] = grades
        elif query in judged or query not in elsewhere:
            fix = "add a line with one, or remove the query here and from queries.jsonl"
            raise fault(qrels, f"query '{query}' has no document with a score above 0", fix)
    return tested


def _records(path: Path) -> dict[str, str]:
    """Text by id of a BEIR .jsonl file; a title goes before a text that does not repeat it."""
    texts: dict[str, str] = {}
    for line, fields in _checked(path, readers.read(str(path), {})):
        name, title, text = fields.get("_id"), fields.get("title") or "", fields.get("text")
        if not (isinstance(name, str) and isinstance(title, str) and isinstance(text, str)):
            fix = 'write an object of strings, such as {"_id": "1", "title": "", "text": "..."}'
            raise fault(path, f"{str(fields)[:60]!r} lacks a string '_id' or 'text'", fix, line)
        if name in texts:
            fix = "remove this line or give it another id"
            raise fault(path, f"id '{name}' was given above already", fix, line)
        texts[name] = text if text.startswith(title) else f"{title} {text}".strip()
    if not texts:
        raise fault(path, "the file is empty", "give one JSON object a line")
    return texts


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Line number and the named columns of each row of a .tsv file with a header."""
    lines = read_lines(path)
    _, first = next(lines, (0, ""))
    header = first.split("\t")
    fix = f"begin with the header {', '.join(columns)}, separated by tabs; rows below"
    if not first:
        raise fault(path, "the file is empty", fix)
    for column in columns:
        if column not in header:
            given = f"no column '{column}' in {first[:60]!r}{nearest(column, header).rstrip('?')}"
            raise fault(path, given, fix, 1)
    line = 0
    for line, given in lines:
        fields = given.split("\t")
        if len(fields) != len(header):
            given = f"{len(fields)} columns instead of {len(header)} in {given[:60]!r}"
            raise fault(path, given, "put one tab between columns, none inside a text", line)
        yield line, [fields[header.index(column)] for column in columns]
    if not line:
        raise fault(path, "the file is empty below its header", "add rows")


def _number(path: Path, line: int, given: str) -> float:
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise fault(path, f"score {given[:60]!r} is no number", "write one such as 3.5", line)
    return number


def read_lines(path: Path, blank: bool = False) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line; those that are blank only if asked.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, values in _checked(path, readers.read_lines(str(path), "line")):
        line = values["line"]
        if blank or line.strip(" "):
            yield number, line


def _checked(path: Path, rows: Iterable[readers.Cells]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and columns of each row; the first that could not be read is an error."""
    for number, values, wrong in rows:
        if wrong is not None:
            raise fault(path, *wrong, number)
        yield number, values


def fault(path: Path, given: str, fix: str, line: int | None = None) -> DataError:
    """An error that says which file, which line, what is wrong there and what to do."""
    where = readers.where(str(path), line) if line else str(path)
    return readers.fault_error(where, (given, fix))
