"""Batches: every row once, similar lengths together, no batch over its budget."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from unmasked.forward.batches import ahead, distinct, plan_batches

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


def test_equal_inputs_are_one_and_find_their_place():
    inputs = ["b", "a", "b", "", "a"]
    kept, inverse = distinct(inputs)
    assert kept == ["b", "a", ""]
    assert [kept[place] for place in inverse] == inputs
    pairs = [["query:", "a"], ["query:", "a"], ["", "a"]]
    kept, inverse = distinct(pairs)
    assert kept == [["query:", "a"], ["", "a"]]
    assert inverse.tolist() == [0, 0, 1]


def test_items_come_in_order_from_a_thread_that_is_never_far_ahead():
    made = []

    def items():
        for number in range(50):
            made.append((number, threading.current_thread() is threading.main_thread()))
            yield number

    for number in ahead(items(), depth=4):
        assert len(made) <= number + 6
    assert made == [(number, False) for number in range(50)]


def test_an_error_of_the_thread_is_raised_and_leaving_early_ends_it():
    def items():
        yield 1
        raise ValueError("broken")

    taken = ahead(items(), depth=4)
    assert next(taken) == 1
    with pytest.raises(ValueError, match="broken"):
        next(taken)
    before = threading.active_count()
    endless = ahead(itertools.count(), depth=4)
    assert next(endless) == 0
    assert threading.active_count() == before + 1
    endless.close()
    assert threading.active_count() <= before


@pytest.mark.parametrize("struck", range(1, 7))
def test_control_c_at_any_wait_stays_a_control_c_and_ends_the_threads(monkeypatch, struck):
    """Two threads, one behind the other, as texts are tokenised and batched."""
    opened, closed = [], []

    def slow():
        opened.append(True)
        try:
            while True:
                time.sleep(0.02)
                yield 1
        finally:
            closed.append(True)

    def behind():
        with closing(ahead(slow())) as items:
            yield from items

    wait, left = threading.Condition.wait, iter(range(struck))

    def interrupted(condition, timeout=None):
        result = wait(condition, timeout)
        if threading.current_thread() is threading.main_thread() and next(left, 0) == struck - 1:
            raise KeyboardInterrupt
        return result

    before = threading.active_count()
    monkeypatch.setattr(threading.Condition, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt), closing(ahead(behind())) as items:
        list(items)
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
    assert closed == opened
