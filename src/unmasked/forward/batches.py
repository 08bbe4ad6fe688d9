"""Which texts share a forward, and how batches are prepared ahead of the device.

The usual way, sorting by characters and cutting by rows, spends 9 to 51 % of the computation on
padding. Here lengths are counted in tokens, and a batch is full when its padded size reaches the
budget. Equal inputs are encoded once. Tokenising, planning and pinning run in threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")

TOKEN_BUDGET = {"cpu": 1024, "cuda": 16384}
"""Tokens per forward: what fits the cache of a CPU, and what keeps a GPU busy."""

HALF_ON_CPU = 2048
"""Tokens per forward of a CPU if weights have 16 bits, so that states take half the memory.

With SmolLM-135M's shape in bfloat16, on a CPU with matrix units (AMX), 128 texts of mixed lengths
were encoded 1.28 times as fast as with 1024 tokens, 64 sentences 1.25 to 1.39 times, but 512
sentences .95 times and 128 passages 1.05 times (`benchmarks/checkouts.py`).
"""

LARGE_GPU = 32768, 40 * 10**9
"""Tokens per forward of a large GPU, and the bytes of memory from which a GPU is large."""

WINDOW = 16384
"""Number of inputs that are tokenised and sorted together: enough to lose little to padding."""

FIRST_WINDOW = 1024
"""Size of the first window on a GPU, which is idle until its inputs are tokenised."""

AHEAD = 32
"""Largest number of prepared batches that wait for the device."""


def token_budget(device: torch.device, dtype: torch.dtype) -> int:
    """The default number of tokens per forward on a device, for weights of a dtype."""
    tokens, memory = LARGE_GPU
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= memory:
        return tokens
    if device.type == "cpu" and dtype.itemsize == 2:
        return HALF_ON_CPU
    return TOKEN_BUDGET.get(device.type, 8192)


def windows(count: int, growing: bool = False) -> Iterator[slice]:
    """Slices of `count` inputs, each of which is tokenised and sorted by itself.

    Growing windows begin with `FIRST_WINDOW` inputs and double, so that the first forward starts
    soon. They are not used on a CPU, because they change which texts share a forward, and with that
    the last bits of a vector.
    """
    start, size = 0, FIRST_WINDOW if growing else WINDOW
    while start < count:
        yield slice(start, start + size)
        start, size = start + size, min(2 * size, WINDOW)


def tier(tokens: int) -> int:
    """Round a number of tokens up, by an eighth at most, to one of few: 1024, 1152, 1280, ….

    On a GPU, a batch of the same size as an earlier one reuses its memory and kernels.
    """
    step = max(64, 1 << (max(tokens - 1, 64).bit_length() - 4))  # an eighth of the power of 2 below
    return -(-tokens // step) * step


def filling(lengths: Sequence[int]) -> list[int]:
    """Lengths of dummy texts that fill a batch up to its `tier`; none is its new longest text."""
    missing, longest = tier(sum(lengths)) - sum(lengths), max(lengths)
    return [min(longest, missing - done) for done in range(0, missing, longest)]


def plan_batches(
    lengths: Sequence[int],
    budget: int | None = None,
    batch_size: int | None = None,
    padded: bool = True,
    apart: int | None = None,
) -> list[np.ndarray]:
    """Group rows of similar length.

    Args:
        lengths: token count of each of N rows.
        budget: maximum number of tokens of a batch; a longer row is a batch of its own.
        batch_size: maximum number of rows of a batch.
        padded: whether padding counts towards the budget.
        apart: rows of more tokens than this share no batch with shorter ones; see `positions`.

    Returns:
        Index arrays that together hold 0 … N-1 once, longest rows first.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    totals = np.cumsum(sizes[order])  # tokens of all rows up to each
    long = int((sizes > apart).sum()) if apart is not None else 0
    batches, start = [], 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        rows = len(order)
        if budget is not None and padded:
            rows = max(1, budget // longest)
        elif budget is not None:
            before = totals[start - 1] if start else 0
            rows = max(1, int(np.searchsorted(totals, before + budget, side="right")) - start)
        stop = start + min(rows, batch_size or rows)
        stop = min(stop, long) if start < long else stop
        batches.append(order[start:stop])
        start = stop
    return batches


def distinct(inputs: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
    """Inputs without repetitions, in order, and for each of the N inputs its index among them."""
    different: list[Any] = []
    places: dict[Hashable, int] = {}
    inverse = []
    for item in inputs:
        key = tuple(item) if isinstance(item, list) else item
        if key not in places:
            places[key] = len(different)
            different.append(item)
        inverse.append(places[key])
    return different, np.array(inverse, dtype=np.int64)


def ahead(
    items: Iterable[T], depth: int = AHEAD, stop: Callable[[], object] = lambda: None
) -> Generator[T, None, None]:
    """The items of an iterator, which runs in a thread up to `depth` items ahead.

    An exception in the iterator is raised where its next item would have come. Closing this
    generator ends the thread after the item that it is working on; `stop` is called first, so that
    the iterator can leave that item unfinished.
    """
    iterator, end = iter(items), object()
    waiting: deque[Future[T | object]] = deque()
    pool = ThreadPoolExecutor(1)
    try:
        pool.submit(int).result()  # Control-C while the thread starts finds no iterator running
        while len(waiting) < depth:
            waiting.append(pool.submit(next, iterator, end))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]
    finally:
        # Control-C may come at any line above, while the thread still runs the iterator. A
        # generator cannot be closed while it runs, so the thread itself closes it, at last.
        stop()
        for future in waiting:
            future.cancel()
        with suppress(RuntimeError):  # no thread starts any more when the interpreter shuts down
            pool.submit(getattr(iterator, "close", int))
        pool.shutdown()
