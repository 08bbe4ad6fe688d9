"""The inner loop of `encode`: batches are prepared in a thread, run, and put back in input order.

Nothing in the loop waits for the device: what a forward needs to know of a batch is known on the
host, inputs are copied from pinned memory, and vectors come back a few thousand at a time. Cost
beside the forwards: one tokenisation per distinct text, and a sort per window of texts.

Shapes: N inputs, B rows of a batch, T tokens of a row, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from sentence_transformers.util import truncate_embeddings
from torch import Tensor, nn
from tqdm.auto import tqdm

from unmasked.forward.backbone import Backbone
from unmasked.forward.batches import WINDOW, ahead, distinct, plan_batches, token_budget
from unmasked.forward.packing import pack

SENTENCE = "sentence_embedding"
TOKENS = "token_embeddings"
OUTPUTS = (SENTENCE, TOKENS, None)
"""What `encode` can be asked for; None is every output of the model."""
ON_DEVICE = 4096
"""Vectors that may wait on the device before they are copied to the host."""


@dataclass(frozen=True)
class Request:
    """What `encode` asks of a pass over its inputs, by the names of `SentenceTransformer.encode`.

    Attributes:
        output_value: one of `OUTPUTS`.
        save_to_cpu: copy vectors to the host as they come.
        by_tokens: fill forwards up to a number of tokens; otherwise `batch_size` rows make one.
    """

    device: torch.device
    prompt: str | None
    batch_size: int
    show_progress_bar: bool
    output_value: str | None
    save_to_cpu: bool
    normalize_embeddings: bool
    truncate_dim: int | None
    by_tokens: bool = False

    @classmethod
    def of(cls, device: torch.device, options: Mapping[str, Any]) -> Request:
        """The request of a call of `encode`, which may have options for other modules as well."""
        names = {field.name for field in fields(cls)}
        return cls(device, **{name: value for name, value in options.items() if name in names})

    def plan(self, lengths: Sequence[int]) -> list[np.ndarray]:
        """Which of some rows, by their numbers of tokens, share a forward."""
        if self.by_tokens:
            return plan_batches(lengths, token_budget(self.device))
        return plan_batches(lengths, batch_size=self.batch_size)


@dataclass(frozen=True)
class PreparedBatch:
    """Inputs that share a forward.

    Attributes:
        places: their places among all.
        lengths: their token counts.
        cut: the places of those that are longer than an input.
        features: what the model gets.
    """

    places: np.ndarray
    lengths: list[int]
    cut: list[int]
    features: dict[str, Any]


def run(model: nn.Module, backbone: Backbone, inputs: list[Any], request: Request) -> Any:
    """Vectors (N, D) of N inputs, or what else is requested, in input order.

    Args:
        model: features of a batch to features with its outputs; put into evaluation mode meanwhile.
        backbone: its first module, for the preprocessing.
        inputs: texts or pairs.
        request: what is asked for.
    """
    was_training = model.training
    model.eval()
    try:
        if request.output_value == SENTENCE:
            return sentence_vectors(model, backbone, inputs, request)
        return row_outputs(model, backbone, inputs, request)
    finally:
        model.train(was_training)


def prepare_batches(
    backbone: Backbone, inputs: list[Any], request: Request
) -> Iterator[PreparedBatch]:
    """Tokenise, plan and collate a window of inputs at a time; meant to run in a thread."""
    pin = request.device.type == "cuda"
    for start in range(0, len(inputs), WINDOW):
        rows = backbone.tokenize_inputs(inputs[start : start + WINDOW], request.prompt)
        lengths = [len(row.ids) for row in rows]
        for chosen in request.plan(lengths):
            features: dict[str, Any] = backbone.collate([rows[i] for i in chosen])
            if backbone.unpackable is None:
                features["packed"] = pack(features["attention_mask"])
            if pin:
                features = {key: value.pin_memory() for key, value in features.items()}
            features["repad"] = request.output_value != SENTENCE
            cut = [start + int(i) for i in chosen if rows[i].cut]
            yield PreparedBatch(chosen + start, [lengths[i] for i in chosen], cut, features)


def sentence_vectors(
    model: nn.Module, backbone: Backbone, inputs: list[Any], request: Request
) -> Tensor:
    """(N, D) float32 vectors of N inputs; equal inputs are computed once."""
    unique, inverse = distinct(inputs)
    results: Tensor | None = None
    waiting: list[Tensor] = []
    places: list[np.ndarray] = []

    def deliver() -> None:
        nonlocal results
        vectors = torch.cat(waiting)
        vectors = vectors.cpu() if request.save_to_cpu else vectors
        if results is None:
            results = vectors.new_empty(len(unique), vectors.shape[1])
        at = torch.from_numpy(np.concatenate(places)).to(results.device)
        results[at] = vectors
        waiting.clear()
        places.clear()

    copies, cut = np.bincount(inverse, minlength=len(unique)), 0
    with _bar(len(inputs), request.show_progress_bar) as bar:
        for batch, outputs in _forwards(model, backbone, unique, request):
            vectors = outputs[SENTENCE].float()
            waiting.append(finished(vectors, request.truncate_dim, request.normalize_embeddings))
            places.append(batch.places)
            cut += int(copies[batch.cut].sum()) if batch.cut else 0
            if sum(map(len, places)) >= ON_DEVICE:
                deliver()
            bar.update(int(copies[batch.places].sum()))
        if waiting:
            deliver()
    backbone.count_cut(cut)
    if results is None:
        return torch.empty(0, device="cpu" if request.save_to_cpu else request.device)
    if len(unique) == len(inputs):
        return results
    return results[torch.from_numpy(inverse).to(results.device)]


def row_outputs(
    model: nn.Module, backbone: Backbone, inputs: list[Any], request: Request
) -> list[Any]:
    """Token states (T, D) of each input without padding, or every output of each input."""
    results: list[Any] = [None] * len(inputs)
    cut = 0
    with _bar(len(inputs), request.show_progress_bar) as bar:
        for batch, outputs in _forwards(model, backbone, inputs, request):
            rows: list[Any]
            if request.output_value == TOKENS:
                states = zip(outputs[TOKENS], batch.lengths, strict=True)
                rows = [row[:length].float() for row, length in states]
            else:
                own = {k: v for k, v in outputs.items() if not k.startswith("packed")}
                tensors = {k: v for k, v in own.items() if isinstance(v, Tensor)}
                rows = [{k: v[i] for k, v in tensors.items()} for i in range(len(batch.lengths))]
            for place, row in zip(batch.places, rows, strict=True):
                results[place] = row
            cut += len(batch.cut)
            bar.update(len(rows))
    backbone.count_cut(cut)
    return results


def no_vectors(like: Any, width: int, precision: str | None) -> Any:
    """(0, D) vectors, the answer to an empty list: a tensor if `like` is one, else an array."""
    kinds = {"int8": np.int8, "uint8": np.uint8, "binary": np.int8, "ubinary": np.uint8}
    packed = precision in ("binary", "ubinary")  # one bit per number
    shape = (0, -(-width // 8) if packed else width)
    empty = np.empty(shape, kinds.get(precision or "", np.float32))
    return torch.from_numpy(empty).to(like.device) if isinstance(like, Tensor) else empty


def _bar(texts: int, shown: bool) -> Any:
    """A progress bar; where it is wanted, the variable TQDM_DISABLE still switches it off."""
    return tqdm(total=texts, unit="text", **({} if shown else {"disable": True}))


def _forwards(
    model: nn.Module, backbone: Backbone, inputs: list[Any], request: Request
) -> Iterator[tuple[PreparedBatch, dict[str, Any]]]:
    for batch in ahead(prepare_batches(backbone, inputs, request)):
        features = {
            key: value.to(request.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.features.items()
        }
        if "packed" in features:
            features["packed"] = features["packed"].to(request.device)
        backbone.tokens_encoded += sum(batch.lengths)
        yield batch, model(features)


def finished(vectors: Tensor, truncate_dim: int | None, normalize: bool) -> Tensor:
    """(B, D) vectors cut to their first numbers, then scaled to length 1, as asked."""
    if truncate_dim is not None:
        vectors = truncate_embeddings(vectors, truncate_dim)
    return nn.functional.normalize(vectors, dim=1) if normalize else vectors
