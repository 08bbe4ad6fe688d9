"""The inner loop of `encode`: it runs prepared batches and puts vectors back in input order.

The loop does not wait for the device: everything that a forward needs to know about a batch is on
the host, inputs are copied from pinned memory, and a vector is read only `BEHIND` batches after the
batch that it comes from. `DeviceTime` measures how long the device is idle.

Shapes: N inputs, B rows of a batch, T tokens of a row, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, TypeVar

import numpy as np
import torch
from sentence_transformers.util import truncate_embeddings
from torch import Tensor, nn
from tqdm.auto import tqdm

from unmasked.forward.backbone import Backbone
from unmasked.forward.batches import distinct
from unmasked.forward.loop.preparing import (
    SENTENCE,
    TOKENS,
    PreparedBatch,
    Request,
    TextWindow,
    TokenisedRows,
    prepare_batches,
    prepared_ahead,
)
from unmasked.text.tokens import TokenRow

T = TypeVar("T")

BEHIND = {"cuda": 8}
"""Largest number of batches in the queue of a device; on a CPU there is no queue."""


def run(model: nn.Module, backbone: Backbone, inputs: list[Any], request: Request) -> Any:
    """Vectors (N, D) of N inputs, or the other requested outputs, in input order.

    Args:
        model: adds outputs to the features of a batch; it is put into evaluation mode meanwhile.
        backbone: its first module, for the preprocessing.
        inputs: texts or pairs.
        request: the options of this call.
    """
    if request.output_value != SENTENCE:
        return row_outputs(model, backbone, inputs, request)
    with _bar(len(inputs), request.show_progress_bar) as bar:
        (vectors,) = sentence_vectors(model, backbone, [inputs], request, bar.update)
    return vectors


def sentence_vectors(
    model: nn.Module,
    backbone: Backbone,
    wanted: Iterable[list[Any]],
    request: Request,
    landed: Callable[[int], object] = lambda count: None,
) -> Iterator[Tensor]:
    """(N, D) float32 vectors of each list of N inputs; equal inputs of a list are computed once.

    Args:
        model, backbone, request: as in `run`.
        wanted: lists of inputs; read in a thread, a few lists ahead of the vectors.
        landed: called with the number of inputs whose vectors have just arrived.
    """
    in_flight: deque[tuple[PreparedBatch, Tensor, Callable[[], None]]] = deque()
    waiting: deque[TextWindow] = deque()
    behind, cut = BEHIND.get(request.device.type, 0), 0

    def result(batch: PreparedBatch, outputs: dict[str, Any]) -> Tensor:
        vectors = outputs[SENTENCE][: len(batch.places)].float()  # without those of dummy rows
        vectors = finish(vectors, request.truncate_dim, request.normalize_embeddings)
        return _to_host(vectors) if request.save_to_cpu else vectors

    def land() -> None:
        batch, vectors, done = in_flight.popleft()
        done()
        batch.window.take(batch.places, vectors)
        landed(int(batch.window.copies[batch.places].sum()))

    distinct_inputs = (TextWindow(*distinct(inputs)) for inputs in wanted)
    with closing(_forwards(model, backbone, distinct_inputs, request, result)) as batches:
        for batch, vectors, done in batches:
            if not waiting or waiting[-1] is not batch.window:
                waiting.append(batch.window)
            if vectors is not None:
                in_flight.append((batch, vectors, done))
                cut += int(batch.window.copies[list(batch.cut)].sum()) if batch.cut else 0
            while len(in_flight) > behind:
                land()
            while waiting and not waiting[0].left:
                yield waiting.popleft().finished(request)
        while in_flight:
            land()
    backbone.count_cut(cut, backbone.limit(request.processing_kwargs, task=request.task))
    while waiting:
        yield waiting.popleft().finished(request)


@torch.inference_mode()
def encode_windows(
    model: nn.Module, backbone: Backbone, wanted: Iterable[list[Any]], **options: Any
) -> Generator[np.ndarray, None, None]:
    """(N, D) float32 vectors of one list of N texts after another, as `encode` returns for each.

    A list is tokenised while earlier ones run, so the device need not wait between two lists.

    Args:
        model, backbone: as in `run`; the model must be on the device where it is to run.
        wanted: the lists; read in a thread.
        options: ``prompt``, ``batch_size`` (None limits forwards by tokens),
            ``normalize_embeddings`` and ``truncate_dim``, as in `encode`.
    """
    rows = options.pop("batch_size", None)
    request = Request.of(
        next(model.parameters()).device,
        {"batch_size": rows or 1, "by_tokens": rows is None, **options},
    )
    width = width_of(model, request.truncate_dim)
    for vectors in sentence_vectors(model, backbone, wanted, request):
        yield vectors.numpy() if len(vectors) else np.empty((0, width), np.float32)


@torch.inference_mode()
def encode_rows(
    model: nn.Module, backbone: Backbone, rows: Sequence[TokenRow], device: torch.device
) -> Tensor:
    """(N, D) float32 vectors, on the host, of N rows of ids, in order; the same as from `encode`.

    For a caller that tokenises elsewhere and limits the tokens of a call: no thread is started, and
    all rows share a forward unless batches are padded. The vectors are neither truncated nor
    normalised; `finish` does that. The model must be in evaluation mode.
    """
    padded = backbone.unpackable is not None
    request = Request(device, batch_size=len(rows), by_tokens=padded)
    vectors = torch.empty(len(rows), width_of(model))
    whole = TokenisedRows(TextWindow([]), 0, list(rows))  # the window itself is not used here
    for batch in prepare_batches(backbone, [whole], request):
        outputs = model(_on_device(batch.features, device))
        backbone.tokens_encoded += sum(batch.lengths)
        found = outputs[SENTENCE][: len(batch.places)].float().cpu()
        vectors[torch.from_numpy(batch.places)] = found
    return vectors


def row_outputs(
    model: nn.Module, backbone: Backbone, inputs: list[Any], request: Request
) -> list[Any]:
    """Token states (T, D) of each input without padding, or every output of each input."""
    results: list[Any] = [None] * len(inputs)
    cut = 0

    def result(batch: PreparedBatch, outputs: dict[str, Any]) -> list[Any]:
        if request.output_value == TOKENS:
            states = zip(outputs[TOKENS], batch.lengths, strict=True)
            return [row[:length].float() for row, length in states]
        if request.truncate_dim is not None:
            short = truncate_embeddings(outputs[SENTENCE], request.truncate_dim)
            outputs = {**outputs, SENTENCE: short}
        own = {k: v for k, v in outputs.items() if not k.startswith(("packed", "repad"))}
        rows = len(batch.lengths)
        by_row = {k for k, v in own.items() if isinstance(v, Tensor) and v.ndim and len(v) == rows}
        return [{k: v[i] if k in by_row else v for k, v in own.items()} for i in range(rows)]

    with _bar(len(inputs), request.show_progress_bar) as bar:
        for batch, rows, done in _forwards(model, backbone, [TextWindow(inputs)], request, result):
            done()
            for place, row in zip(batch.places, rows or (), strict=True):
                results[place] = row
            cut += len(batch.cut)
            bar.update(len(batch.places))
    backbone.count_cut(cut, backbone.limit(request.processing_kwargs, task=request.task))
    return results


def width_of(model: nn.Module, truncate_dim: int | None = None) -> int:
    """D, the numbers of a vector behind the last module that changes it, truncated if requested."""
    modules: list[Any] = [m for m in model.children() if hasattr(m, "get_embedding_dimension")]
    width = int(modules[-1].get_embedding_dimension())
    return min(truncate_dim or width, width)


def no_vectors(like: Any, model: Any, options: Mapping[str, Any]) -> Any:
    """(0, D) vectors, the result for an empty list: a tensor if `like` is one, else an array.

    Args:
        like: what the stock `encode` returned.
        model: its modules, ``truncate_dim`` and ``precision`` say how wide a vector is.
        options: the options of the call of `encode`.
    """
    kinds = {"int8": np.int8, "uint8": np.uint8, "binary": np.int8, "ubinary": np.uint8}
    width = width_of(model, options.get("truncate_dim") or model.truncate_dim)
    precision = options.get("precision") or ""
    packed = precision in ("binary", "ubinary")  # one bit per number
    shape = (0, -(-width // 8) if packed else width)
    empty = np.empty(shape, kinds.get(precision, np.float32))
    return torch.from_numpy(empty).to(like.device) if isinstance(like, Tensor) else empty


def _bar(texts: int, shown: bool) -> Any:
    """A progress bar; the environment variable TQDM_DISABLE switches it off even if it is shown."""
    return tqdm(total=texts, unit="text", **({} if shown else {"disable": True}))


def _forwards(
    model: nn.Module,
    backbone: Backbone,
    wanted: Iterable[TextWindow],
    request: Request,
    result: Callable[[PreparedBatch, dict[str, Any]], T],
) -> Generator[tuple[PreparedBatch, T | None, Callable[[], None]], None, None]:
    """Each batch, the result of its outputs, and a function that waits until the result is ready.

    The model is in evaluation mode until the generator ends. An empty batch has no result.
    """
    was_training, clock = model.training, backbone.device_time
    model.eval()
    try:
        with clock.passing(), closing(prepared_ahead(backbone, wanted, request)) as batches:
            for batch in batches:
                if not batch.places.size:
                    yield batch, None, lambda: None
                    continue
                with clock.working(request.device) as done:
                    found = result(batch, model(_on_device(batch.features, request.device)))
                backbone.tokens_encoded += sum(batch.lengths)
                yield batch, found, done
    finally:
        model.train(was_training)


def _on_device(features: dict[str, Any], device: torch.device) -> dict[str, Any]:
    moved = {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in features.items()
    }
    return moved | ({"packed": moved["packed"].to(device)} if "packed" in moved else {})


def _to_host(vectors: Tensor) -> Tensor:
    """A copy on the host; from a GPU it is asynchronous and complete when the forward is done."""
    if vectors.device.type != "cuda":
        return vectors.cpu()
    host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
    return host.copy_(vectors, non_blocking=True)


def finish(vectors: Tensor, truncate_dim: int | None, normalize: bool) -> Tensor:
    """(N, D) vectors, truncated to their first dimensions, then normalised, each if requested."""
    if truncate_dim is not None:
        vectors = truncate_embeddings(vectors, truncate_dim)
    return nn.functional.normalize(vectors, dim=1) if normalize else vectors
