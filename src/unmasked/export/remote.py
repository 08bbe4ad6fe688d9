"""Asks a running server for vectors, in OpenAI's shape or in that of text-embeddings-inference.

vLLM, llama.cpp, Ollama and most others speak the first; which one a server speaks is found by
asking. Only the standard library is used. A key is taken from the variable UNMASKED_API_KEY, and
goes to the given address and nowhere else: redirections are not followed with it. Cost: one request
a text, and one for all.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np

from unmasked.errors import DataError, first_line

KEY = "UNMASKED_API_KEY"
PATHS = {"openai": "/v1/embeddings", "tei": "/embed"}
"""Where a server of each shape takes texts."""


class Refused(DataError):
    """The server answered, and refused. Attribute ``status`` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class VectorServer:
    """A server that turns texts into vectors.

    Args:
        url: its address, ``http://127.0.0.1:8000``, with the path or without.
        model: how it calls the model; None takes the first that it lists, and is not sent if it
            lists none.
        timeout: seconds that an answer may take.

    Attributes:
        shape: ``openai`` or ``tei``.
        address: where texts are sent.
        prompted: it is `unmasked serve`, which takes what stands before a text apart from it.

    Raises:
        DataError: the address is no URL, or nothing there answers in either shape.
    """

    def __init__(self, url: str, model: str | None = None, timeout: float = 300.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DataError(
                f"{url} is not an address. Allowed: http://HOST:PORT. "
                "Fix: unmasked verify http://127.0.0.1:8000 --against DIR."
            )
        self._timeout = timeout
        path, base = parts.path.rstrip("/"), f"{parts.scheme}://{parts.netloc}"
        self._base = base + re.sub(r"/(v1/embeddings|v1|embed)$", "", path)
        listed = self._listed()
        self.prompted = any(row.get("owned_by") == "unmasked" for row in listed)
        self.model = model or next((str(row["id"]) for row in listed if "id" in row), None)
        if path.endswith("/embeddings"):
            self.shape, self.address = "openai", base + path
        elif path.endswith("/embed"):
            self.shape, self.address = "tei", base + path
        else:
            self.shape, self.address = self._find()

    def vectors(self, texts: Sequence[str], prompt: str = "") -> np.ndarray:
        """(N, D) vectors of N texts, in one request, and in full if it takes a prompt apart.

        Raises:
            Refused: the server answered with an error.
            DataError: it does not answer, or with something else than vectors.
        """
        if self.shape == "tei":
            body: dict[str, Any] = {"inputs": list(texts)}
        else:
            body = {"input": list(texts), "encoding_format": "float"}
            body |= {"model": self.model} if self.model else {}
        if self.prompted:
            body |= {"prompt": prompt, "truncate": True}
        elif prompt:
            raise ValueError("this server takes no prompt apart from the text")
        answer = self._ask(self.address, body)
        try:
            rows = answer
            if self.shape == "openai":
                rows = [
                    row["embedding"] for row in sorted(answer["data"], key=lambda r: r["index"])
                ]
            found = np.asarray(rows, dtype=np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise self._no_vectors(first_line(error)) from error
        if found.ndim != 2 or len(found) != len(texts):
            raise self._no_vectors(f"shape {found.shape} for {len(texts)} texts")
        return found

    def _find(self) -> tuple[str, str]:
        said = []
        for shape, path in PATHS.items():
            self.shape, self.address = shape, self._base + path
            try:
                self.vectors(["probe"])
                return self.shape, self.address
            except Refused as error:
                said.append(f"{path}: {error}")
                if error.status not in (404, 405, 501):
                    raise
        raise DataError(
            f"{self._base} takes texts neither as OpenAI's API nor as text-embeddings-inference "
            f"({'; '.join(said)}). Fix: give the whole address, as http://HOST:PORT/v1/embeddings."
        )

    def _listed(self) -> list[dict[str, Any]]:
        """The models that it lists; none if it has no such list."""
        try:
            listed = self._ask(f"{self._base}/v1/models", None)
            return [row for row in listed["data"] if isinstance(row, dict)]
        except (DataError, KeyError, TypeError):
            return []

    def _ask(self, address: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(address, data, {"Content-Type": "application/json"})
        if key := os.environ.get(KEY):
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        try:
            with urlopen(request, timeout=self._timeout) as answer:
                return json.load(answer)
        except HTTPError as error:
            said = error.read(300).decode(errors="replace").strip()
            fix = f"set {KEY}" if error.code in (401, 403) else "see what the server logs"
            raise Refused(
                f"{address} answered {error.code}: {said.rstrip('.')}. Fix: {fix}.", error.code
            ) from error
        except (URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", None) or first_line(error)
            raise DataError(
                f"{address} does not answer ({reason}). Fix: start the server, and give the "
                "address it prints."
            ) from error
        except ValueError as error:
            raise self._no_vectors(first_line(error)) from error

    def _no_vectors(self, why: str) -> DataError:
        return DataError(
            f"{self.address} answered something else than vectors ({why}). Fix: give the address "
            "of the embeddings, as http://HOST:PORT/v1/embeddings."
        )
