"""Late pooling against plain passages and whole documents, on long documents with known answers.

A document of the set is a few texts of a retrieval collection in a row, drawn at random, and a
query's answers are the documents that hold an answer of it. Documents are scored by their best
passage. Beside nDCG@10 and recall@10 stands how often the best passage of a document that was
found lies in the text that answers; the intervals are of the queries, by bootstrap (95 %).

    python -m benchmarks.late MODEL                 # needs retrieval/cranfield in a data folder
    python -m benchmarks.late MODEL --seeds 3 --texts 4 --chunk 64
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.texts import DATA
from unmasked import LLM2Vec
from unmasked.corpus import Chunks, Encoding

TOP = 10


class LongDocuments(NamedTuple):
    """Documents, where the texts in them lie, and which of them answer each query."""

    texts: list[str]
    places: list[list[tuple[str, int, int]]]
    queries: list[str]
    answers: list[set[str]]


def build(folder: Path, per_document: int, seed: int) -> LongDocuments:
    """The set of a seed: every text of the collection is in one document."""
    corpus = {row["_id"]: row["text"].strip() for row in _json(folder / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in _json(folder / "queries.jsonl")}
    answers: dict[str, set[str]] = {}
    with (folder / "qrels" / "test.tsv").open(encoding="utf-8") as file:
        for query, text, score in list(csv.reader(file, delimiter="\t"))[1:]:
            if int(score) > 0 and corpus.get(text):
                answers.setdefault(query, set()).add(text)
    names = [name for name, text in corpus.items() if text]
    random.Random(seed).shuffle(names)
    texts, places = [], []
    for start in range(0, len(names), per_document):
        whole, own = "", []
        for name in names[start : start + per_document]:
            begin = len(whole)
            whole += corpus[name] + "\n\n"
            own.append((name, begin, len(whole)))
        texts.append(whole)
        places.append(own)
    asked = [query for query in queries if query in answers]
    return LongDocuments(texts, places, [queries[q] for q in asked], [answers[q] for q in asked])


def _json(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def score(given: LongDocuments, spans: Sequence, vectors: np.ndarray, queries: np.ndarray):
    """(Q, 3): nDCG@10, recall@10, and whether the best passage of what was found is an answer."""
    vectors, queries = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (vectors, queries))
    owners = np.array([span.document for span in spans])
    rows = []
    for scores, answers in zip(queries @ vectors.T, given.answers, strict=True):
        best = np.full(len(given.texts), -np.inf)
        np.maximum.at(best, owners, scores)
        good = [{n for n, _, _ in own} & answers for own in given.places]
        found = np.argsort(-best, kind="stable")[:TOP]
        gains = np.array([bool(good[d]) for d in found]) / np.log2(np.arange(TOP) + 2)
        there = sum(map(bool, good))
        ideal = (1 / np.log2(np.arange(min(there, TOP)) + 2)).sum()
        hits = [d for d in found if good[d]]
        right = []
        for document in hits:
            inside = np.flatnonzero(owners == document)
            span = spans[inside[np.argmax(scores[inside])]]
            middle = (span.begin + span.end) / 2
            held = [n for n, b, e in given.places[document] if b <= middle < e]
            right.append(bool(held and held[0] in answers))
        rows.append((gains.sum() / ideal, len(hits) / there, np.mean(right) if right else np.nan))
    return np.array(rows)


def interval(rows: np.ndarray, draws: int = 1000) -> str:
    """Mean and 95 % interval, times 100."""
    rows = rows[np.isfinite(rows)]
    drawn = np.random.default_rng(0).integers(len(rows), size=(draws, len(rows)))
    low, high = np.percentile(rows[drawn].mean(axis=1), [2.5, 97.5])
    return f"{100 * rows.mean():.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=DATA / "retrieval" / "cranfield")
    parser.add_argument("--texts", type=int, default=2, help="texts of a document")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--overlap", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    model = LLM2Vec.from_pretrained(given.model)
    ways = {
        "whole document": None,
        "plain passages": Chunks(given.chunk, given.overlap),
        "late passages": Chunks(given.chunk, given.overlap, late=True),
    }
    results: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    seconds = dict.fromkeys(ways, 0.0)
    for seed in range(given.seeds):
        documents = build(given.data, given.texts, seed)
        queries = model.encode_query(documents.queries, show_progress_bar=False)
        for name, chunks in ways.items():
            begun = time.process_time()
            spans, vectors = Encoding(chunks=chunks).passages(model, documents.texts)
            seconds[name] += time.process_time() - begun
            results[name].append(score(documents, spans, vectors, queries))
    lengths = [len(model.backbone.tokens.locate(text).ids) for text in documents.texts]
    print(
        f"{len(documents.texts)} documents of {given.texts} texts (median {np.median(lengths):.0f} "
        f"tokens), {len(documents.queries)} queries, {given.seeds} seeds, passages of {given.chunk}"
    )
    print("| | nDCG@10 | recall@10 | passage in the answer | CPU seconds |\n|---|---|---|---|---|")
    for name, rows in results.items():
        cells = [interval(column) for column in np.nanmean(rows, axis=0).T]
        if name == "whole document":
            cells[-1] = ""
        print(f"| {name} | {' | '.join(cells)} | {seconds[name]:.0f} |")
    late, plain = (np.nanmean(results[f"{kind} passages"], axis=0) for kind in ("late", "plain"))
    gains = " | ".join(interval(column) for column in (late - plain).T)
    print(f"| late less plain | {gains} | |")


if __name__ == "__main__":
    main()
