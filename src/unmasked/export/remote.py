"""Asks a running server for vectors, by OpenAI's API or by that of text-embeddings-inference.

vLLM, llama.cpp, Ollama and most others implement OpenAI's; a first request finds out which one a
server has. Only the standard library is used. An API key is read from the environment variable
UNMASKED_API_KEY. It is sent to the given address only, never to the target of a redirection. Cost:
one request per text, and one for all texts.
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

from unmasked.errors import DataError, first_line, unknown

KEY = "UNMASKED_API_KEY"
SECONDS = 300.0  # time limit of a request
PATHS = {"openai": "/v1/embeddings", "tei": "/embed"}  # API → the path to which texts are sent


class Refused(DataError):
    """The server refused a request.

    Attributes:
        status: its HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class VectorServer:
    """A server that turns texts into vectors.

    Args:
        url: its address, such as ``http://127.0.0.1:8000``, with or without the path.
        model: its name for the model. None takes the first model that it lists; if it lists none,
            no name is sent. A name must be one that it lists, if it lists any.

    Attributes:
        shape: its API, ``openai`` or ``tei``.
        address: the URL to which texts are sent.
        prompted: whether it is `unmasked serve`, whose requests have a field for the prompt.

    Raises:
        DataError: the address is not a URL, no server there has one of the two APIs, or it does not
            have the model.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DataError(
                f"{url} is not an address. Allowed: http://HOST:PORT. "
                "Fix: unmasked verify http://127.0.0.1:8000 --against DIR."
            )
        path, base = parts.path.rstrip("/"), f"{parts.scheme}://{parts.netloc}"
        self._base = base + re.sub(r"/(v1/embeddings|v1|embed)$", "", path)
        listed = self._listed()
        self.prompted = any(row.get("owned_by") == "unmasked" for row in listed or [])
        names = [str(row["id"]) for row in listed or [] if "id" in row]
        if model and names and model not in names:
            raise DataError(unknown(f"model of {self._base}", model, names))
        self.model = model or next(iter(names), None)
        if path.endswith("/embeddings"):
            self.shape, self.address = "openai", base + path
        elif path.endswith("/embed"):
            self.shape, self.address = "tei", base + path
        else:
            self.shape, self.address = self._find(any_api=listed is None)
        if model and not self._takes_name:
            raise DataError(
                f"requests to {self.address} have no field for the name of a model ('{model}'). "
                "Fix: leave out --model, if the server has only one."
            )

    @property
    def _takes_name(self) -> bool:
        """Whether a request names the model: TEI's API has no field for it, except in ours."""
        return self.shape == "openai" or self.prompted

    def vectors(self, texts: Sequence[str], prompt: str = "") -> np.ndarray:
        """(N, D) vectors of N texts, in one request.

        Args:
            texts: the texts.
            prompt: the text before each of them; only for a server that is `prompted`.

        Raises:
            Refused: the server answered with an error.
            DataError: the server does not answer, or with something else than vectors.
        """
        if self.shape == "tei":
            body: dict[str, Any] = {"inputs": list(texts)}
        else:
            body = {"input": list(texts), "encoding_format": "float"}
        if self.model and self._takes_name:
            body["model"] = self.model
        if self.prompted:
            body |= {"prompt": prompt, "truncate": True}
        elif prompt:
            raise ValueError("requests to this server have no field for a prompt")
        answer = self._ask(self.address, body)
        try:
            rows = answer
            if self.shape == "openai":
                data = sorted(answer["data"], key=lambda row: row["index"])
                rows = [row["embedding"] for row in data]
            found = np.asarray(rows, dtype=np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise self._no_vectors(first_line(error)) from error
        if found.ndim != 2 or len(found) != len(texts):
            raise self._no_vectors(f"shape {found.shape} for {len(texts)} texts")
        return found

    def _find(self, any_api: bool) -> tuple[str, str]:
        """Find the API and its URL by asking for a vector.

        Args:
            any_api: whether TEI's API is tried too. A server with OpenAI's list of models has
                OpenAI's API, and what it refuses there is its answer.
        """
        said = []
        for shape, path in PATHS.items():
            self.shape, self.address = shape, self._base + path
            try:
                self.vectors(["probe"])
                return self.shape, self.address
            except Refused as error:
                said.append(f"{path}: {error}")
                missing = error.status in (404, 405, 501) and "model_not_found" not in str(error)
                if not (any_api and missing):
                    raise
        raise DataError(
            f"{self._base} has neither OpenAI's API nor that of text-embeddings-inference "
            f"({'; '.join(said)}). Fix: give the whole address, as http://HOST:PORT/v1/embeddings."
        )

    def _listed(self) -> list[dict[str, Any]] | None:
        """The models that the server lists; None if it has no such list."""
        try:
            listed = self._ask(f"{self._base}/v1/models", None)
            return [row for row in listed["data"] if isinstance(row, dict)]
        except (DataError, KeyError, TypeError):
            return None

    def _ask(self, address: str, body: dict[str, Any] | None) -> Any:
        """Send a request (GET without a body, else POST) and parse its answer as JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(address, data, {"Content-Type": "application/json"})
        if key := os.environ.get(KEY):
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        try:
            with urlopen(request, timeout=SECONDS) as answer:
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
            f"{self.address} answered with something else than vectors ({why}). Fix: give the "
            "address of the embeddings, as http://HOST:PORT/v1/embeddings."
        )
