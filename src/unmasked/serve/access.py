"""What guards every request: API keys, limits, a time limit, and errors that leak nothing.

A client never sees a stack trace. The log says where an error happened, but never contains its
message, a text, a key or a path with a query, because any of these may be confidential.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unmasked.errors import UnmaskedError
from unmasked.serve.measures import Measures
from unmasked.serve.wire import Refusal

logger = logging.getLogger(__name__)

KEYS_VARIABLE = "UNMASKED_API_KEYS"
"""Environment variable with API keys, separated by commas or white space."""

OPEN = frozenset({"/health", "/ready", "/docs", "/openapi.json"})
"""Paths that need no key: they reveal nothing about the models or about other requests."""

PIECE = 1 << 16  # bytes that are sent before the server checks whether the client still reads


@dataclass(frozen=True)
class Limits:
    """What a client may ask for, and how texts are batched."""

    body: int = 8 << 20  # maximum bytes per request
    inputs: int = 2048  # maximum texts per request
    tokens: int | None = None  # maximum tokens per text, if lower than the model's own limit
    truncate: bool = False
    """Cut longer texts if the request does not say what to do; else they are refused."""
    queue: int = 4096
    """Maximum number of waiting texts; further requests are refused with status 429."""
    seconds: float = 60.0
    """Time limit of a request, from the end of its headers to the last byte of its answer; and of
    the headers, from the first byte that the server waits for."""
    wait: float = 0.002
    """Seconds that a text may wait for others to join its batch, while requests are read."""
    batch_tokens: int | None = None
    """Maximum tokens per forward pass; None for the default of the device."""


class Keys:
    """API keys, stored as digests and compared in constant time.

    Args:
        keys: the keys; without any, every request is admitted.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admit(self, scope: Scope) -> None:
        """Admit a request that has a valid key or needs none.

        Raises:
            Refusal: 401, for any other request.
        """
        if not self._digests or scope["path"] in OPEN:
            return
        headers = dict(scope["headers"])
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(given.strip() if scheme.lower() == b"bearer" else b"").digest()
        # A list, so that every key is compared: stopping early would tell which one matched.
        if not any([hmac.compare_digest(digest, known) for known in self._digests]):
            said = "no valid API key. Fix: send the header 'Authorization: Bearer KEY'."
            raise Refusal(401, said, "invalid_api_key")


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys of a file, one per line, and of the environment.

    Raises:
        UnmaskedError: the file or the variable exists but contains no key, so the server would be
            open to everybody.
    """
    given = environment.get(KEYS_VARIABLE, "").replace(",", " ").split()
    if KEYS_VARIABLE in environment and not given:
        raise UnmaskedError(
            f"{KEYS_VARIABLE} is set but holds no key. Fix: "
            f"export {KEYS_VARIABLE}=$(openssl rand -hex 32), or unset {KEYS_VARIABLE}."
        )
    if file is not None:
        try:
            # Editors on Windows begin a file with a BOM, which is no part of the first key.
            lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            raise UnmaskedError(f"{file} is not text. Fix: one key per line, in UTF-8.") from None
        in_file = [line for line in lines if line and not line.startswith("#")]
        if not in_file:
            raise UnmaskedError(f"{file} holds no key. Fix: openssl rand -hex 32 >> {file}")
        given += in_file
    return Keys(given)


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request that is declared as JSON.

    Raises:
        Refusal: it is not declared as JSON, is compressed, or has more than `most` bytes.
        ClientDisconnect: the client has closed the connection.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Browsers let any web page send other types here without a CORS preflight request.
        said = "the body is not declared as JSON. Fix: Content-Type: application/json."
        raise Refusal(415, said, "unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "the body is compressed. Fix: send it as it is.", "unsupported_encoding")
    too_large = Refusal(
        413, f"the body has more than {most} bytes. Fix: send fewer texts.", "body_too_large"
    )
    length = request.headers.get("content-length", "")
    # 20 digits are enough; int() refuses very long strings.
    if length.isascii() and length.isdigit() and int(length[:20]) > most:
        raise too_large
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > most:
            raise too_large
        pieces.append(piece)
    return b"".join(pieces)


class Guard:
    """ASGI middleware around all routes: key, time limit, metrics, and every error as JSON.

    Requests for other paths than `routes` are counted as ``other``.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, seconds: float, measures: Measures, routes: frozenset[str]
    ) -> None:
        self.app, self.keys, self.seconds = app, keys, seconds
        self.measures, self.routes = measures, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status = time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await _in_pieces(message, send)

        failed = None
        try:
            self.keys.admit(scope)
            await asyncio.wait_for(self.app(scope, receive, sending), self.seconds)
        except ClientDisconnect:
            self.measures.dropped()
            status = 499  # nginx's status for a connection that the client closed
        except asyncio.CancelledError:  # the server ends now, without waiting for the answer
            self.measures.unanswered += 1
            said = "the server was stopped before the answer. Fix: send the request again."
            failed = Refusal(503, said, "server_stopped")
        except Exception as error:
            failed = _as_refusal(error, self.seconds)
        if failed is not None and not status:  # if an answer has begun, uvicorn cuts it off
            await _as_response(failed)(scope, receive, sending)
        route = scope["path"] if scope["path"] in self.routes else "other"
        self.measures.answered(route, status, time.perf_counter() - begun)


def _as_refusal(error: Exception, seconds: float) -> Refusal:
    """The error that a client is sent; an unexpected one is logged without its message."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, asyncio.TimeoutError):
        return Refusal(504, f"no answer within {seconds:g} seconds.", "timeout")
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("A request failed with %s:\n%s", type(error).__name__, where)
    return Refusal(500, "the server failed on this request; its log says where.", "internal_error")


def _as_response(refusal: Refusal) -> JSONResponse:
    headers = {"www-authenticate": "Bearer"} if refusal.status == 401 else {}
    if refusal.retry_after is not None:
        headers["retry-after"] = str(refusal.retry_after)
    return JSONResponse(refusal.body(), refusal.status, headers)


async def _in_pieces(message: Message, send: Send) -> None:
    """Send a long answer piece by piece, so that the time limit also ends one to a slow client."""
    body = message.get("body", b"")
    if len(body) <= PIECE:
        return await send(message)
    for start in range(0, len(body), PIECE):
        more = message.get("more_body", False) or start + PIECE < len(body)
        await send({**message, "body": body[start : start + PIECE], "more_body": more})
