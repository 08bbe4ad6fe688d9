"""Reads evaluation tasks from plain files, whose columns determine the kind of task.

    .tsv  score, sentence1, sentence2     similarity as judged by people (STS)
    .tsv  label, sentence1, sentence2     pair classification, label 1 or 0
    .tsv  label, text                     clustering; classification if the file is called
                                          NAME_test.tsv and NAME_train.tsv is beside it
    .jsonl  query, positive, negative     reranking: one query per line, texts or lists of texts
    folder  train.tsv, test.tsv           classification
    folder  corpus.jsonl, queries.jsonl, qrels/test.tsv        retrieval in the BEIR layout

Every error names the file, the line and a fix, which mteb's loaders do not. Cost: one pass over
each file.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from unmasked.errors import DataError, nearest, no_such_path
from unmasked.evaluate.tasks import kinds
from unmasked.files import readers

logger = logging.getLogger(__name__)

SCORED = ("score", "sentence1", "sentence2")
PAIRED = ("label", "sentence1", "sentence2")
LABELLED = ("label", "text")
LAYOUTS = (SCORED, PAIRED, LABELLED)
QRELS = ("query-id", "corpus-id", "score")
BEIR = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")
SPLITS = ("train.tsv", "test.tsv")


def load_task(path: str | Path) -> kinds.Task:
    """Read a task from local files; see the module for their formats.

    Raises:
        DataError: a file is missing or malformed; the message names file, line and fix.
    """
    path = Path(path)
    if path.is_dir():
        split = [file for name in SPLITS if (file := path / name).is_file()]
        if len(split) == 1:
            given = f"a classification task is a folder with {' and '.join(SPLITS)}; one is missing"
            raise fault(path, given, "add the file")
        name = path.resolve().name
        return _load_classification(name, *split) if split else _load_retrieval(path)
    if not path.exists():
        raise DataError(no_such_path(path))
    if path.suffix == ".jsonl":
        return _load_reranking(path)
    if path.suffix != ".tsv":
        tables = "; or ".join(", ".join(columns) for columns in LAYOUTS)
        allowed = f"a .tsv file ({tables}), a .jsonl file (query, positive, negative) or a folder"
        given = f"'{path.suffix}' given, but a task is {allowed}"
        raise fault(path, given, "convert or rename the file")
    header = next((line for _, line in numbered_lines(path) if line.strip(" ")), "").split("\t")
    layout = max(LAYOUTS, key=lambda columns: _likeness(columns, header))
    return _load_labelled(path) if layout == LABELLED else _load_pairs(path, layout)


def fault(path: Path, given: str, fix: str, line: int | None = None) -> DataError:
    """An error that names the file and line, says what is wrong there and how to fix it."""
    return readers.fault_error(readers.where(str(path), line) if line else str(path), (given, fix))


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The number (from 1) and the text of every line."""
    rows = readers.checked(str(path), readers.read_txt(str(path), "line"))
    return ((number, row["line"]) for number, row in rows)


def _likeness(columns: Sequence[str], header: Sequence[str]) -> tuple[int, int]:
    """How well a header fits a layout: number of equal columns, then of similar columns."""
    missing = [column for column in columns if column not in header]
    return len(columns) - len(missing), sum(bool(nearest(c, header, end="")) for c in missing)


def _load_pairs(path: Path, layout: tuple[str, ...]) -> kinds.PairTask:
    rows = list(readers.read_tsv(str(path), layout))
    texts = {None: [fields[side] for side in (1, 2) for _, fields in rows]}
    if layout == SCORED:
        scores = [_number(path, line, score) for line, (score, _, _) in rows]
        _check_varied(path, "score", scores, "pairs with different scores")
        return kinds.StsTask(path.resolve().stem, texts, np.array(scores))
    for line, (label, _, _) in rows:
        if label not in ("0", "1"):
            given = f"label '{label[:60]}' is not 0 or 1"
            raise fault(path, given, _as_score(path, [row[0] for _, row in rows]), line)
    labels = [label for _, (label, _, _) in rows]
    _check_varied(path, "label", labels, "pairs of both kinds, 0 and 1")
    return kinds.PairTask(path.resolve().stem, texts, np.array(labels, dtype=int))


