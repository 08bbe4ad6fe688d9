"""Batches: every row once, similar lengths together, no batch over its budget."""

from __future__ import annotations

import numpy as np
import pytest

from unmasked.batches import plan_batches

LENGTHS = np.random.default_rng(0).integers(1, 300, 500).tolist()


@pytest.mark.parametrize(("budget", "rows"), [(1024, None), (None, 32), (512, 7), (100, None)])
def test_every_row_once_within_the_limits(budget, rows):
    batches = plan_batches(LENGTHS, budget, rows)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    for batch in batches:
        longest = max(LENGTHS[i] for i in batch)
        assert rows is None or len(batch) <= rows
        assert budget is None or len(batch) == 1 or longest * len(batch) <= budget


def test_padding_is_small():
    batches = plan_batches(LENGTHS, 4096)
    computed = sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in batches)
    assert computed < 1.15 * sum(LENGTHS)  # 1.9 in the order given, 32 rows at a time


def test_nothing_and_empty_rows():
    assert plan_batches([], 1024) == []
    assert len(plan_batches([0, 0, 0], 1024)) == 1
