"""Which texts share a forward, and how batches are made ready ahead of the device.

The usual way, sorting by characters and cutting by rows, leaves 9 to 51 % of what is computed to
padding. Here lengths are counted in tokens, and a batch is full when its padded size reaches the
budget. Equal inputs are encoded once. Tokenising, planning and pinning run in threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")

TOKEN_BUDGET = {"cpu": 1024, "cuda": 16384}
"""Tokens per forward: what fits the cache of a CPU, and what keeps a GPU busy."""

LARGE_GPU = 32768, 40 * 10**9
"""Tokens per forward of a GPU that has so many bytes of memory or more."""

WINDOW = 16384
"""Inputs that are tokenised and sorted together: enough to lose little to padding."""

FIRST_WINDOW = 1024
"""Inputs of the first window for a GPU, which would stand still until they are tokenised."""

AHEAD = 32
"""Largest number of batches that wait, ready, for the device."""


def token_budget(device: torch.device) -> int:
    """The default number of tokens per forward on a device."""
    tokens, memory = LARGE_GPU
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= memory:
        return tokens
    return TOKEN_BUDGET.get(device.type, 8192)


def windows(count: int, growing: bool = False) -> Iterator[slice]:
    """Slices of `count` inputs, each of which is tokenised and sorted by itself.

    Growing ones begin with `FIRST_WINDOW` inputs and double, so that the first forward starts soon.
    On a CPU they do not grow: which texts share a forward moves the last bits of a vector.
    """
    start, size = 0, FIRST_WINDOW if growing else WINDOW
    while start < count:
        yield slice(start, start + size)
        start, size = start + size, min(2 * size, WINDOW)


def tier(tokens: int) -> int:
    """The number of tokens, rounded up by an eighth at most, to one of few: 1024, 1152, 1280, ….

    What is as large as something before it finds its memory and its kernels ready on a GPU.
    """
    step = max(64, 1 << (max(tokens - 1, 64).bit_length() - 4))
    return -(-tokens // step) * step


def filling(lengths: Sequence[int]) -> list[int]:
    """Lengths of texts that fill a batch up to its `tier`; none is longer than its longest."""
    missing, longest = tier(sum(lengths)) - sum(lengths), max(lengths)
    return [min(longest, missing - done) for done in range(0, missing, longest)]


def plan_batches(
    lengths: Sequence[int],
    budget: int | None = None,
    batch_size: int | None = None,
    padded: bool = True,
) -> list[np.ndarray]:
    """Group rows of similar length.

    Args:
        lengths: token count of each of N rows.
        budget: maximum number of tokens of a batch; a row that is longer is a batch of its own.
        batch_size: maximum number of rows of a batch.
        padded: padding counts as well; otherwise a budget is filled with the rows' own tokens.

    Returns:
        Index arrays that together hold 0 … N-1 once, longest rows first.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64)[order])
    batches, start = [], 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        rows = len(order)
        if budget is not None and padded:
            rows = max(1, budget // longest)
        elif budget is not None:
            before = ends[start - 1] if start else 0
            rows = max(1, int(np.searchsorted(ends, before + budget, side="right")) - start)
        stop = start + min(rows, batch_size or rows)
        batches.append(order[start:stop])
        start = stop
    return batches


def distinct(inputs: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
    """Inputs without repetitions, in order, and for each of the N inputs its place among them."""
    keys: list[Hashable] = [tuple(item) if isinstance(item, list) else item for item in inputs]
    firsts = dict(zip(reversed(keys), reversed(inputs), strict=True))  # the first of equals stays
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    inverse = np.fromiter((places[key] for key in keys), np.int64, len(keys))
    return [firsts[key] for key in places], inverse


def ahead(items: Iterable[T], depth: int = AHEAD) -> Generator[T, None, None]:
    """The items of an iterator that runs in a thread, at most `depth` of them waiting.

    An exception of the iterator is raised where its item would have come. Closing this generator
    ends the thread after the item that it is working on.
    """
    iterator, end = iter(items), object()
    waiting: deque[Future[T | object]] = deque()
    pool = ThreadPoolExecutor(1)
    try:
        pool.submit(int).result()  # a thread that is interrupted as it starts has no iterator yet
        while len(waiting) < depth:
            waiting.append(pool.submit(next, iterator, end))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]
    finally:
        # Control-C can strike at any line here, while the thread still runs the iterator. Only the
        # thread closes it: a generator cannot be closed while it runs.
        for future in waiting:
            future.cancel()
        with suppress(RuntimeError):  # at the end of the interpreter there are no threads any more
            pool.submit(getattr(iterator, "close", int))
        pool.shutdown()
