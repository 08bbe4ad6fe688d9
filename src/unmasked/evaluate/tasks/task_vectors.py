"""Vectors of texts for tasks: each text is encoded once, every vector checked; and ranking.

Ranking is implemented here because `sentence_transformers.util.semantic_search` leaves the order of
equal similarities undefined, and trec_eval defines it. Cost: the vector of every distinct text is
in memory (4 bytes times the width, twice while a task is scored), and at most 64 MB of
similarities.

Shapes: N texts, Q queries, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from unmasked.errors import DataError

Encode = Callable[[Sequence[str], str | None], np.ndarray]
"""From texts and their role ("query", "document" or None) to (N, D) float32 vectors."""

_CHUNK = 2**24  # similarities in memory at a time


def encode_once(encode: Encode) -> Encode:
    """Wrap an encoder so that it encodes each text once per role, and check its vectors."""
    known: dict[tuple[str, str | None], np.ndarray] = {}

    def encode_new(texts: Sequence[str], role: str | None) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if (text, role) not in known]
        if new:
            vectors = np.asarray(encode(new, role), dtype=np.float32)
            known.update(zip([(text, role) for text in new], vectors, strict=True))
        return finite(np.stack([known[text, role] for text in texts]), texts, role)

    return encode_new


def encoded(encode: Encode, texts: Sequence[str], role: str | None = None) -> np.ndarray:
    """The vectors (N, D) of texts, checked as in `finite`."""
    return finite(np.asarray(encode(texts, role), dtype=np.float32), texts, role)


def finite(vectors: np.ndarray, texts: Sequence[str], role: str | None) -> np.ndarray:
    """Return the vectors, after checking that they are (N, D) and all numbers are finite.

    Raises:
        DataError: a vector is not finite; the message names the first such texts.
        ValueError: the encoder returned another shape than (N, D).
    """
    if vectors.ndim != 2 or len(vectors) != len(texts) or not vectors.shape[1]:
        raise ValueError(f"encode gave shape {vectors.shape} for {len(texts)} texts, not (N, D)")
    # A NaN or infinity shows in the minimum or maximum of its row; an (N, D) mask would be large.
    good = np.isfinite(vectors.min(axis=1)) & np.isfinite(vectors.max(axis=1))
    if not good.all():
        bad = np.flatnonzero(~good).tolist()
        named = ", ".join(f"{i} '{texts[i][:60]}'" for i in bad[:3])
        raise DataError(
            f"NaN or infinite vectors for {len(bad)} of {len(texts)} texts"
            f"{f' with role {role}' if role else ''}, first by index: {named}. "
            "Fix: encode in bfloat16 or float32 (float16 overflows), or correct these texts."
        )
    return vectors


def norms(vectors: np.ndarray) -> np.ndarray:
    """Lengths (N,) in float64, never 0, so that the cosine with a vector of zeros is 0."""
    squares: np.ndarray = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    return np.asarray(np.sqrt(np.maximum(squares, np.finfo(np.float32).tiny)))


def most_similar(
    queries: np.ndarray, documents: np.ndarray, k: int, tie_rank: np.ndarray
) -> np.ndarray:
    """Positions (Q, at most k) of the documents (N, D) most similar to queries (Q, D), best first.

    Of equally similar documents the one with the lower tie rank (N,) comes first.
    """
    count, k = len(documents), min(k, len(documents))
    lengths = norms(documents).astype(np.float32)
    queries = queries / norms(queries).astype(np.float32)[:, None]
    best = np.empty((len(queries), k), dtype=np.int64)
    rows = max(1, _CHUNK // count)
    for start in range(0, len(queries), rows):
        similarities = queries[start : start + rows] @ documents.T
        similarities /= lengths
        for q, row in enumerate(similarities, start):
            # Everything equal to the k-th is kept, so that the tie rank decides between them.
            kept = np.flatnonzero(row >= np.partition(row, -k)[-k])
            best[q] = kept[np.lexsort((tie_rank[kept], -row[kept]))[:k]]
    return best
