"""Evaluation tasks from plain files, scored for any encoder.

mteb measures the public benchmarks; users' own data lies in a TSV of scored pairs or in a
BEIR-style folder, and a score before and after each training stage has to be cheap. The scores
mean what they mean in mteb and pytrec_eval.

Cost: every distinct text is encoded once and its vector kept (4 bytes x width a text, twice over
while a task is scored); retrieval holds at most 64 MB of similarities at a time.

Shapes: N texts, Q queries, D width, k best documents.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from unmasked.errors import DataError, nearest
from unmasked.evaluate.bootstrap import CORRELATIONS, TaskResult

Encode = Callable[[Sequence[str], str | None], np.ndarray]
"""Texts and their role ("query", "document" or None) to (N, D) float32 vectors."""

Texts = Mapping[str | None, Sequence[str]]
"""What a task has encoded, by role."""

DEPTH = 10  # documents a ranking is judged by
_CHUNK = 2**24  # similarities held at a time


class Task(Protocol):
    """Texts to encode and a way to score their vectors; `name` is the file stem or folder."""

    name: str
    kind: str
    texts: Texts

    def score(self, encode: Encode) -> TaskResult:
        """Scores an encoder; DataError for vectors that are not finite."""


@dataclass(slots=True)
class StsTask:
    """Pairs of sentences and the similarity people see in each, compared with the cosine.

    Attributes:
        texts: All first sentences, then all second ones; no role.
        gold: The similarity of each pair, on any scale.
    """

    name: str
    texts: Texts
    gold: np.ndarray
    kind: str = "sts"

    def score(self, encode: Encode) -> TaskResult:
        """`spearman` (the one to report) and `pearson`; 0 where all cosines are equal."""
        vectors = _vectors(encode, self.texts[None], None)
        first, second = np.split(vectors, 2)
        products = np.einsum("nd,nd->n", first, second, dtype=np.float64)
        cosine = products / (_norms(first) * _norms(second))
        scores = {name: f(cosine, self.gold).item() for name, f in CORRELATIONS.items()}
        return TaskResult(self.name, scores, {"cosine": cosine, "gold": self.gold})


@dataclass(slots=True)
class RetrievalTask:
    """Queries, and for each the documents that answer it.

    Attributes:
        texts: The documents and the queries.
        grades: For each query the grade of its relevant documents, by their position.
    """

    name: str
    texts: Texts
    document_ids: list[str]
    query_ids: list[str]
    grades: list[dict[int, float]]
    kind: str = "retrieval"

    def score(self, encode: Encode) -> TaskResult:
        """`ndcg@10` (the one to report), `recall@1`, `recall@10` and `mrr@10`.

        As in trec_eval the gain is linear, grade / log2(rank + 1); recall is the share of all
        relevant documents; of equal similarities the document with the higher id comes first.
        """
        documents, queries = (_vectors(encode, self.texts[r], r) for r in ("document", "query"))
        id_ranks = np.argsort(np.argsort(self.document_ids))
        best, _ = _most_similar(queries, documents, DEPTH, tie_rank=-id_ranks)
        gains, ideal = np.zeros((2, len(queries), DEPTH))
        for q, grades in enumerate(self.grades):
            gains[q, : best.shape[1]] = [grades.get(document, 0.0) for document in best[q].tolist()]
            highest = sorted(grades.values(), reverse=True)[:DEPTH]
            ideal[q, : len(highest)] = highest
        discounts = 1 / np.log2(np.arange(2, DEPTH + 2))
        found = gains > 0
        relevant = np.array([len(grades) for grades in self.grades])
        items = {
            "ndcg@10": (gains @ discounts) / (ideal @ discounts),
            "recall@1": found[:, 0] / relevant,
            "recall@10": found.sum(axis=1) / relevant,
            "mrr@10": (found / np.arange(1, DEPTH + 1)).max(axis=1),
        }
        scores = {metric: float(values.mean()) for metric, values in items.items()}
        return TaskResult(self.name, scores, items)


def load_task(path: str | Path) -> Task:
    """Reads a task from local files.

    Args:
        path: A `.tsv` file with the columns score, sentence1 and sentence2; or a folder in BEIR
            layout, with corpus.jsonl, queries.jsonl and qrels/test.tsv.

    Raises:
        DataError: A file is missing or malformed; the message names file and line.
    """
    path = Path(path)
    if path.is_dir():
        return _load_retrieval(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder. Fix: check the path.")
    if path.suffix != ".tsv":
        allowed = "a task is a .tsv file (score, sentence1, sentence2) or a BEIR folder"
        raise _fault(path, f"'{path.suffix}' given, but {allowed}", "convert or rename the file")
    return _load_sts(path)


def evaluate(tasks: Sequence[Task], encode: Encode) -> list[TaskResult]:
    """Scores an encoder on every task, encoding each distinct text and role once.

    Raises:
        DataError: A vector is not finite; the message names the task and the first such texts.
    """
    encode, results = encode_once(encode), []
    for task in tasks:
        try:
            results.append(task.score(encode))
        except DataError as error:
            raise DataError(f"task {task.name}: {error}") from error
    return results


def encode_once(encode: Encode) -> Encode:
    """Wraps an encoder to see each text and role once; DataError for NaN or infinite vectors."""
    known: dict[tuple[str, str | None], np.ndarray] = {}

    def encode_new(texts: Sequence[str], role: str | None) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if (text, role) not in known]
        if new:
            vectors = np.asarray(encode(new, role), dtype=np.float32)
            known.update(zip([(text, role) for text in new], vectors, strict=True))
        return _finite(np.stack([known[text, role] for text in texts]), texts, role)

    return encode_new


def search(
    encode: Encode, documents: Sequence[str], query: str, k: int = 3
) -> list[tuple[int, float]]:
    """The k documents most like a query, best first, as (position, cosine)."""
    if not documents:
        return []
    vectors = _vectors(encode, documents, "document")
    asked = _vectors(encode, [query], "query")
    best, cosines = _most_similar(asked, vectors, k, tie_rank=np.arange(len(documents)))
    return list(zip(best[0].tolist(), cosines[0].tolist(), strict=True))


def _vectors(encode: Encode, texts: Sequence[str], role: str | None) -> np.ndarray:
    return _finite(np.asarray(encode(texts, role), dtype=np.float32), texts, role)


def _finite(vectors: np.ndarray, texts: Sequence[str], role: str | None) -> np.ndarray:
    if vectors.ndim != 2 or len(vectors) != len(texts) or not vectors.shape[1]:
        raise ValueError(f"encode gave shape {vectors.shape} for {len(texts)} texts, not (N, D)")
    # The extremes of a row carry any NaN or infinity, without an (N, D) mask.
    finite = np.isfinite(vectors.min(axis=1)) & np.isfinite(vectors.max(axis=1))
    if not finite.all():
        bad = np.flatnonzero(~finite).tolist()
        named = ", ".join(f"{i} '{texts[i][:60]}'" for i in bad[:3])
        raise DataError(
            f"NaN or infinite vectors for {len(bad)} of {len(texts)} texts"
            f"{f' with role {role}' if role else ''}, first by index: {named}. "
            "Fix: encode in bfloat16 or float32 (float16 overflows), or mend these texts."
        )
    return vectors


def _norms(vectors: np.ndarray) -> np.ndarray:
    """Lengths (N,) in float64; the cosine with a vector of zeros comes out as 0."""
    squares: np.ndarray = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    return np.asarray(np.sqrt(np.maximum(squares, np.finfo(np.float32).tiny)))


def _most_similar(
    queries: np.ndarray, documents: np.ndarray, k: int, tie_rank: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and cosines, both (Q, at most k), best first; of equals the lower tie rank."""
    count = len(documents)
    k = min(k, count)
    lengths = _norms(documents).astype(np.float32)
    queries = queries / _norms(queries).astype(np.float32)[:, None]
    best = np.empty((len(queries), k), dtype=np.int64)
    cosines = np.empty((len(queries), k), dtype=np.float32)
    rows = max(1, _CHUNK // count)
    for start in range(0, len(queries), rows):
        similarities = queries[start : start + rows] @ documents.T
        similarities /= lengths
        for q, row in enumerate(similarities, start):
            # All that tie with the k-th stay in, so that the tie rank decides between them.
            kept = np.flatnonzero(row >= np.partition(row, -k)[-k])
            best[q] = kept[np.lexsort((tie_rank[kept], -row[kept]))[:k]]
            cosines[q] = row[best[q]]
    return best, cosines


def _load_sts(path: Path) -> StsTask:
    rows = list(_rows(path, ("score", "sentence1", "sentence2")))
    gold = np.array([_number(path, line, score) for line, (score, _, _) in rows])
    if np.ptp(gold) == 0:
        given = f"every score is {gold[0]:g} ({len(gold)} pairs), so no correlation is defined"
        raise _fault(path, given, "give pairs with different scores")
    first, second = ([fields[column] for _, fields in rows] for column in (1, 2))
    return StsTask(path.resolve().stem, {None: first + second}, gold)


def _load_retrieval(folder: Path) -> RetrievalTask:
    names = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")
    for name in names:
        if not (folder / name).is_file():
            given = f"a retrieval task is a folder with {', '.join(names)}, and {name} is missing"
            raise _fault(folder, given, "add the file")
    corpus, questions, qrels = (folder / name for name in names)
    documents, queries = _records(corpus), _records(questions)
    positions = {document: position for position, document in enumerate(documents)}
    judged: dict[str, dict[int, float]] = {}
    for line, (query, document, score) in _rows(qrels, ("query-id", "corpus-id", "score")):
        for name, known, path in ((query, queries, questions), (document, positions, corpus)):
            if name not in known:
                given = f"id '{name}' is none of the {len(known)} of {path.name}"
                fix = "add it there or remove this line"
                raise _fault(qrels, f"{given} (such as '{next(iter(known))}')", fix, line)
        grades, grade = judged.setdefault(query, {}), _number(qrels, line, score)
        if grades.setdefault(positions[document], grade) != grade:
            given = f"query '{query}', document '{document}': score {score}, another one above"
            raise _fault(qrels, given, "keep one of the lines", line)
    tested = _tested(queries, judged, qrels)
    asked = [queries[query] for query in tested]
    texts: Texts = {"document": list(documents.values()), "query": asked}
    name, grades_of = folder.resolve().name, list(tested.values())
    return RetrievalTask(name, texts, list(documents), list(tested), grades_of)


def _tested(
    queries: Iterable[str], judged: dict[str, dict[int, float]], qrels: Path
) -> dict[str, dict[int, float]]:
    """The relevant documents of each query; queries of other splits alone are left out."""
    others = [path for path in sorted(qrels.parent.glob("*.tsv")) if path.name != qrels.name]
    elsewhere = {line.split("\t", 1)[0] for path in others for _, line in _lines(path)}
    tested = {}
    for query in queries:
        grades = {d: grade for d, grade in judged.get(query, {}).items() if grade > 0}
        if grades:
            tested[query] = grades
        elif query in judged or query not in elsewhere:
            fix = "add a line with one, or remove the query here and from queries.jsonl"
            raise _fault(qrels, f"query '{query}' has no document with a score above 0", fix)
    return tested


def _records(path: Path) -> dict[str, str]:
    """Text by id of a BEIR .jsonl file; a title goes before a text that does not repeat it."""
    texts: dict[str, str] = {}
    for line, given in _lines(path):
        try:
            record = json.loads(given)
        except ValueError as error:
            fix = 'write one object a line, such as {"_id": "1", "text": "..."}'
            raise _fault(path, f"{given[:60]!r} is not JSON ({error})", fix, line) from error
        fields = record if isinstance(record, dict) else {}
        name, title, text = fields.get("_id"), fields.get("title") or "", fields.get("text")
        if not (isinstance(name, str) and isinstance(title, str) and isinstance(text, str)):
            fix = 'write an object of strings, such as {"_id": "1", "title": "", "text": "..."}'
            raise _fault(path, f"{given[:60]!r} lacks a string '_id' or 'text'", fix, line)
        if name in texts:
            fix = "remove this line or give it another id"
            raise _fault(path, f"id '{name}' was given above already", fix, line)
        texts[name] = text if text.startswith(title) else f"{title} {text}".strip()
    if not texts:
        raise _fault(path, "the file is empty", "give one JSON object a line")
    return texts


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Line number and the named columns of each row of a .tsv file with a header."""
    lines = _lines(path)
    _, first = next(lines, (0, ""))
    header = first.split("\t")
    fix = f"begin with the header {', '.join(columns)}, separated by tabs; rows below"
    if not first:
        raise _fault(path, "the file is empty", fix)
    for column in columns:
        if column not in header:
            given = f"no column '{column}' in {first[:60]!r}{nearest(column, header).rstrip('?')}"
            raise _fault(path, given, fix, 1)
    line = 0
    for line, given in lines:
        fields = given.split("\t")
        if len(fields) != len(header):
            given = f"{len(fields)} columns instead of {len(header)} in {given[:60]!r}"
            raise _fault(path, given, "put one tab between columns, none inside a text", line)
        yield line, [fields[header.index(column)] for column in columns]
    if not line:
        raise _fault(path, "the file is empty below its header", "add rows")


def _number(path: Path, line: int, given: str) -> float:
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _fault(path, f"score {given[:60]!r} is no number", "write one such as 3.5", line)
    return number


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line that is not blank."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                given = f"not UTF-8: byte {error.start + 1} of the line is 0x{raw[error.start]:02x}"
                raise _fault(path, given, "convert the file to UTF-8", number) from error
            if line.strip(" "):
                yield number, line


def _fault(path: Path, given: str, fix: str, line: int | None = None) -> DataError:
    return DataError(f"{path}{f' line {line}' if line else ''}: {given}. Fix: {fix}.")
