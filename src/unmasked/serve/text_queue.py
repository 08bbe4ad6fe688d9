"""Which of the waiting texts are computed next: a fair order, decided as late as possible.

The device takes a batch when it is free, so texts gather while a forward pass runs, and their order
is decided only then. A request is not served as a whole. Each of its texts has a tag: the virtual
time (the clock) at its arrival plus the number of tokens before it in its own request. Texts with
the lowest tags go first. The clock advances by the tokens that each waiting request would have got
if all were served at the same rate (weighted fair queueing, Demers, Keshav and Shenker 1989; tags
as in start-time fair queueing, Goyal, Vin and Cheng 1996). So requests of one text, long or short,
are served in the order of their arrival. They do not wait for a request of two thousand documents
that came a moment before, and that request still makes progress.

Cost: a push to and a pop from a heap for each text.
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
    """The texts of one request, and their vectors so far."""

    def __init__(self, rows: Sequence[TokenRow]) -> None:
        self.rows = rows
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[np.ndarray] = self.loop.create_future()
        """The (N, D) vectors of all texts, or the error of the first text that failed."""
        self.vectors: list[np.ndarray] = [np.empty(0)] * len(rows)
        self.left = len(rows)  # number of texts without a vector
        self.taken = 0  # number of texts that have left the queue; they leave in order
        self.gone = False  # whether nobody waits any more; its remaining texts are not computed
        self.failure: Exception | None = None
        self.since = time.monotonic()

    def settle(self) -> None:
        """Set `done`; runs in the event loop."""
        if self.done.done():
            return
        if self.failure is not None:
            self.done.set_exception(self.failure)
            self.done.exception()  # else asyncio logs the message if nobody awaits it any more
        else:
            self.done.set_result(np.stack(self.vectors))


@dataclass(order=True, frozen=True)
class Waiting:
    """A text in the queue; sorted by its tag, then by arrival."""

    tag: float
    serial: int
    job: Job = field(compare=False)
    index: int = field(compare=False)

    @property
    def row(self) -> TokenRow:
        return self.job.rows[self.index]


class TextQueue:
    """The waiting texts of each model; every method may be called from any thread.

    Args:
        most: maximum number of waiting texts; an empty queue accepts a request of any size.
        wait: seconds that a text may wait for others to join its batch while requests are read.
    """

    def __init__(self, models: Sequence[str], most: int, wait: float) -> None:
        self.most, self.wait = most, wait
        self.texts = self.tokens = 0  # that are waiting now
        self.speed = 1000.0  # recent speed of the device in tokens per second
        self._heaps: dict[str, list[Waiting]] = {name: [] for name in models}
        self._serial = 0
        self._arriving = 0  # requests that are being read
        self._jobs = 0  # jobs with texts in the queue
        self._clock = 0.0  # virtual time, in tokens
        self._changed = threading.Condition()
        self._closed = False

    def check_room(self, texts: int = 1) -> None:
        """Refuse a request whose texts would make too many wait.

        Raises:
            Refusal: 429, with the estimated time until the waiting texts are done.
        """
        if self.texts and self.texts + texts > self.most:
            seconds = min(60, max(1, round(self.tokens / self.speed)))
            said = f"{self.texts} texts are waiting, and the limit is {self.most}."
            raise Refusal(429, f"{said} Fix: try again later.", "queue_full", retry_after=seconds)

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """A context in which a request is being read; texts may wait a little for its texts."""
        with self._changed:
            self._arriving += 1
        try:
            yield
        finally:
            with self._changed:
                self._arriving -= 1
                self._changed.notify_all()

    def put(self, model: str, job: Job) -> None:
        """Add the texts of a request, unless `check_room` refuses it."""
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
            self._changed.notify_all()

    def drop(self, job: Job) -> None:
        """Give up the texts of a job that have not left the queue; `_head` removes them later."""
        with self._changed:
            if not job.gone:
                job.gone = True
                self._jobs -= job.taken < len(job.rows)  # a bool: 1 if the job has texts here
                self.texts -= len(job.rows) - job.taken
                self.tokens -= sum(len(row.ids) for row in job.rows[job.taken :])

    def close(self) -> None:
        """Let `take` return no texts once the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self, budget: int) -> tuple[str, list[Waiting]]:
        """Wait for texts, then take the next ones of one model, up to `budget` tokens.

        Returns:
            The model's name and at least one text; no texts once the queue is closed and empty.
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
        """Seconds to wait for the texts of requests that are being read; 0 or less for none."""
        if not heads or not self._arriving or self.tokens >= budget:
            return 0.0
        return min(head.job.since for head in heads.values()) + self.wait - time.monotonic()

    def _head(self, model: str) -> Waiting | None:
        """The model's next text, after texts that nobody waits for are removed."""
        heap = self._heaps[model]
        while heap and heap[0].job.gone:
            heapq.heappop(heap)
        return heap[0] if heap else None

    def _pop(self, model: str, budget: int) -> list[Waiting]:
        """Take texts of a model up to `budget` tokens, at least one, and advance the clock."""
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
