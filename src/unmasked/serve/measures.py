"""Metrics of a server for Prometheus: requests, texts, tokens, batches, and the waiting texts.

Labels are known routes and the names of served models, never a client's own words, so their number
is bounded. Each server has its own registry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Measures:
    """The metrics of one server.

    Args:
        waiting: returns the numbers of texts and of tokens that are waiting now.
    """

    def __init__(self, waiting: Callable[[], tuple[int, int]]) -> None:
        self.registry = CollectorRegistry()
        self.unanswered = 0  # requests that the end of the server cut off
        own: Any = {"namespace": "unmasked", "registry": self.registry}
        self._requests = Counter("requests", "Requests answered.", ["route", "status"], **own)
        self._seconds = Histogram(
            "request_seconds", "Time until the answer.", ["route"], buckets=SECONDS, **own
        )
        self._dropped = Counter("dropped", "Requests whose client disconnected.", **own)
        self._texts = Counter("texts", "Texts computed.", ["model"], **own)
        self._tokens = Counter("tokens", "Tokens computed.", ["model"], **own)
        self._forward_seconds = Histogram(
            "forward_seconds", "Time of a batch.", ["model"], buckets=SECONDS, **own
        )
        self._forward_tokens = Histogram(
            "forward_tokens", "Tokens of a batch.", ["model"], buckets=SIZES, **own
        )
        texts = Gauge("waiting_texts", "Texts in the queue.", **own)
        texts.set_function(lambda: waiting()[0])
        tokens = Gauge("waiting_tokens", "Tokens in the queue.", **own)
        tokens.set_function(lambda: waiting()[1])

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def dropped(self) -> None:
        """Count a request whose client disconnected before the answer."""
        self._dropped.inc()

    def forward(self, model: str, texts: int, tokens: int, seconds: float) -> None:
        """Count a batch that was computed."""
        self._texts.labels(model).inc(texts)
        self._tokens.labels(model).inc(tokens)
        self._forward_seconds.labels(model).observe(seconds)
        self._forward_tokens.labels(model).observe(tokens)

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
