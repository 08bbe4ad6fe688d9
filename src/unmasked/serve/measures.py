"""What a server counts, for Prometheus: requests, texts, tokens, forwards, and what waits.

Labels are routes and names of models that are served, never what a client made up, so that their
number is bounded. Each server has a registry of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Measures:
    """The counters of one server.

    Args:
        waiting: numbers of texts and of tokens that wait now.
    """

    def __init__(self, waiting: Callable[[], tuple[int, int]]) -> None:
        self.registry = CollectorRegistry()
        own: Any = {"namespace": "unmasked", "registry": self.registry}
        self._requests = Counter("requests", "Requests answered.", ["route", "status"], **own)
        self._seconds = Histogram(
            "request_seconds", "Time until the answer.", ["route"], buckets=SECONDS, **own
        )
        self._dropped = Counter("dropped", "Requests whose client was gone.", **own)
        self._texts = Counter("texts", "Texts computed.", ["model"], **own)
        self._tokens = Counter("tokens", "Tokens computed.", ["model"], **own)
        self._forward_seconds = Histogram(
            "forward_seconds", "Time of a batch.", ["model"], buckets=SECONDS, **own
        )
        self._forward_tokens = Histogram(
            "forward_tokens", "Tokens of a batch.", ["model"], buckets=SIZES, **own
        )
        gauges = ("waiting_texts", "Texts that wait."), ("waiting_tokens", "Tokens that wait.")
        for place, (name, said) in enumerate(gauges):
            Gauge(name, said, **own).set_function(partial(_number, waiting, place))

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def dropped(self) -> None:
        """A client was gone before its texts were computed."""
        self._dropped.inc()

    def forward(self, model: str, texts: int, tokens: int, seconds: float) -> None:
        """A batch was computed."""
        self._texts.labels(model).inc(texts)
        self._tokens.labels(model).inc(tokens)
        self._forward_seconds.labels(model).observe(seconds)
        self._forward_tokens.labels(model).observe(tokens)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


def _number(waiting: Callable[[], tuple[int, int]], place: int) -> int:
    return waiting()[place]