def _as_score(path: Path, labels: Sequence[str]) -> str:
    """The fix for labels that are neither 0 nor 1, which may be similarity scores."""
    numbers = set[float]()
    with suppress(ValueError):
        numbers = {float(label) for label in labels}
    if len(numbers) <= 2:
        return "write 1 for a match and 0 for none"
    command = shlex.join(["sed", "-i", "1s/label/score/", str(path)])
    return (
        f"labels run from {min(numbers):g} to {max(numbers):g}, so if they say how similar a pair "
        f"is, call the column 'score': {command}"
    )


def _load_labelled(path: Path) -> kinds.Task:
    """Classification if the file is NAME_test.tsv beside NAME_train.tsv, else clustering."""
    stem = path.resolve().stem
    train = path.with_name(f"{stem.removesuffix('_test')}_train.tsv")
    test = path.with_name(f"{stem.removesuffix('_train')}_test.tsv")
    if stem.endswith("_test") and train.is_file():
        return _load_classification(stem.removesuffix("_test"), train, path)
    if stem.endswith("_train") and test.is_file():
        given = f"the task of {test.name} is trained on this file"
        raise fault(path, given, f"give {test.name}, or rename this file to cluster it")
    _, labels, texts = _labelled(path)
    return kinds.ClusteringTask(stem, {None: texts}, np.array(labels))


def _load_classification(name: str, train: Path, test: Path) -> kinds.ClassificationTask:
    (_, known, train_texts), (lines, labels, texts) = _labelled(train), _labelled(test)
    allowed = set(known)
    for line, label in zip(lines, labels, strict=True):
        if label not in allowed:
            given = f"label '{label[:60]}' does not occur in {train.name}{nearest(label, allowed)}"
            raise fault(test, given, "add it there", line)
    every = {None: [*train_texts, *texts]}
    return kinds.ClassificationTask(name, every, np.array(known), np.array(labels))


def _labelled(path: Path) -> tuple[list[int], list[str], list[str]]:
    """Line, label and text of each row."""
    rows = list(readers.read_tsv(str(path), LABELLED))
    labels = [label for _, (label, _) in rows]
    _check_varied(path, "label", labels, "texts of at least two labels")
    return [line for line, _ in rows], labels, [text for _, (_, text) in rows]


def _check_varied(path: Path, what: str, values: Sequence[Any], wanted: str) -> None:
    if len(set(values)) == 1:
        given = f"every {what} is {values[0]!r:.60} ({len(values)} rows), so nothing can be scored"
        raise fault(path, given, f"give {wanted}")


def _load_reranking(path: Path) -> kinds.RerankingTask:
    queries, candidates, relevant = [], [], []
    place: dict[str, int] = {}  # distinct document → its position
    for line, row in readers.checked(str(path), readers.read(str(path), {})):
        wrong = readers.string_fault("query", row.get("query"))
        if "query" not in row:
            wrong = readers.absent("query", row, "add it")
        if wrong is not None:
            raise fault(path, *wrong, line)
        positive, negative = (_candidates(path, line, row, key) for key in ("positive", "negative"))
        queries.append(row["query"])
        candidates.append([place.setdefault(t, len(place)) for t in (*positive, *negative)])
        relevant.append(len(positive))
    if not queries:
        raise fault(path, "the file is empty", "write one JSON object per line")
    texts = {"query": queries, "document": list(place)}
    return kinds.RerankingTask(path.resolve().stem, texts, candidates, relevant)


def _candidates(path: Path, line: int, row: Any, key: str) -> list[str]:
    texts = [row[key]] if isinstance(row.get(key), str) else row.get(key)
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return texts
    missing = "relevant" if key == "positive" else "other"
    given = f"query '{row['query'][:60]}' has no {missing} documents under '{key}'"
    raise fault(path, given, f"give '{key}', a text or a list of texts", line)


