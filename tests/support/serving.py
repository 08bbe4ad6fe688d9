"""A server on loopback, whose forwards wait for the test, and requests that misbehave."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from unmasked.serve import Service
from unmasked.serve.access import Keys
from unmasked.serve.process import server_config

EVERYBODY = Keys()
PATIENCE = 60
"""Seconds after which something that never happens is a failure."""


class Listener(socket.socket):
    """A listening socket that tells when the server has closed it."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()
        self.bind(("127.0.0.1", 0))
        self.listen(64)

    def close(self) -> None:
        super().close()
        self.ended.set()


@contextmanager
def listening(
    service: Service, keys: Keys = EVERYBODY, taken: Listener | None = None, force: bool = False
) -> Iterator[tuple[str, int]]:
    """The address of a service that answers in a thread.

    At the end, what was accepted is answered; with `force` it is cut off, as by a second Ctrl-C.
    """
    taken = taken or Listener()
    server = uvicorn.Server(server_config(service, keys))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()
    try:
        yield taken.getsockname()
    finally:
        server.should_exit, server.force_exit = True, force
        thread.join(PATIENCE)
        taken.close()
        assert not thread.is_alive(), "the server does not end"


class Gate:
    """Holds up a model's forwards until it is opened, and keeps what they were given."""

    def __init__(self, service: Service, model: str) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        self.rows: list[Any] = []
        self._compute = service.forwards.models[model]
        service.forwards.models = {**service.forwards.models, model: self}

    def __call__(self, rows: list[Any]) -> Any:
        self.rows.extend(rows)
        self.entered.set()
        assert self.opened.wait(PATIENCE)
        return self._compute(rows)


def told(owner: Any, method: str) -> threading.Event:
    """An event that is set whenever a method of an object has run."""
    event, original = threading.Event(), getattr(owner, method)

    def wrapped(*given: Any, **named: Any) -> Any:
        try:
            return original(*given, **named)
        finally:
            event.set()

    setattr(owner, method, wrapped)
    return event


def asked(path: str, body: Any) -> bytes:
    """The bytes of a POST."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content
