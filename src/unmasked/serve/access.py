"""What stands before every request: keys, limits, time, and errors that tell no secrets.

A client never sees a stack trace. What is logged is where an error happened, and never its message,
a text, a key or a path with a query: any of these may hold what is not for a log.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unmasked.errors import UnmaskedError
from unmasked.serve.measures import Measures
from unmasked.serve.wire import Refusal

logger = logging.getLogger(__name__)

KEYS_VARIABLE = "UNMASKED_API_KEYS"
"""Variable of the environment with keys, parted by commas or white space."""

OPEN = frozenset({"/health", "/ready", "/docs", "/openapi.json"})
"""Paths that need no key: they tell nothing of models or of others' requests."""

PIECE = 1 << 16
"""Bytes that are sent before the server looks whether the client reads them."""


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
        body: bytes of a request.
        inputs: texts of a request.
        tokens: tokens of a text, if fewer than the model's own limit.
        truncate: cut longer texts where a request does not say; else they are refused.
        queue: texts that may wait before requests are refused with 429.
        seconds: until a request is given up, from its first byte to the last of its answer.
        wait: seconds that a text may wait for company while other requests are being read.
        batch_tokens: tokens of a forward; None for what suits the device.
    """

    body: int = 8 << 20
    inputs: int = 2048
    tokens: int | None = None
    truncate: bool = False
    queue: int = 4096
    seconds: float = 60.0
    wait: float = 0.002
    batch_tokens: int | None = None


class Keys:
    """API keys, kept as digests, and compared in a time that does not depend on them.

    Args:
        keys: none at all lets everybody in.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admit(self, scope: Scope) -> None:
        """Let a request pass that has a key, or needs none.

        Raises:
            Refusal: 401.
        """
        if not self._digests or scope["path"] in OPEN:
            return
        headers = dict(scope["headers"])
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(given.strip() if scheme.lower() == b"bearer" else b"").digest()
        if not any([hmac.compare_digest(digest, known) for known in self._digests]):
            said = "no valid API key. Fix: send the header 'Authorization: Bearer KEY'."
            raise Refusal(401, said, "invalid_api_key")


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys of a file, one a line, and of the environment.

    Raises:
        UnmaskedError: the file is there and holds no key; the server would be open to everybody.
    """
    given = environment.get(KEYS_VARIABLE, "").replace(",", " ").split()
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError:
            raise UnmaskedError(f"{file} is not text. Fix: one key a line, in UTF-8.") from None
        own = [line for line in lines if line and not line.startswith("#")]
        if not own:
            raise UnmaskedError(f"{file} holds no key. Fix: openssl rand -hex 32 >> {file}")
        given += own
    return Keys(given)


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request, if it says that it is JSON.

    Raises:
        Refusal: it does not, is encoded, or has more bytes than it may.
        ClientDisconnect: the client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page in a browser may send any other type here without asking first.
        said = "the body is not declared as JSON. Fix: Content-Type: application/json."
        raise Refusal(415, said, "unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "the body is compressed. Fix: send it as it is.", "unsupported_encoding")
    too_large = Refusal(
        413, f"the body has more than {most} bytes. Fix: send fewer texts.", "body_too_large"
    )
    length = request.headers.get("content-length", "")
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

    Args:
        app: what it guards.
        keys: who may come in.
        seconds: the time limit of a request.
        measures: what is counted.
        routes: paths that are counted under their own name.
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
            status = 499  # what nginx calls it
        except Exception as error:
            failed = _as_refusal(error, self.seconds)
        if failed is not None and not status:  # of an answer that was cut off, uvicorn takes care
            await refuse(failed, sending)
        route = scope["path"] if scope["path"] in self.routes else "other"
        self.measures.answered(route, status, time.perf_counter() - begun)


def _as_refusal(error: Exception, seconds: float) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, asyncio.TimeoutError):
        return Refusal(504, f"no answer within {seconds:g} seconds.", "timeout")
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("A request failed with %s:\n%s", type(error).__name__, where)
    return Refusal(500, "the server failed at this request; its log says where.", "internal_error")


async def refuse(refusal: Refusal, send: Send) -> None:
    """Send an error."""
    body = json.dumps(refusal.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if refusal.retry_after is not None:
        headers.append((b"retry-after", b"%d" % refusal.retry_after))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _in_pieces(message: Message, send: Send) -> None:
    """Send a long answer piece by piece, so that the time limit holds for a client that is slow."""
    body = message.get("body", b"")
    if len(body) <= PIECE:
        return await send(message)
    for start in range(0, len(body), PIECE):
        more = message.get("more_body", False) or start + PIECE < len(body)
        await send({**message, "body": body[start : start + PIECE], "more_body": more})