def _load_retrieval(folder: Path) -> kinds.RetrievalTask:
    corpus, questions, qrels = (folder / name for name in BEIR)
    for name in BEIR:
        if not (folder / name).is_file():
            given = f"a retrieval task is a folder with {', '.join(BEIR)}, and {name} is missing"
            raise fault(folder, given, "add the file")
    documents, queries = _records(corpus, titled=True), _records(questions)
    positions = {document: position for position, document in enumerate(documents)}
    judged: dict[str, dict[str, float]] = {}
    for line, (query, document, score) in readers.read_tsv(str(qrels), QRELS):
        grades, grade = judged.setdefault(query, {}), _number(qrels, line, score)
        if grades.setdefault(document, grade) != grade:
            given = f"query '{query}', document '{document}' has score {score}, but another above"
            raise fault(qrels, given, "keep one of the lines", line)
    named = {document: None for grades in judged.values() for document in grades}
    _warn_unknown(qrels, questions, "are left out", judged, queries)
    _warn_unknown(qrels, corpus, "count as not found", named, positions)
    tested = [query for query in queries if query in judged]
    wanted = [{d: g for d, g in judged[query].items() if g > 0} for query in tested]
    if not any(wanted):
        raise fault(qrels, "no query has a document with a score above 0", "add such lines")
    if unanswered := [query for query, own in zip(tested, wanted, strict=True) if not own]:
        _warn(qrels, unanswered, "queries have no document with a score above 0 and count as 0")
    if unjudged := queries.keys() - judged.keys() - _judged_elsewhere(qrels):
        _warn(qrels, sorted(unjudged), "queries are not judged and are left out")
    return kinds.RetrievalTask(
        folder.resolve().name,
        {"document": list(documents.values()), "query": [queries[query] for query in tested]},
        list(documents),
        tested,
        [{positions[d]: g for d, g in own.items() if d in positions} for own in wanted],
        [[g for d, g in own.items() if d not in positions] for own in wanted],
    )


def _warn_unknown(
    qrels: Path, file: Path, end: str, named: Mapping[str, Any], known: Mapping[str, Any]
) -> None:
    """Warn of judged ids that a file does not have; refuse judgements of which it has none.

    Published judgements contain unknown ids, and trec_eval accepts them.
    """
    unknown = [name for name in named if name not in known]
    if named and len(unknown) == len(named):
        given = f"none of its ids is in {file.name} ('{unknown[0]}', but '{next(iter(known))}')"
        raise fault(qrels, given, f"give the judgements that belong to {file.name}")
    if unknown:
        _warn(qrels, unknown, f"ids are not in {file.name} and {end}")


def _warn(qrels: Path, named: Sequence[str], what: str) -> None:
    more = ", ..." if len(named) > 3 else ""
    logger.warning("%s: %d %s (%s%s)", qrels, len(named), what, ", ".join(named[:3]), more)


def _judged_elsewhere(qrels: Path) -> set[str]:
    """The queries of the other splits, which need no judgement in the test set."""
    splits = [path for path in qrels.parent.glob("*.tsv") if path.name != qrels.name]
    lines = (line for path in sorted(splits) for _, line in numbered_lines(path))
    return {line.split("\t", 1)[0] for line in lines}


def _records(path: Path, titled: bool = False) -> dict[str, str]:
    """Id → text of a BEIR .jsonl file; as in mteb, a document's title comes before its text."""
    texts: dict[str, str] = {}
    for line, row in readers.checked(str(path), readers.read(str(path), {})):
        name, title, text = row.get("_id"), row.get("title") or "", row.get("text")
        if not (isinstance(name, str) and isinstance(title, str) and isinstance(text, str)):
            fix = 'write an object of strings, such as {"_id": "1", "title": "", "text": "..."}'
            raise fault(path, f"{str(row)[:60]!r} lacks a string '_id' or 'text'", fix, line)
        if name in texts:
            fix = "remove this line or give it another id"
            raise fault(path, f"id '{name}' was given above already", fix, line)
        texts[name] = f"{title} {text}".strip() if titled else text
    if not texts:
        raise fault(path, "the file is empty", "write one JSON object per line")
    return texts


def _number(path: Path, line: int, given: str) -> float:
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise fault(path, f"score {given[:60]!r} is not a number", "write one such as 3.5", line)
    return number
