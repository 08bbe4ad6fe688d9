"""The threads that run forward passes: they take waiting texts and give each its vector.

On a GPU one thread runs all models, because they share the device. On a CPU up to `MOST` forward
passes run at once, each on a part of the cores. The threads of one forward pass wait for each other
after every operation, so one core that is busy with requests holds up all of them; separate forward
passes do not wait for each other. A forward pass that is alone has all cores.

A batch that fails is run again text by text, so that only the request at fault fails.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from asyncio import AbstractEventLoop
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import numpy as np
import torch

from unmasked.serve.measures import Measures
from unmasked.serve.text_queue import Job, TextQueue, Waiting
from unmasked.text.tokens import TokenRow

logger = logging.getLogger(__name__)

Compute = Callable[[Sequence[TokenRow]], np.ndarray]  # vectors (N, D) of N rows of ids

SICK = 5  # after this many failed texts in a row, ``/health`` reports that a restart is needed


MOST = 4
"""Most forward passes at once on a CPU: each needs memory, and more of them have fewer cores."""


class ForwardThreads:
    """Compute the texts of a queue, until the queue is closed and empty.

    Args:
        queue: the waiting texts.
        models: the function of each model that computes its vectors.
        budget: maximum number of tokens per forward pass.
        measures: counts the forward passes.
        count: number of threads; several divide the cores that torch uses among themselves.
    """

    def __init__(
        self,
        queue: TextQueue,
        models: Mapping[str, Compute],
        budget: int,
        measures: Measures,
        count: int = 1,
    ) -> None:
        self.queue, self.models, self.budget, self.measures = queue, models, budget, measures
        self.cores = torch.get_num_threads()
        self._failed_in_a_row = self._running = 0
        self._counting = threading.Lock()  # two threads may compute texts of one job
        self._threads = [
            threading.Thread(target=self._work, name=f"unmasked-forward-{number}", daemon=True)
            for number in range(count)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Compute the waiting texts, then end the threads."""
        self.queue.close()
        for thread in self._threads:
            thread.join()
        if len(self._threads) > 1:
            torch.set_num_threads(self.cores)  # a new thread begins with the number last set

    @property
    def healthy(self) -> bool:
        """Whether the threads run, and the last `SICK` texts have not all failed."""
        alive = all(thread.is_alive() for thread in self._threads)
        return alive and self._failed_in_a_row < SICK

    def _work(self) -> None:
        while True:
            model, texts = self.queue.take(self.budget)
            if not texts:
                return
            at_once = self._begin()
            begun = time.perf_counter()
            self._compute(self.models[model], texts)
            seconds = time.perf_counter() - begun
            tokens = sum(len(text.row.ids) for text in texts)
            self.measures.forward(model, len(texts), tokens, seconds)
            with self._counting:
                # An exponential moving average, from which Retry-After is estimated.
                self.queue.speed += 0.2 * (at_once * tokens / seconds - self.queue.speed)
                self._finish(texts)
                self._running -= 1

    def _begin(self) -> int:
        """Take a share of the cores for a forward pass, and return how many passes share them.

        These are the running ones, and one more if texts are waiting for another thread.
        """
        with self._counting:
            self._running += 1
            at_once = min(self._running + (self.queue.texts > 0), len(self._threads))
        if len(self._threads) > 1:
            torch.set_num_threads(max(1, self.cores // at_once))  # of the calling thread alone
        return at_once

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
            with self._counting:
                self._failed_in_a_row += 1
        else:
            with self._counting:
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
            with suppress(RuntimeError):  # the loop is closed: nobody waits for the jobs
                loop.call_soon_threadsafe(_settle, jobs)


def _settle(jobs: set[Job]) -> None:
    for job in jobs:
        job.settle()
