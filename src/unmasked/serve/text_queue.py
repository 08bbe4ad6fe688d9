"""Which texts are computed next, of all that wait: a fair order, decided as late as possible.

The device takes a batch when it is free, so texts gather while a forward runs, and nothing is
decided before. A request is not served as a whole: each of its texts has a tag, the number of
tokens that stand before it in its own request, counted from the clock of the queue, and the lowest
tags go first. The clock moves by the tokens that each waiting request would have got by then, had
all been served at once (weighted fair queueing, Demers, Keshav and Shenker 1989; tags as in
start-time fair queueing, Goyal, Vin and Cheng 1996). So single texts, long or short, go in the
order of their arrival; one of them does not wait for two thousand documents that came a moment
before, and these still move on.

Cost: a push and a pop of a heap for each text.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from unmasked.serve.wire import Refusal
from unmasked.text.tokens import TokenRow


class Job:
    """The texts of one request, and the vectors they have got so far.

    Attributes:
        done: set when all texts have their vectors (N, D), or one failed.
        gone: nobody waits for it any more; its texts are not computed.
        taken: number of texts that left the queue; they leave in order.
    """

    def __init__(self, rows: Sequence[TokenRow]) -> None:
        self.rows = rows
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[np.ndarray] = self.loop.create_future()
        self.vectors: list[np.ndarray] = [np.empty(0)] * len(rows)
        self.left = len(rows)
        self.taken = 0
        self.gone = False
        self.failure: Exception | None = None
        self.since = time.monotonic()

    def settle(self) -> None:
        """Tell who waits; runs in the event loop."""
        if self.done.done():
            return
        if self.failure is not None:
            self.done.set_exception(self.failure)
        else:
            self.done.set_result(np.stack(self.vectors))


@dataclass(order=True, frozen=True)
class Waiting:
    """A text in the queue; ordered by its tag, then by arrival."""

    tag: float
    serial: int
    job: Job = field(compare=False)
    index: int = field(compare=False)

    @property
    def row(self) -> TokenRow:
        return self.job.rows[self.index]


class TextQueue:
    """The texts that wait, by model; every method may be called from any thread.

    Args:
        models: their names.
        most: number of texts that may wait; a request that is alone may have more.
        wait: seconds that a text may wait for company while other requests are being read.

    Attributes:
        texts, tokens: how many wait now.
        speed: tokens per second, as the device did lately.
    """

    def __init__(self, models: Sequence[str], most: int, wait: float) -> None:
        self.most, self.wait = most, wait
        self.texts = self.tokens = 0
        self.speed = 1000.0
        self._heaps: dict[str, list[Waiting]] = {name: [] for name in models}
        self._serial = self._arriving = self._jobs = 0
        self._clock = 0.0
        self._changed = threading.Condition()
        self._closed = False

    def check_room(self, texts: int = 1) -> None:
        """Refuse more texts than may wait.

        Raises:
            Refusal: 429, with the time that what waits will take.
        """
        if self.texts and self.texts + texts > self.most:
            seconds = min(60, max(1, round(self.tokens / self.speed)))
            said = f"{self.texts} texts wait already, and {self.most} may. Fix: try again later."
            raise Refusal(429, said, "queue_full", retry_after=seconds)

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Within it a request is being read, for which others may wait a little."""
        with self._changed:
            self._arriving += 1
        try:
            yield
        finally:
            with self._changed:
                self._arriving -= 1
                self._changed.notify()

    def put(self, model: str, job: Job) -> None:
        """Let the texts of a request wait.

        Raises:
            Refusal: too many wait already.
        """
        with self._changed:
            self.check_room(len(job.rows))
            tag = self._clock
            for index, row in enumerate(job.rows):
                self._serial += 1
                heapq.heappush(self._heaps[model], Waiting(tag, self._serial, job, index))
                tag += len(row.ids)
            self._jobs += 1
            self.texts += len(job.rows)
            self.tokens += sum(len(row.ids) for row in job.rows)
            self._changed.notify()

    def drop(self, job: Job) -> None:
        """Forget the texts of a job that have not left the queue."""
        with self._changed:
            if not job.gone:
                job.gone = True
                self._jobs -= job.taken < len(job.rows)
                self.texts -= len(job.rows) - job.taken
                self.tokens -= sum(len(row.ids) for row in job.rows[job.taken :])

    def close(self) -> None:
        """Let `take` return nothing once the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self, budget: int) -> tuple[str, list[Waiting]]:
        """The next texts of one model, as many as have `budget` tokens; blocks until there are any.

        Returns:
            Its name, and at least one text; none once the queue is closed and empty.
        """
        with self._changed:
            while True:
                heads = {name: head for name in self._heaps if (head := self._head(name))}
                if not heads and self._closed:
                    return "", []
                patience = self._patience(heads, budget)
                if heads and patience <= 0:
                    break
                self._changed.wait(patience if heads else None)
            model = min(heads, key=lambda name: heads[name])
            return model, self._pop(model, budget)

    def _patience(self, heads: dict[str, Waiting], budget: int) -> float:
        """Seconds that are worth waiting for requests that are on their way."""
        if not heads or not self._arriving or self.tokens >= budget:
            return 0.0
        return min(head.job.since for head in heads.values()) + self.wait - time.monotonic()

    def _head(self, model: str) -> Waiting | None:
        heap = self._heaps[model]
        while heap and heap[0].job.gone:
            heapq.heappop(heap)
        return heap[0] if heap else None

    def _pop(self, model: str, budget: int) -> list[Waiting]:
        taken: list[Waiting] = []
        tokens = 0
        while (head := self._head(model)) and (not taken or tokens + len(head.row.ids) <= budget):
            taken.append(heapq.heappop(self._heaps[model]))
            tokens += len(head.row.ids)
            self._clock = max(self._clock, head.tag) + len(head.row.ids) / self._jobs
            head.job.taken += 1
            self._jobs -= head.job.taken == len(head.job.rows)
        self.texts -= len(taken)
        self.tokens -= tokens
        return taken
