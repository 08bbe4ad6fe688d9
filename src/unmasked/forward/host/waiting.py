"""How much of the time of `encode` the device is idle.

An idle device waits for the host: for texts to be read and tokenised, or for vectors to be written.
On a CPU the forward runs in the calling thread, so the host's clock measures it. A GPU runs
asynchronously: events in its stream record when a forward begins and ends. They are read some
batches later, when the GPU has passed them, so that no forward waits for the measurement. Gaps
between the kernels of one forward are not measured; `benchmarks/gpu.py` counts them with a
profiler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class DeviceTime:
    """Seconds that passed while `encode` ran, and those in which the device was in a forward."""

    passed: float = 0.0
    worked: float = 0.0

    @property
    def waited(self) -> float:
        """The share of the time in which the device waited for the host, from 0 to 1."""
        return max(0.0, 1 - self.worked / self.passed) if self.passed else 0.0

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Add the time inside the block to `passed`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.passed += time.perf_counter() - begun

    @contextmanager
    def working(self, device: torch.device) -> Iterator[Callable[[], None]]:
        """Add the device time of the work that is started inside the block to `worked`.

        Yields:
            A function to call before the result is used. On a GPU it waits for the work to end and
            only then adds its time.
        """
        if device.type != "cuda":
            begun = time.perf_counter()
            yield lambda: None
            self.worked += time.perf_counter() - begun
            return
        stream = torch.cuda.current_stream(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def done() -> None:
            end.synchronize()
            self.worked += begin.elapsed_time(end) / 1000

        begin.record(stream)
        yield done
        end.record(stream)
