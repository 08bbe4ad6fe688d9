"""Task files and encoders that need no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unmasked.evaluate import Encode

DATA = Path(__file__).parents[3] / "shared" / "data"
QRELS = "query-id\tcorpus-id\tscore\n"
HEADER = "score\tsentence1\tsentence2\n"
TINY = {"query": [1, 0], "doc 1": [2, 0], "doc 2": [3, 3], "doc 3": [0, 5]}
"""Texts of the fixture `tiny`, and vectors for them."""


def by_text(vectors: dict[str, Sequence[float]]) -> Encode:
    """An encoder that looks its vectors up."""
    return lambda texts, role: np.array([vectors[text] for text in texts], dtype=np.float32)


def hashed(seed: int, width: int = 16) -> Encode:
    """An encoder whose vectors are random, but always the same for a text."""

    def encode(texts: Sequence[str], role: str | None) -> np.ndarray:
        rows = [np.random.default_rng([seed, *text.encode()]) for text in texts]
        return np.array([row.standard_normal(width) for row in rows], dtype=np.float32)

    return encode


def noisy(noise: float) -> Encode:
    """An encoder that knows the last character of a text, as far as the noise lets it."""

    def encode(texts: Sequence[str], role: str | None) -> np.ndarray:
        rows = [np.random.default_rng(list(t.encode())).standard_normal(16) for t in texts]
        signal = np.eye(16)[[ord(text[-1]) % 16 for text in texts]]
        return (signal + noise * np.array(rows)).astype(np.float32)

    return encode


def write(folder: Path, **files: str) -> None:
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def sts_file(folder: Path, rows: Sequence[tuple[float, str, str]], name: str = "pairs") -> Path:
    path = folder / f"{name}.tsv"
    path.write_text(HEADER + "".join(f"{s}\t{a}\t{b}\n" for s, a, b in rows), encoding="utf-8")
    return path


def beir_folder(
    folder: Path, documents: dict[str, str], queries: dict[str, str], qrels: dict[str, dict]
) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        lines = (json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items())
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    judged = (f"{q}\t{d}\t{s}\n" for q, grades in qrels.items() for d, s in grades.items())
    (folder / "qrels" / "test.tsv").write_text(QRELS + "".join(judged))
    return folder
