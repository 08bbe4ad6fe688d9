"""The inner loop of `encode`: prepared batches are run, and vectors put back in input order.

Nothing in the loop waits for the device: what a forward needs to know of a batch is known on the
host, inputs are copied from pinned memory, and a vector is looked at `BEHIND` batches after the one
it comes from. `DeviceTime` counts what the device had to wait for.

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
"""Batches that a device may have to do, while the host prepares others; none on a CPU."""


def run(model: nn.Module, backbone: Backbone, inputs: list[Any], request: Request) -> Any:
    """Vectors (N, D) of N inputs, or what else is requested, in input order.

    Args:
        model: features of a batch to features with its outputs; put into evaluation mode meanwhile.
        backbone: its first module, for the preprocessing.
        inputs: texts or pairs.
        request: what is asked for.
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
        wanted: lists of inputs; read in a thread, a few of them ahead of the vectors.
        landed: is told how many more inputs have their vectors.
    """
    flying: deque[tuple[PreparedBatch, Tensor, Callable[[], None]]] = deque()
    waiting: deque[TextWindow] = deque()
    behind, cut = BEHIND.get(request.device.type, 0), 0

    def result(batch: PreparedBatch, outputs: dict[str, Any]) -> Tensor:
        vectors = outputs[SENTENCE][: len(batch.places)].float()
        vectors = finish(vectors, request.truncate_dim, request.normalize_embeddings)
        return _to_host(vectors) if request.save_to_cpu else vectors

    def land() -> None:
        batch, vectors, done = flying.popleft()
        done()
        batch.window.take(batch.places, vectors)
        landed(int(batch.window.copies[batch.places].sum()))

    distinct_inputs = (TextWindow(*distinct(inputs)) for inputs in wanted)
    with closing(_forwards(model, backbone, distinct_inputs, request, result)) as batches:
        for batch, vectors, done in batches:
            if not waiting or waiting[-1] is not batch.window:
                waiting.append(batch.window)
            if vectors is not None:
                flying.append((batch, vectors, done))
                cut += int(batch.window.copies[list(batch.cut)].sum()) if batch.cut else 0
            while len(flying) > behind:
                land()
            while waiting and not waiting[0].left:
                yield waiting.popleft().finished(request)
        while flying:
            land()
    backbone.count_cut(cut)
    while waiting:
        yield waiting.popleft().finished(request)


@torch.inference_mode()
def encode_windows(
    model: nn.Module, backbone: Backbone, wanted: Iterable[list[Any]], **options: Any
) -> Generator[np.ndarray, None, None]:
    """(N, D) float32 vectors of one list of N texts after another, as `encode` gives for each.

    Lists are tokenised while those before them are run, so the device need not wait between two.

    Args:
        model, backbone: as in `run`; the model is where it runs.
        wanted: the lists; read in a thread.
        options: ``prompt``, ``batch_size`` (None fills forwards with tokens),
            ``normalize_embeddings`` and ``truncate_dim``, as in `encode`.
    """
    rows = options.pop("batch_size", None)
    request = Request.of(
        next(model.parameters()).device,
        {"batch_size": rows or 1, "by_tokens": rows is None, **options},
    )
    full = backbone.get_embedding_dimension()
    width = min(request.truncate_dim or full, full)
    for vectors in sentence_vectors(model, backbone, wanted, request):
        yield vectors.numpy() if len(vectors) else np.empty((0, width), np.float32)


@torch.inference_mode()
def encode_rows(
    model: nn.Module, backbone: Backbone, rows: Sequence[TokenRow], device: torch.device
) -> Tensor:
    """(N, D) float32 vectors on the host of N rows of ids, in order, as `encode` has them.

    For a caller that tokenises elsewhere and bounds the tokens of a call: no thread is started, all
    rows share a forward unless it has to be padded, and `finish` shortens and scales what comes.
    The model has to be in evaluation mode.
    """
    padded = backbone.unpackable is not None
    request = Request(device, batch_size=len(rows), by_tokens=padded)
    vectors = torch.empty(len(rows), backbone.get_embedding_dimension())
    whole = TokenisedRows(TextWindow([]), 0, list(rows))
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
            cut = truncate_embeddings(outputs[SENTENCE], request.truncate_dim)
            outputs = {**outputs, SENTENCE: cut}
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
    backbone.count_cut(cut)
    return results


def no_vectors(like: Any, width: int, options: Mapping[str, Any]) -> Any:
    """(0, D) vectors, the answer to an empty list: a tensor if `like` is one, else an array.

    Args:
        like: what the stock loop returned.
        width: of the model; ``truncate_dim`` and ``precision`` of the `options` make it smaller.
    """
    kinds = {"int8": np.int8, "uint8": np.uint8, "binary": np.int8, "ubinary": np.uint8}
    width = min(options.get("truncate_dim") or width, width)
    precision = options.get("precision") or ""
    packed = precision in ("binary", "ubinary")  # one bit per number
    shape = (0, -(-width // 8) if packed else width)
    empty = np.empty(shape, kinds.get(precision, np.float32))
    return torch.from_numpy(empty).to(like.device) if isinstance(like, Tensor) else empty


def _bar(texts: int, shown: bool) -> Any:
    """A progress bar; where it is wanted, the variable TQDM_DISABLE still switches it off."""
    return tqdm(total=texts, unit="text", **({} if shown else {"disable": True}))


def _forwards(
    model: nn.Module,
    backbone: Backbone,
    wanted: Iterable[TextWindow],
    request: Request,
    result: Callable[[PreparedBatch, dict[str, Any]], T],
) -> Generator[tuple[PreparedBatch, T | None, Callable[[], None]], None, None]:
    """Each batch, the result of its outputs, and a function that waits until that is there.

    The model is in evaluation mode until the last one is taken. An empty batch has no result.
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
    """A copy on the host; from a GPU it is under way, and there when the forward is done."""
    if vectors.device.type != "cuda":
        return vectors.cpu()
    host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
    return host.copy_(vectors, non_blocking=True)


def finish(vectors: Tensor, truncate_dim: int | None, normalize: bool) -> Tensor:
    """(N, D) vectors cut to the first numbers of each, then scaled to length 1, as asked."""
    if truncate_dim is not None:
        vectors = truncate_embeddings(vectors, truncate_dim)
    return nn.functional.normalize(vectors, dim=1) if normalize else vectors
