"""How much of the time of `encode` the device had nothing to do.

A device that waits is waiting for the host: for texts to be read and tokenised, or for vectors to
be written. On a CPU the forward takes the time of the thread that asks for it, so a clock of the
host around it says all. A GPU works behind the host's back: events in its own stream tell when a
forward began and ended there. They are read some batches later, when the answer is there already,
so that no forward waits for the measurement. Gaps between the kernels of one forward are not seen;
`benchmarks/gpu.py` counts them with a profiler.
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
        """The share of the time that the device waited for the host, from 0 to 1."""
        return max(0.0, 1 - self.worked / self.passed) if self.passed else 0.0

    @contextmanager
    def passing(self) -> Iterator[None]:
        """The time inside the block passes."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.passed += time.perf_counter() - begun

    @contextmanager
    def working(self, device: torch.device) -> Iterator[Callable[[], None]]:
        """The block gives the device work.

        Returns:
            A function to call once the result is wanted: it waits until the work is done, and
            counts how long it took.
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
