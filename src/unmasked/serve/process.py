"""The process of a server: its address, its models, and how it ends.

The address is taken before a model is loaded, so that a mistake shows at once, and it listens only
when all are there. On SIGTERM or Ctrl-C it listens no more, finishes what it accepted, and ends
with status 0.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

import uvicorn

from unmasked.errors import UnmaskedError
from unmasked.serve.access import Keys
from unmasked.serve.routes import application
from unmasked.serve.service import Service


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet; port 0 takes any that is free.

    Raises:
        UnmaskedError: the address is taken, or is not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        said = error.strerror or str(error)
        raise UnmaskedError(
            f"cannot listen on {host} port {port}: {said}. Fix: another --port (0 for any that is "
            "free), or another --host."
        ) from error
    return taken


def url(taken: socket.socket) -> str:
    """Where a socket is reached."""
    host, port = taken.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def model_names(given: Iterable[str]) -> dict[str, str]:
    """Name by which clients call a model → what is loaded.

    Args:
        given: ``MODEL`` or ``NAME=MODEL``; a folder is called by its last part, a repository of the
            hub by its whole name.

    Raises:
        UnmaskedError: two have one name.
    """
    names: dict[str, str] = {}
    for word in given:
        name, equals, model = word.partition("=")
        if not equals or "/" in name or not name or not model or Path(word).exists():
            name, model = (Path(word).resolve().name if Path(word).is_dir() else word), word
        if name in names:
            raise UnmaskedError(
                f"two models are called '{name}'. Fix: name one of them, as in "
                f"unmasked serve {names[name]} other={model}"
            )
        names[name] = model
    return names


def run_server(
    service: Service, keys: Keys, taken: socket.socket, announce: Callable[[str], None]
) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then finish those that were accepted.

    Args:
        service: the models; its threads must run.
        keys: who may come in.
        taken: as `bind` returns it.
        announce: told where the server is, once a connection to it is not refused any more.
    """
    config = uvicorn.Config(
        application(service, keys),
        lifespan="off",
        log_level="warning",
        access_log=False,  # a path with a query may hold what is not for a log
        server_header=False,
        timeout_graceful_shutdown=int(service.limits.seconds) + 1,
    )
    before = {
        number: signal.signal(number, lambda *_: None)  # uvicorn raises them again at its end
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        taken.listen(config.backlog)
        announce(url(taken))
        uvicorn.Server(config).run(sockets=[taken])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
