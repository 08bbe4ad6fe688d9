"""The one thread that runs forward passes: it takes waiting texts and gives each its vector.

There is one thread for all models, because they share the device, and because a packed batch
belongs to the thread that runs it. A batch that fails is run again text by text, so that only the
request at fault fails.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from asyncio import AbstractEventLoop
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from unmasked.serve.measures import Measures
from unmasked.serve.text_queue import Job, TextQueue, Waiting
from unmasked.text.tokens import TokenRow

logger = logging.getLogger(__name__)

Compute = Callable[[Sequence[TokenRow]], np.ndarray]  # vectors (N, D) of N rows of ids

SICK = 5  # after this many failed texts in a row, ``/health`` reports that a restart is needed


class DeviceThread:
    """Computes the texts of a queue, until the queue is closed and empty.

    `models` has the function of each model that computes its vectors, and `budget` is the maximum
    number of tokens per forward pass.
    """

    def __init__(
        self, queue: TextQueue, models: Mapping[str, Compute], budget: int, measures: Measures
    ) -> None:
        self.queue, self.models, self.budget, self.measures = queue, models, budget, measures
        self._failed_in_a_row = 0
        self._thread = threading.Thread(target=self._work, name="unmasked-device", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Compute the waiting texts, then end the thread."""
        self.queue.close()
        self._thread.join()

    @property
    def healthy(self) -> bool:
        """Whether the thread runs, and its last `SICK` texts have not all failed."""
        return self._thread.is_alive() and self._failed_in_a_row < SICK

    def _work(self) -> None:
        while True:
            model, texts = self.queue.take(self.budget)
            if not texts:
                return
            begun = time.perf_counter()
            self._compute(self.models[model], texts)
            seconds = time.perf_counter() - begun
            tokens = sum(len(text.row.ids) for text in texts)
            # An exponential moving average, from which Retry-After is estimated.
            self.queue.speed += 0.2 * (tokens / seconds - self.queue.speed)
            self.measures.forward(model, len(texts), tokens, seconds)
            self._finish(texts)

    def _compute(self, compute: Compute, texts: Sequence[Waiting]) -> None:
        """Give each text its vector, or its job the error that prevented it."""
        try:
            vectors = compute([text.row for text in texts])
        except Exception as error:
            if len(texts) > 1:
                for text in texts:
                    self._compute(compute, [text])
                return
            # Only the place is logged: the message may contain a text.
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("A forward failed with %s:\n%s", type(error).__name__, where)
            texts[0].job.failure = error
            self._failed_in_a_row += 1
        else:
            self._failed_in_a_row = 0
            for text, vector in zip(texts, vectors, strict=True):
                text.job.vectors[text.index] = vector

    def _finish(self, texts: Sequence[Waiting]) -> None:
        """Settle the jobs that have all their vectors, or have failed, in their event loops."""
        ended: dict[AbstractEventLoop, set[Job]] = defaultdict(set)
        for text in texts:
            text.job.left -= 1
            if text.job.failure is not None:
                self.queue.drop(text.job)
            if text.job.left == 0 or text.job.failure is not None:
                ended[text.job.loop].add(text.job)
        for loop, jobs in ended.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, jobs)


def _settle(jobs: set[Job]) -> None:
    for job in jobs:
        job.settle()
