"""The routes, and the OpenAPI page that describes them.

Bodies are read as bytes and checked in a worker thread, so FastAPI needs their types only for its
OpenAPI page.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from unmasked import __version__
from unmasked.serve.access import Guard, Keys, read_body
from unmasked.serve.service import Inputs, Prepared, Service, Write
from unmasked.serve.wire import (
    Asked,
    EmbedBody,
    EmbeddingsAnswer,
    EmbeddingsBody,
    ErrorAnswer,
    ModelAnswer,
    ModelsAnswer,
    Refusal,
    SimilarityBody,
)

ROUTES = frozenset(
    {"/v1/embeddings", "/v1/models", "/embed", "/similarity", "/health", "/ready", "/metrics"}
)
BODIES = (EmbeddingsBody, EmbedBody, SimilarityBody)
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": said}
    for status, said in {
        400: "The body is invalid, or exceeds a limit.",
        401: "No valid API key.",
        404: "No such model.",
        413: "The body is too large.",
        415: "The body is not JSON.",
        429: "Too many texts are waiting; see the header Retry-After.",
        503: "The server was stopped before the answer.",
        504: "The time limit was exceeded.",
    }.items()
}


def application(service: Service, keys: Keys | None = None) -> FastAPI:
    """The ASGI application of a service, whose threads must be running; by default without keys."""
    app = FastAPI(title="unmasked", version=__version__, redoc_url=None)
    app.add_middleware(
        Guard,
        keys=keys or Keys(),
        seconds=service.limits.seconds,
        measures=service.measures,
        routes=ROUTES,
    )
    _add_embedding_routes(app, service)
    _add_state_routes(app, service)

    @app.exception_handler(HTTPException)  # unknown paths and methods
    async def http_error(_: Request, error: HTTPException) -> Response:
        body = Refusal(error.status_code, f"{error.detail}.", "http_error").body()
        return JSONResponse(body, error.status_code, error.headers)

    description = _description(app)
    app.openapi = lambda: description  # type: ignore[method-assign]
    return app


def _add_embedding_routes(app: FastAPI, service: Service) -> None:
    async def answer(
        request: Request, kind: type[Asked], inputs: Inputs[Asked], write: Write[Asked]
    ) -> Response:
        service.queue.check_room()  # refuse early, before the body is read
        body = await read_body(request, service.limits.body)
        async with _watching(request) as gone:
            written = await service.answer(kind, body, gone, inputs, write)
        return Response(written, media_type="application/json")

    @app.post("/v1/embeddings", response_model=EmbeddingsAnswer, **_takes(EmbeddingsBody))
    async def embeddings(request: Request) -> Response:
        """Vectors of texts, in OpenAI's format."""
        return await answer(request, EmbeddingsBody, lambda body: body.input, _embeddings)

    @app.post("/embed", response_model=list[list[float]], **_takes(EmbedBody))
    async def embed(request: Request) -> Response:
        """Vectors of texts, in the format of text-embeddings-inference."""
        return await answer(request, EmbedBody, lambda body: body.inputs, _embed)

    @app.post("/similarity", response_model=list[float], **_takes(SimilarityBody))
    async def similarity(request: Request) -> Response:
        """Similarity of a source sentence to others, in text-embeddings-inference's format."""
        return await answer(request, SimilarityBody, _all_sentences, _similarity)

    @app.get("/v1/models", responses={401: REFUSALS[401]})
    async def models() -> ModelsAnswer:
        """The models that are served."""
        served = service.models.values()
        return ModelsAnswer(data=[model.described(service.created) for model in served])

    # A name may have a slash, as those of the hub have.
    @app.get("/v1/models/{name:path}", responses={n: REFUSALS[n] for n in (401, 404)})
    async def model(name: str) -> ModelAnswer:
        """One model that is served."""
        return service.find(name).described(service.created)


def _add_state_routes(app: FastAPI, service: Service) -> None:
    def state() -> Response:
        fine = service.forwards.healthy
        return JSONResponse({"status": "ok" if fine else "failing"}, 200 if fine else 503)

    failing: dict[int | str, dict[str, Any]] = {503: {"description": "Forwards fail."}}

    @app.get("/health", responses=failing)
    async def health() -> Response:
        """Whether the process works; if not, restart it."""
        return state()

    @app.get("/ready", responses=failing)
    async def ready() -> Response:
        """Whether requests can be answered. The server listens only after its models are loaded."""
        return state()

    for path, asked in (("/health", health), ("/ready", ready)):  # some probes ask without a body
        app.add_api_route(path, asked, methods=["HEAD"], include_in_schema=False)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, 401: REFUSALS[401]})
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.measures.text(), media_type=CONTENT_TYPE_LATEST)


@asynccontextmanager
async def _watching(request: Request) -> AsyncIterator[asyncio.Future[Any]]:
    """A future that is done when the client closes the connection; the body must have been read."""
    gone = asyncio.ensure_future(request.receive())  # the only message that can still come
    try:
        yield gone
    finally:
        gone.cancel()


def _takes(body: type) -> dict[str, Any]:
    """Keyword arguments of a route: the OpenAPI description of its body and errors."""
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    content = {"application/json": {"schema": schema}}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": REFUSALS,
    }


def _description(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, with the schemas of the bodies, which FastAPI does not know."""
    description = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, bodies = models_json_schema(
        [(body, "validation") for body in BODIES], ref_template="#/components/schemas/{model}"
    )
    description["components"]["schemas"] |= bodies["$defs"]
    return description


# --- answers ------------------------------------------------------------------------------------


def _embeddings(ready: Prepared[EmbeddingsBody], vectors: np.ndarray) -> bytes:
    asked = ready.asked
    finished = ready.model.finish(vectors, asked.dimensions, asked.normalize)
    as_base64 = asked.encoding_format == "base64"
    data = ", ".join(
        f'{{"object": "embedding", "index": {index}, "embedding": {_vector_json(row, as_base64)}}}'
        for index, row in enumerate(finished)
    )
    name, tokens = json.dumps(ready.model.name), ready.tokens
    usage = f'{{"prompt_tokens": {tokens}, "total_tokens": {tokens}}}'
    return f'{{"object": "list", "data": [{data}], "model": {name}, "usage": {usage}}}'.encode()


def _vector_json(vector: np.ndarray, as_base64: bool) -> str:
    """One vector as JSON. A whole answer in one call would keep the GIL from the event loop."""
    if as_base64:
        return json.dumps(base64.b64encode(vector.astype("<f4").tobytes()).decode())
    return json.dumps(vector.tolist())


def _embed(ready: Prepared[EmbedBody], vectors: np.ndarray) -> bytes:
    finished = ready.model.finish(vectors, ready.asked.dimensions, ready.asked.normalize)
    return f"[{', '.join(_vector_json(row, False) for row in finished)}]".encode()


def _all_sentences(body: SimilarityBody) -> list[str]:
    if not body.inputs.sentences:
        said = "no sentence to compare. Fix: give at least one."
        raise Refusal(400, said, "empty_input", "inputs.sentences")
    return [body.inputs.source_sentence, *body.inputs.sentences]


def _similarity(ready: Prepared[SimilarityBody], vectors: np.ndarray) -> bytes:
    # As `encode` returns them: with the encoder's own number of dimensions.
    found = torch.from_numpy(ready.model.finish(vectors, None, normalize=False))
    (scores,) = ready.model.encoder.similarity(found[:1], found[1:])  # (1, N - 1)
    return json.dumps(scores.tolist()).encode()
