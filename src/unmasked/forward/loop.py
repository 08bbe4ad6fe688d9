"""The inner loop of `encode`: batches made ready in a thread, forwards, vectors back in order.

Nothing in the loop waits for the device: what a forward needs to know of a batch is known on the
host, inputs go over from pinned memory, and vectors come back a few thousand at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.util import truncate_embeddings
from torch import Tensor, nn
from tqdm.auto import tqdm

from unmasked.forward.batches import WINDOW, ahead, distinct, plan_batches
from unmasked.forward.packing import pack

if TYPE_CHECKING:
    from unmasked.forward.backbone import Backbone
    from unmasked.model import LLM2Vec

SENTENCE = "sentence_embedding"
TOKENS = "token_embeddings"
OUTPUTS = (SENTENCE, TOKENS, None)
"""What `encode` can be asked for; None is everything."""
ON_DEVICE = 4096
"""Vectors that may wait on the device before they are copied to the host."""


@dataclass(frozen=True)
class Job:
    """What `encode` asks of a pass over inputs; see `SentenceTransformer.encode`.

    Attributes:
        budget: most tokens a forward; None if `batch_size` cuts.
        batch_size: most rows a forward; None if `budget` cuts.
        output: ``sentence_embedding``, ``token_embeddings`` or None for everything.
    """

    device: torch.device
    prompt: str | None
    budget: int | None
    batch_size: int | None
    output: str | None
    normalize: bool
    truncate_dim: int | None
    to_cpu: bool
    show_progress: bool


@dataclass(frozen=True)
class Batch:
    """Inputs that share a forward: their places, their token counts, and their features."""

    places: np.ndarray
    lengths: list[int]
    features: dict[str, Any]


def batches(backbone: Backbone, inputs: list[Any], job: Job) -> Iterator[Batch]:
    """Tokenise, plan and collate, a window of inputs at a time; runs in a thread."""
    pin = job.device.type == "cuda"
    for start in range(0, len(inputs), WINDOW):
        rows = backbone.tokenize_inputs(inputs[start : start + WINDOW], job.prompt)
        for chosen in plan_batches([len(row.ids) for row in rows], job.budget, job.batch_size):
            features: dict[str, Any] = backbone.collate([rows[i] for i in chosen])
            if backbone.unpackable is None:
                features["packed"] = pack(features["attention_mask"])
            if pin:
                features = {key: value.pin_memory() for key, value in features.items()}
            features["repad"] = job.output != SENTENCE
            yield Batch(chosen + start, [len(rows[i].ids) for i in chosen], features)


def sentence_vectors(model: LLM2Vec, inputs: list[Any], job: Job) -> Tensor:
    """(N, D) float32 vectors of N inputs; equal inputs are computed once."""
    unique, inverse = distinct(inputs)
    results: Tensor | None = None
    waiting: list[Tensor] = []
    places: list[np.ndarray] = []

    def deliver() -> None:
        nonlocal results
        vectors = torch.cat(waiting)
        vectors = vectors.cpu() if job.to_cpu else vectors
        if results is None:
            results = vectors.new_empty(len(unique), vectors.shape[1])
        at = torch.from_numpy(np.concatenate(places)).to(results.device)
        results[at] = vectors
        waiting.clear()
        places.clear()

    copies = np.bincount(inverse, minlength=len(unique))
    with _bar(len(inputs), job.show_progress) as bar:
        for batch, outputs in _forwards(model, unique, job):
            waiting.append(_finished(outputs[SENTENCE].float(), job))
            places.append(batch.places)
            if sum(map(len, places)) >= ON_DEVICE:
                deliver()
            bar.update(int(copies[batch.places].sum()))
        if waiting:
            deliver()
    if results is None:
        return torch.empty(0, device="cpu" if job.to_cpu else job.device)
    if len(unique) == len(inputs):
        return results
    return results[torch.from_numpy(inverse).to(results.device)]


def no_vectors(like: Any, width: int, precision: str | None) -> Any:
    """(0, D) vectors, as an empty list gives them: a tensor if `like` is one, else an array."""
    kinds = {"int8": np.int8, "uint8": np.uint8, "binary": np.int8, "ubinary": np.uint8}
    packed = precision in ("binary", "ubinary")  # a bit a number
    shape = (0, -(-width // 8) if packed else width)
    empty = np.empty(shape, kinds.get(precision or "", np.float32))
    return torch.from_numpy(empty).to(like.device) if isinstance(like, Tensor) else empty


def _bar(texts: int, shown: bool) -> Any:
    """A progress bar; where it is to be shown, the variable TQDM_DISABLE has the last word."""
    return tqdm(total=texts, unit="text", **({} if shown else {"disable": True}))


def row_outputs(model: LLM2Vec, inputs: list[Any], job: Job) -> list[Any]:
    """Token states (T, D) of each input without padding, or every output of each input."""
    results: list[Any] = [None] * len(inputs)
    with _bar(len(inputs), job.show_progress) as bar:
        for batch, outputs in _forwards(model, inputs, job):
            if job.output == TOKENS:
                states = outputs[job.output]
                rows: list[Any] = [
                    row[:n].float() for row, n in zip(states, batch.lengths, strict=True)
                ]
            else:
                own = {k: v for k, v in outputs.items() if not k.startswith("packed")}
                shown = {k: v for k, v in own.items() if isinstance(v, Tensor)}  # of each row
                rows = [{k: v[i] for k, v in shown.items()} for i in range(len(batch.lengths))]
            for place, row in zip(batch.places, rows, strict=True):
                results[place] = row
            bar.update(len(rows))
    return results


def _forwards(
    model: LLM2Vec, inputs: list[Any], job: Job
) -> Iterator[tuple[Batch, dict[str, Any]]]:
    for batch in ahead(batches(model.backbone, inputs, job)):
        features = {
            key: value.to(job.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.features.items()
        }
        if "packed" in features:
            features["packed"] = features["packed"].to(job.device)
        model.tokens_encoded += sum(batch.lengths)
        yield batch, model(features)


def _finished(vectors: Tensor, job: Job) -> Tensor:
    if job.truncate_dim is not None:
        vectors = truncate_embeddings(vectors, job.truncate_dim)
    return nn.functional.normalize(vectors, dim=1) if job.normalize else vectors
