"""How much quality does a smaller encoder lose, with fewer layers, shorter vectors, or both?

An encoder that was trained by Matryoshka over layers or dimensions contains smaller encoders. Each
requested size is scored as it would be served: with the first layers alone and truncated vectors.

Cost: for every number of layers the model is loaded, and every text encoded, once. Shorter vectors
are cut from whole ones, which are in a temporary file meanwhile: 4 bytes for each of their numbers.

Shapes: D width, W words.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from unmasked.compat.llm2vec import LLM2Vec
from unmasked.errors import DataError
from unmasked.forward.loop.preparing import SENTENCE
from unmasked.forward.loop.running import finish
from unmasked.mask.opening import decoder_of, layers_of


@dataclass(frozen=True)
class Cut:
    """A smaller encoder within an encoder, and its cost."""

    layers: int  # number of first layers
    dimensions: int  # number of leading numbers of a vector
    compute: float  # share of the whole encoder's multiplications in its layers
    bytes: int  # size of a vector in float32

    @property
    def name(self) -> str:
        """Its name in a comparison of encoders."""
        return f"{self.layers} layers, {self.dimensions} numbers"


class KeptVectors:
    """Arrays of float32 vectors in a temporary file, each stored under the input it belongs to."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as this)
        self._places: dict[bytes, tuple[int, tuple[int, ...]]] = {}  # first number, and shape
        self._count = 0

    def __contains__(self, asked: object) -> bool:
        return _key(asked) in self._places

    def keep(self, asked: object, vectors: np.ndarray) -> None:
        """Store an array under an input, which is anything that can be written as JSON."""
        self._file.write(np.ascontiguousarray(vectors, np.float32).data)
        self._places[_key(asked)] = self._count, vectors.shape
        self._count += vectors.size

    def read(self, asked: Sequence[object]) -> list[np.ndarray]:
        """The array of each input, memory-mapped."""
        self._file.flush()
        kept, found = np.memmap(self._file, np.float32, "r"), []
        for first, shape in (self._places[_key(one)] for one in asked):
            found.append(kept[first : first + math.prod(shape)].reshape(shape))
        return found


def _key(asked: object) -> bytes:
    return blake2b(json.dumps(asked, default=str).encode(), digest_size=16).digest()


class EncodesOnce(LLM2Vec):
    """An encoder that never encodes an input twice, also if `truncate_dim` changes between calls.

    Whole vectors are stored. They are first truncated and then normalized, as in stock
    sentence-transformers.
    """

    kept: KeptVectors | None = None

    def _inference(self, inputs: list[Any], **options: Any) -> Any:
        if options.get("output_value", SENTENCE) != SENTENCE or not inputs:
            return super()._inference(inputs, **options)
        kept = self.kept = self.kept or KeptVectors()
        about = [options.get(name) for name in ("prompt", "task", "processing_kwargs")]
        asked = [[*about, given] for given in inputs]
        if new := [place for place, one in enumerate(asked) if one not in kept]:
            whole = {**options, "truncate_dim": None, "normalize_embeddings": False}
            vectors = super()._inference([inputs[place] for place in new], **whole)
            for place, vector in zip(new, vectors.cpu().numpy(), strict=True):
                kept.keep(asked[place], vector)
        vectors = torch.from_numpy(np.stack(kept.read(asked)))
        vectors = finish(vectors, options.get("truncate_dim"), options["normalize_embeddings"])
        return vectors if options["save_to_cpu"] else vectors.to(self.device)

    def encode_words(
        self, sentences: Sequence[Sequence[str]], previous: bool = False
    ) -> list[np.ndarray]:
        """Vectors (W, D) of the words of each sentence, truncated to `truncate_dim`."""
        kept = self.kept = self.kept or KeptVectors()
        asked = [[previous, list(words)] for words in sentences]
        new = [place for place, one in enumerate(asked) if one not in kept]
        found = super().encode_words([sentences[place] for place in new], previous)
        for place, vectors in zip(new, found, strict=True):
            kept.keep(asked[place], vectors)
        return [np.array(vectors[:, : self.truncate_dim]) for vectors in kept.read(asked)]


def cut_encoders(
    model: str, layers: Sequence[int] = (), dimensions: Sequence[int] = (), **options: Any
) -> Iterator[tuple[Cut, EncodesOnce]]:
    """The whole encoder, then every smaller one that was requested, each loaded when it is needed.

    Args:
        layers: numbers of first layers; the full depth is always included.
        dimensions: lengths of vectors; the full width is always included.
        options: further arguments of `LLM2Vec.from_pretrained`.

    Raises:
        DataError: a number is larger than the encoder has; raised before anything is yielded.
    """
    whole = EncodesOnce.from_pretrained(model, **options)
    trunk = decoder_of(whole.backbone.auto_model)
    depth = int(trunk.config.get_text_config().num_hidden_layers)
    width = int(whole.get_embedding_dimension())  # type: ignore[arg-type]
    _check("layers", layers, depth, model)
    _check("dimensions", dimensions, width, model)
    weights = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(trunk, depth)]
    del trunk
    own = whole.truncate_dim  # as the folder says; None for the whole width
    encoder: EncodesOnce | None = whole
    del whole  # so that no second model is in memory when the next one is loaded
    for count in dict.fromkeys((depth, *sorted(layers, reverse=True))):
        share = sum(weights[:count]) / max(1, sum(weights)) if weights else count / depth
        if encoder is None:
            encoder = EncodesOnce.from_pretrained(model, layers=count, **options)
        for size in dict.fromkeys((width, *sorted(dimensions, reverse=True))):
            encoder.truncate_dim = own if size == width else size
            yield Cut(count, size, share, 4 * size), encoder
        encoder = None


def _check(what: str, given: Sequence[int], most: int, model: str) -> None:
    for number in given:
        if not 1 <= number <= most:
            raise DataError(
                f"--{what} {number}: {model} has {most}. Fix: a number from 1 to {most}."
            )
