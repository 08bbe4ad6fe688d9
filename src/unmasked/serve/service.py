"""The models, their queue, and all steps from the bytes of a request to the bytes of its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from starlette.requests import ClientDisconnect

from unmasked.errors import unknown
from unmasked.forward.batches import token_budget
from unmasked.forward.compiling import is_compiled
from unmasked.forward.positions import follows_length
from unmasked.mask.opening import decoder_of
from unmasked.model import TextEncoder
from unmasked.serve.access import Limits
from unmasked.serve.forward_threads import MOST, ForwardThreads
from unmasked.serve.measures import Measures
from unmasked.serve.served_model import ServedModel
from unmasked.serve.text_queue import Job, TextQueue
from unmasked.serve.wire import Asked, Refusal, Texts, parse
from unmasked.text.tokens import TokenRow

T = TypeVar("T")

THREADS = 4  # threads that check bodies, tokenise and write answers

SMALL = 4096
"""An answer with at most this many numbers is written in the event loop, without a thread."""


def forwards_at_once(encoder: TextEncoder) -> int:
    """How many forward passes of an encoder may run at once.

    One, if a forward pass may keep something in the model (rotary frequencies, or the state of a
    recurrent layer, which cannot be packed), or if the layers are compiled for a number of threads.
    """
    backbone = encoder.backbone
    decoder = decoder_of(backbone.auto_model)
    one = is_compiled(decoder) or follows_length(decoder.config) or not backbone.packs_here()
    return 1 if one or encoder.device.type != "cpu" else min(MOST, torch.get_num_threads())


@dataclass(frozen=True)
class Prepared(Generic[Asked]):
    """A request that was read and checked: its body, its model, and the token rows of its texts."""

    asked: Asked
    model: ServedModel
    rows: list[TokenRow]

    @property
    def tokens(self) -> int:
        """The number of tokens of all its texts."""
        return sum(len(row.ids) for row in self.rows)


Inputs = Callable[[Asked], Texts]
Write = Callable[[Prepared[Asked], np.ndarray], bytes]


class Service:
    """Encoders, by name, that answer requests. Its threads run within its context."""

    def __init__(self, encoders: Mapping[str, TextEncoder], limits: Limits | None = None) -> None:
        self.limits = limits = limits or Limits()
        self.models = {
            name: ServedModel(name, encoder, limits.tokens, limits.truncate)
            for name, encoder in encoders.items()
        }
        self.queue = TextQueue(list(encoders), limits.queue, limits.wait)
        self.measures = Measures(lambda: (self.queue.texts, self.queue.tokens))
        budgets = [token_budget(e.device, e.backbone.dtype) for e in encoders.values()]
        self.forwards = ForwardThreads(
            self.queue,
            {name: model.vectors for name, model in self.models.items()},
            limits.batch_tokens or max(budgets),
            self.measures,
            min(forwards_at_once(encoder) for encoder in encoders.values()),
        )
        self.pool = ThreadPoolExecutor(THREADS, "unmasked-worker")
        self.created = int(time.time())

    def __enter__(self) -> Self:
        self.forwards.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.forwards.stop()
        self.pool.shutdown()

    def find(self, name: str | None) -> ServedModel:
        """The model with this name; without a name, the only model.

        Raises:
            Refusal: there is no such model, or no name although several models are served.
        """
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            said = f"several models are served. Fix: name one of {', '.join(self.models)}."
            raise Refusal(400, said, "missing", "model")
        if name not in self.models:
            said = unknown("model", name[:128], self.models)
            raise Refusal(404, said, "model_not_found", "model")
        return self.models[name]

    def prepare(self, kind: type[Asked], body: bytes, inputs: Inputs[Asked]) -> Prepared[Asked]:
        """Check a body and its limits, and tokenise its texts; runs in a worker thread."""
        asked = parse(kind, body)
        model, given = self.find(asked.model), inputs(asked)
        field = "input" if "input" in kind.model_fields else "inputs"
        if not given and not isinstance(given, str):
            raise Refusal(400, "the list is empty. Fix: give a text.", "empty_input", field)
        several = isinstance(given, list) and not isinstance(given[0], int)  # else one text's ids
        if several and len(given) > self.limits.inputs:
            said = (
                f"{len(given)} inputs; {self.limits.inputs} are allowed. Fix: send them in parts."
            )
            raise Refusal(400, said, "too_many_inputs", field)
        model.check_dimensions(getattr(asked, "dimensions", None))
        return Prepared(asked, model, model.rows(given, asked, model.prompt(asked)))

    async def answer(
        self,
        kind: type[Asked],
        body: bytes,
        gone: asyncio.Future[Any],
        inputs: Inputs[Asked],
        write: Write[Asked],
    ) -> bytes:
        """The bytes of the answer to a body.

        Args:
            kind, body: the type of the body, and its bytes.
            gone: is done when the client has closed the connection.
            inputs: returns the texts of a body.
            write: turns vectors into the answer; runs in a worker thread if these are many.

        Raises:
            Refusal: the request is refused.
            ClientDisconnect: the client has closed the connection; its remaining texts are dropped.
        """
        self.queue.check_room()
        with self.queue.arriving():
            ready = await self._in_thread(lambda: self.prepare(kind, body, inputs))
            if gone.done():
                raise ClientDisconnect
            job = Job(ready.rows)
            self.queue.put(ready.model.name, job)
        try:
            await asyncio.wait({job.done, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not job.done.done():
                raise ClientDisconnect
            vectors = job.done.result()
        finally:
            self.queue.drop(job)
        if vectors.size <= SMALL:
            return write(ready, vectors)
        return await self._in_thread(lambda: write(ready, vectors))

    def _in_thread(self, work: Callable[[], T]) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self.pool, work)
