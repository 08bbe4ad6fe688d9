"""The order of the texts that wait, and what fills a forward."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from unmasked.serve.text_queue import Job, TextQueue
from unmasked.serve.wire import Refusal
from unmasked.text.tokens import TokenRow

NEVER = 3600.0


def rows(*lengths: int) -> list[TokenRow]:
    return [TokenRow([7] * length, 0, length) for length in lengths]


class Requests:
    """A queue, and jobs in it by the names of their requests."""

    def __init__(self, most: int = 1000, wait: float = 0.0, models: tuple[str, ...] = ("m",)):
        self.queue = TextQueue(models, most, wait)
        self.names: dict[int, str] = {}

    def put(self, name: str, *lengths: int, model: str = "m") -> Job:
        async def within() -> Job:
            return Job(rows(*lengths))

        job = asyncio.run(within())
        self.names[id(job)] = name
        self.queue.put(model, job)
        return job

    def take(self, budget: int) -> list[str]:
        _, texts = self.queue.take(budget)
        return [f"{self.names[id(text.job)]}{text.index}" for text in texts]


def test_a_short_request_does_not_wait_for_a_large_one():
    given = Requests()
    given.put("large", *[10] * 100)
    assert given.take(20) == ["large0", "large1"]
    given.put("short", 5)
    assert given.take(20) == ["large2", "short0"]
    assert given.take(20) == ["large3", "large4"]


def test_two_large_requests_share_the_device():
    given = Requests()
    given.put("a", *[10] * 20)
    given.put("b", *[10] * 20)
    assert sorted(given.take(40)) == ["a0", "a1", "b0", "b1"]
    assert sorted(given.take(40)) == ["a2", "a3", "b2", "b3"]


def test_single_texts_go_in_order_however_long_they_are():
    given = Requests()
    for name, length in (("a", 5), ("b", 500), ("c", 5), ("d", 50)):
        given.put(name, length)
    assert [given.take(1)[0] for _ in range(4)] == ["a0", "b0", "c0", "d0"]


def test_a_large_request_moves_on_while_short_ones_keep_coming():
    """More of them than can be computed: it has a share of what is, as each of them has."""
    given = Requests()
    given.put("large", *[10] * 50)
    order = []
    for _ in range(40):
        given.put("short", 10)
        order += [name[:5] for name in given.take(10)]
    assert order.count("large") >= 5


def test_a_forward_is_filled_up_to_its_tokens_and_never_empty():
    given = Requests()
    given.put("a", 300, 4, 4, 4)
    assert given.take(10) == ["a0"]
    assert given.take(10) == ["a1", "a2"]
    assert given.take(10) == ["a3"]
    assert (given.queue.texts, given.queue.tokens) == (0, 0)


def test_a_forward_is_of_one_model_and_models_take_turns():
    given = Requests(models=("m", "n"))
    given.put("a", 10, 10, model="m")
    given.put("b", 10, 10, model="n")
    assert [given.take(10)[0] for _ in range(4)] == ["a0", "b0", "a1", "b1"]


def test_what_nobody_waits_for_is_not_computed():
    given = Requests()
    gone, stays = given.put("gone", 10, 10, 10), given.put("stays", 10)
    assert given.take(10) == ["gone0"]
    given.queue.drop(gone)
    given.queue.drop(gone)
    assert (given.queue.texts, given.queue.tokens) == (1, 10)
    assert given.take(100) == ["stays0"]
    given.queue.drop(stays)
    assert (given.queue.texts, given.queue.tokens) == (0, 0)


def test_too_many_texts_are_refused_with_the_time_they_take():
    given = Requests(most=3)
    given.queue.speed = 10.0
    given.put("alone", 10, 10, 10, 10)  # more than may wait, but nobody waits
    with pytest.raises(Refusal, match="4 texts are waiting, and the limit is 3") as refused:
        given.put("more", 10)
    assert (refused.value.status, refused.value.retry_after) == (429, 4)
    assert given.queue.texts == 4


def test_a_text_waits_for_a_request_that_is_on_its_way():
    given = Requests(wait=NEVER)
    arriving = given.queue.arriving()
    taken: list[str] = []
    with arriving:
        given.put("first", 10)
        device = threading.Thread(target=lambda: taken.extend(given.take(100)))
        device.start()
        given.put("second", 10)
        assert device.is_alive()
    device.join(60)
    assert taken == ["first0", "second0"]


@pytest.mark.parametrize("budget, wait", [(10, NEVER), (100, 0.0)])
def test_a_text_does_not_wait_where_the_forward_is_full_or_the_time_is_over(budget, wait):
    given = Requests(wait=wait)
    with given.queue.arriving():
        given.put("first", 10)
        assert given.take(budget) == ["first0"]


def test_a_text_that_is_alone_does_not_wait():
    given = Requests(wait=NEVER)
    given.put("first", 10)
    assert given.take(100) == ["first0"]


def test_an_error_that_nobody_awaits_any_more_is_not_logged(caplog):
    """Its message may hold a text; asyncio logs what was never asked for."""

    async def given_up() -> None:
        job = Job(rows(1))
        job.failure = ValueError("a text that is nobody's business")
        job.settle()
        with pytest.raises(ValueError):
            awaited = Job(rows(1))
            awaited.failure = ValueError("for its client")
            awaited.settle()
            await awaited.done

    asyncio.run(given_up())
    gc.collect()
    assert caplog.text == ""


def test_a_closed_queue_gives_what_it_has_and_then_nothing():
    given = Requests()
    given.put("a", 10)
    given.queue.close()
    assert given.take(10) == ["a0"]
    assert given.take(10) == []
