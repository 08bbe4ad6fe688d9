"""Exact search by cosine: the product of the queries with all vectors, block by block.

int8 numbers are restored to their scale for the product, so nothing is lost beyond what storing
them lost. Bit vectors are ranked by Hamming distance, which is fast and coarse, and the best
`RESCORED` * K of them are scored again with the query's float32 numbers. If FAISS is installed and
there are many queries, it computes the products and distances, with the same result.

Cost: a pass over the stored bytes at the speed of memory: a million vectors of 256 float32 numbers
in a fraction of a second. Memory: one block of `BLOCK` vectors as float32.

Shapes: Q queries, N vectors, n of a block, D width, W stored numbers of a vector, K results.
"""

from __future__ import annotations

import numpy as np

from unmasked.corpus.search.stored_files import StoredVectors
from unmasked.forward.nearest import best_scores
from unmasked.forward.nearest.best_scores import Best, BestScores, add_products

BLOCK = 16384  # vectors per block
RESCORED = 32  # for each bit vector that is requested, this many are scored again


def nearest_vectors(stored: StoredVectors, queries: np.ndarray, count: int) -> Best:
    """The `count` vectors with the highest cosine to each query (Q, D); of equals, the first."""
    queries = np.asarray(queries, dtype=np.float32)
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    queries = np.ascontiguousarray(queries / np.maximum(lengths, 1e-12))
    if stored.precision == "binary":
        return _by_bits(stored, queries, count)
    if stored.norms is None:
        stored.norms = np.concatenate(
            [np.linalg.norm(_numbers(stored, part), axis=1) for _, part in stored.parts(BLOCK)]
            or [np.empty(0, np.float32)]
        )
    best = BestScores(len(queries), count)
    scales = 1 / np.maximum(stored.norms, 1e-12)
    for place, part in stored.parts(BLOCK):
        block, scale = _numbers(stored, part), scales[place : place + len(part)]
        add_products(best, queries, block, place, scale)
    return best.result()


def _numbers(stored: StoredVectors, part: np.ndarray) -> np.ndarray:
    """Stored vectors as the (n, D) float32 numbers that they stand for."""
    numbers = np.asarray(part, dtype=np.float32)
    if stored.ranges is None:
        return numbers
    low, high = stored.ranges
    step = (high - low) / 255
    # Storing rounded down, so the middle of the interval is half a step higher.
    restored: np.ndarray = numbers * step + (low + 128.5 * step)
    return restored


def _by_bits(stored: StoredVectors, queries: np.ndarray, count: int) -> Best:
    """The nearest bit vectors: first by Hamming distance, then by the query's float32 numbers."""
    query_bits = np.packbits(queries > 0, axis=1)  # (Q, W)
    rough = BestScores(len(queries), max(RESCORED * count, 256))
    for place, part in stored.parts(BLOCK):
        if faiss := best_scores.faiss_for(len(query_bits)):
            distances, found = faiss.knn_hamming(
                query_bits, np.ascontiguousarray(part), min(rough.count, len(part))
            )
            rough.add(-distances.astype(np.float32), found.astype(np.int64) + place)
        else:
            for query, bits in enumerate(query_bits):
                distances = _set_bits(part ^ bits).sum(axis=1, dtype=np.int32)  # (n,)
                rough.add_all(-distances[None].astype(np.float32), place, query)
    best = BestScores(len(queries), count)
    for query, places in enumerate(rough.result().places):
        bits = np.unpackbits(stored.gather(places), axis=1)[:, : stored.width]
        signs = bits.astype(np.float32) * 2 - 1  # (candidates, D) of length √D each
        best.add((signs @ queries[query])[None] / stored.width**0.5, places[None], query)
    return best.result()


def _set_bits(packed: np.ndarray) -> np.ndarray:
    """The number of bits that are set in each byte."""
    if hasattr(np, "bitwise_count"):  # numpy 2
        counts: np.ndarray = np.bitwise_count(packed)
        return counts
    table = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)
    counts = table[packed]
    return counts
