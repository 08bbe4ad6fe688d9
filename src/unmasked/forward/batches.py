"""Which texts share a forward, and getting them ready while the one before is computed.

Sorting by characters and cutting by rows, as is usual, leaves 9 to 51 % of what is computed to
padding. Here lengths are exact, and a batch closes when its padded size reaches the budget. Equal
inputs are encoded once. Tokenising, planning and pinning run in a thread, ahead of the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")

TOKEN_BUDGET = {"cpu": 1024, "cuda": 16384}
"""Tokens a forward: what fits a CPU's cache, and what fills a GPU."""

WINDOW = 16384
"""Inputs that are tokenised and sorted together: many enough to waste little on padding."""

AHEAD = 32
"""Batches that may wait, ready, for the device."""


def token_budget(device: torch.device) -> int:
    """The default number of tokens a forward on a device."""
    return TOKEN_BUDGET.get(device.type, 8192)


def plan_batches(
    lengths: Sequence[int], budget: int | None = None, batch_size: int | None = None
) -> list[np.ndarray]:
    """Group rows of similar length.

    Args:
        lengths: token count of each of N rows.
        budget: most tokens of a batch, padding counted; a longer row is a batch of its own.
        batch_size: most rows of a batch.

    Returns:
        Index arrays that together hold 0 … N-1 once, longest rows first.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches, start = [], 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        rows = len(order) if budget is None else max(1, budget // longest)
        stop = start + min(rows, batch_size or rows)
        batches.append(order[start:stop])
        start = stop
    return batches


def distinct(inputs: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
    """Inputs without repetitions, in order, and for each of the N inputs its place among them."""
    places: dict[Hashable, int] = {}
    kept: list[Any] = []
    inverse = np.empty(len(inputs), dtype=np.int64)
    for index, item in enumerate(inputs):
        key = tuple(item) if isinstance(item, list) else item
        place = places.setdefault(key, len(kept))
        if place == len(kept):
            kept.append(item)
        inverse[index] = place
    return kept, inverse


def ahead(items: Iterable[T], depth: int = AHEAD) -> Iterator[T]:
    """The items of an iterator that runs in a thread, at most `depth` of them waiting.

    An exception of the iterator is raised where its item would have come. Closing this generator
    ends the thread after the item it is working on.
    """
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(1)
    try:
        waiting = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)
