"""Which texts share a forward: sorted by true token count, cut by a token budget.

Sorting by characters and cutting by rows, as is usual, leaves 9 to 51 % of what is computed to
padding. Here lengths are exact, and a batch closes when its padded size reaches the budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

TOKEN_BUDGET = {"cpu": 1024, "cuda": 16384}
"""Tokens a forward: what fits a CPU's cache, and what fills a GPU."""


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
