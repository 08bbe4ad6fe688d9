"""The process of a server: its address, the names of its models, and its end.

The address is bound before a model is loaded, so that a mistake shows at once, but the server
listens only after all models are loaded. On SIGTERM or Ctrl-C it stops listening, answers the
requests that it has accepted, and exits with status 0.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from unmasked.errors import UnmaskedError
from unmasked.serve.access import Keys
from unmasked.serve.routes import application
from unmasked.serve.service import Service

IDLE_SECONDS = 75
"""How long an idle connection stays open: longer than clients and load balancers keep one (most for
60 seconds), because their request fails if it meets a connection that is being closed."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound to the address but does not listen yet; port 0 takes a free port.

    Raises:
        UnmaskedError: the address is in use, or does not belong to this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnmaskedError(
            f"cannot listen on {host} port {port}: {reason}. Fix: another --port (0 takes a free "
            "one), or another --host."
        ) from error
    return bound


def url(bound: socket.socket) -> str:
    """The URL of a server that listens on this socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def model_names(given: Iterable[str]) -> dict[str, str]:
    """The name by which clients call each model → the hub name or folder that is loaded.

    Args:
        given: ``MODEL`` or ``NAME=MODEL``. Without a name, a folder is called by the last part of
            its path, and a model of the hub by its full name.

    Raises:
        UnmaskedError: two models have the same name.
    """
    names: dict[str, str] = {}
    for word in given:
        name, equals, model = word.partition("=")
        # An equals sign may also belong to a path: of an existing file, or behind a slash.
        if not equals or "/" in name or not name or not model or Path(word).exists():
            name, model = (Path(word).resolve().name if Path(word).is_dir() else word), word
        if name in names:
            raise UnmaskedError(
                f"two models are called '{name}'. Fix: name one of them, as in "
                f"unmasked serve {names[name]} other={model}"
            )
        names[name] = model
    return names


class TimelyProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol, but a connection is closed if the headers of a request do not end.

    uvicorn waits for them for ever, and a limit in the application begins after them. uvicorn
    itself closes a connection that is idle after an answer.

    Args:
        seconds: how long the server waits, from the connection or the first byte of the headers.
        given: the arguments that uvicorn gives to a protocol.
    """

    def __init__(self, seconds: float, **given: Any) -> None:
        super().__init__(**given)
        self._seconds = seconds
        self._headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _watch_headers(self) -> None:
        """Start the time limit if no request is being answered; else end it."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._headers_due is None:
            self._headers_due = self.loop.call_later(self._seconds, self.transport.close)

    def _stop_watching(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None


def server_config(service: Service, keys: Keys) -> uvicorn.Config:
    """How uvicorn runs the application of a service."""
    protocol: Any = partial(TimelyProtocol, service.limits.seconds)
    return uvicorn.Config(
        application(service, keys),
        http=protocol,
        lifespan="off",
        log_level="warning",
        access_log=False,  # a path with a query may be confidential
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=int(service.limits.seconds) + 1,
    )


def run_server(
    service: Service, keys: Keys, bound: socket.socket, announce: Callable[[str], None]
) -> int:
    """Answer requests until SIGTERM or Ctrl-C, then finish those that were accepted.

    Args:
        service: the models; its threads must be running.
        keys, bound: from `read_keys` and `bind`.
        announce: is called with the server's URL as soon as clients can connect.

    Returns:
        The number of accepted requests that were not answered: a second Ctrl-C ends the server
        without waiting for them, and so does the time limit of requests.
    """
    config = server_config(service, keys)
    # uvicorn handles these signals while it runs, and raises them again when it ends. The handlers
    # that do nothing let this function return instead of ending the process.
    before = {
        number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        bound.listen(config.backlog)
        announce(url(bound))
        uvicorn.Server(config).run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return service.measures.unanswered
