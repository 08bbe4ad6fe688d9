"""Forward passes at once, on a CPU."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch

from unmasked.serve.forward_threads import ForwardThreads
from unmasked.serve.measures import Measures
from unmasked.serve.service import Service, forwards_at_once
from unmasked.serve.text_queue import Job, TextQueue
from unmasked.text.tokens import TokenRow

PATIENCE = 60.0


def rows(*ids: int) -> list[TokenRow]:
    """Rows of ten tokens, which are told apart by their id."""
    return [TokenRow([i] * 10, 0, 10) for i in ids]


def answers(compute, jobs: list[list[TokenRow]], count: int) -> list[np.ndarray]:
    """The vectors of each job from `count` threads, ten tokens in a forward."""

    async def ask() -> list[np.ndarray]:
        queue = TextQueue(["m"], 1000, 0.0)
        threads = ForwardThreads(queue, {"m": compute}, 10, Measures(lambda: (0, 0)), count)
        waiting = [Job(job) for job in jobs]
        for job in waiting:
            queue.put("m", job)
        threads.start()
        found = await asyncio.wait_for(asyncio.gather(*(job.done for job in waiting)), PATIENCE)
        threads.stop()
        assert not threads.healthy  # they have ended
        return found

    return asyncio.run(ask())


def vectors(texts: list[TokenRow]) -> np.ndarray:
    return np.array([[float(row.ids[0])] for row in texts])


def test_forwards_run_at_once_and_share_the_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    asked: dict[str, list[int]] = {}

    def set_number(number: int) -> None:
        asked.setdefault(threading.current_thread().name, []).append(number)

    monkeypatch.setattr(torch, "set_num_threads", set_number)
    both = threading.Barrier(2, timeout=PATIENCE)

    def compute(texts: list[TokenRow]) -> np.ndarray:
        both.wait()  # is passed only if two threads are here
        return vectors(texts)

    found = answers(compute, [rows(*range(6))], 2)
    assert found[0].ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert sum(len(asked[f"unmasked-forward-{i}"]) for i in range(2)) == 6
    assert asked["unmasked-forward-0"][0] == 2
    assert asked["MainThread"] == [4], "the number of threads is given back"


def test_a_forward_that_is_alone_has_all_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    answers(vectors, [rows(1)], 2)
    assert asked == [4, 4]  # for the forward, and when the threads end


def test_one_thread_leaves_the_cores_alone(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: pytest.fail("was set"))
    assert [float(v[0, 0]) for v in answers(vectors, [rows(1), rows(2)], 1)] == [1, 2]


def test_every_text_gets_its_own_vector_from_whichever_thread():
    jobs = [list(range(start, start + 7)) for start in range(0, 280, 7)]
    found = answers(vectors, [rows(*job) for job in jobs], 4)
    assert [v.ravel().tolist() for v in found] == jobs


def test_vectors_of_forwards_at_once_are_those_of_encode(encoder, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    texts = [f"word{i} other words " * (i % 5 + 1) for i in range(40)]
    with Service({"tiny": encoder}) as service:
        assert len(service.forwards._threads) == 2

        async def ask() -> list[np.ndarray]:
            jobs = [Job(encoder.backbone.tokens([text])) for text in texts]
            for job in jobs:
                service.queue.put("tiny", job)
            return await asyncio.wait_for(asyncio.gather(*(j.done for j in jobs)), PATIENCE)

        found = np.concatenate(asyncio.run(ask()))
    np.testing.assert_allclose(found, encoder.encode(texts), rtol=0, atol=1e-5)


def test_how_many_forwards_may_run_at_once(encoder, longrope_decoder, monkeypatch):
    from unmasked import LLM2Vec

    for cores, at_once in ((1, 1), (2, 2), (64, 4)):
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        assert forwards_at_once(encoder) == at_once
    assert forwards_at_once(LLM2Vec.from_pretrained(longrope_decoder, device="cpu")) == 1
    monkeypatch.setattr(encoder.backbone, "unpackable", "it has a state")
    assert forwards_at_once(encoder) == 1


def test_a_loop_that_closes_while_a_forward_runs_ends_no_thread():
    """The loop was asked whether it is closed and called later, when it may have been."""
    queue, died = TextQueue(["m"], 1000, 0.0), []

    async def put() -> Job:
        job = Job(rows(1))
        queue.put("m", job)
        return job

    job = asyncio.run(put())
    job.loop.is_closed = lambda: False  # it closes between the question and the call
    threads = ForwardThreads(queue, {"m": vectors}, 10, Measures(lambda: (0, 0)), 1)
    before, threading.excepthook = threading.excepthook, lambda args: died.append(args.exc_value)
    try:
        threads.start()
        threads.stop()
    finally:
        threading.excepthook = before
        del job.loop.is_closed
    assert died == []
