"""How texts become the numbers that are stored.

Vectors are cut first and made of length 1 afterwards (Matryoshka, arXiv 2205.13147), then stored as
float32, float16, int8 or single bits. int8 needs the smallest and largest value of each dimension;
they are measured once, on the first texts, saved, and shared by every shard and machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from unmasked.errors import DataError, unknown

if TYPE_CHECKING:
    from unmasked.compat.llm2vec import LLM2Vec

PRECISIONS = ("float32", "float16", "int8", "binary")
CALIBRATION = 4096
"""Rows that the ranges of int8 are measured on."""


@dataclass(frozen=True)
class Encoding:
    """How texts become vectors: options of `LLM2Vec.encode`; None is the model's own way.

    Attributes:
        prompt: put before every text.
        prompt_name: the same, by its name in the model.
        batch_size: most texts of a forward.
        normalize: vectors of length 1.
        truncate_dim: keep the first numbers of each vector.
        precision: ``float32``; ``float16``; ``int8``, (v - low) / (high - low) * 255 - 128 by the
            ranges of each dimension, as sentence-transformers does; ``binary``, a bit for v > 0,
            eight to a byte, the first in the highest place (`numpy.unpackbits` undoes it).
    """

    prompt: str | None = None
    prompt_name: str | None = None
    batch_size: int | None = None
    normalize: bool = False
    truncate_dim: int | None = None
    precision: str = "float32"

    def check(self, model: LLM2Vec) -> None:
        """Refuse what the model cannot do; `DataError` names what it can."""
        if self.prompt is not None and self.prompt_name is not None:
            raise DataError("a prompt and the name of one were given. Fix: give one of them.")
        if self.prompt_name is not None and self.prompt_name not in model.prompts:
            raise DataError(unknown("prompt name", self.prompt_name, model.prompts))
        width = model.get_embedding_dimension() or 0
        if self.truncate_dim is not None and not 1 <= self.truncate_dim <= width:
            raise DataError(f"truncate_dim {self.truncate_dim} should be from 1 to {width}.")
        if self.precision not in PRECISIONS:
            raise DataError(unknown("precision", self.precision, PRECISIONS))

    def width(self, model: LLM2Vec) -> int:
        """D, before it is packed."""
        return self.truncate_dim or model.get_embedding_dimension() or 0

    def stored_type(self, width: int) -> tuple[np.dtype[Any], int]:
        """What a stored vector is made of, and how many of them."""
        if self.precision == "binary":
            return np.dtype("u1"), -(-width // 8)
        return np.dtype({"float32": "<f4", "float16": "<f2", "int8": "i1"}[self.precision]), width

    def __call__(self, model: LLM2Vec, texts: list[str]) -> np.ndarray:
        """(N, D) float32 vectors of N texts."""
        if not texts:
            return np.empty((0, self.width(model)), dtype="<f4")
        vectors = model.encode(
            texts,
            prompt=self.prompt,
            prompt_name=self.prompt_name,
            batch_size=self.batch_size,
            normalize_embeddings=self.normalize,
            truncate_dim=self.truncate_dim,
            show_progress_bar=False,
        )
        return np.ascontiguousarray(vectors, dtype="<f4")

    def store(self, vectors: np.ndarray, ranges: np.ndarray | None) -> np.ndarray:
        """(N, D) float32 as they are stored; see `stored_type`."""
        if self.precision == "float16":
            with np.errstate(over="ignore"):  # the caller looks for infinities
                return vectors.astype("<f2")
        if self.precision in ("int8", "binary"):
            from sentence_transformers.util import quantize_embeddings

            kind: Any = "ubinary" if self.precision == "binary" else "int8"
            return np.ascontiguousarray(quantize_embeddings(vectors, kind, ranges=ranges))
        return vectors

    def calibrate(self, model: LLM2Vec, texts: list[str], window: int) -> np.ndarray:
        """(2, D) float32: the smallest and the largest value of each dimension on some texts.

        Raises:
            DataError: no text has a vector.
        """
        lows, highs = [], []
        for start in range(0, len(texts), window):
            vectors = self(model, texts[start : start + window])
            vectors = vectors[np.isfinite(vectors).all(axis=1)]
            if len(vectors):
                lows.append(vectors.min(axis=0))
                highs.append(vectors.max(axis=0))
        if not lows:
            raise DataError(
                f"none of the first {CALIBRATION} rows has a vector to measure the ranges of int8 "
                "on. Fix: --ranges FILE of another run, or put good rows first."
            )
        return np.stack([np.min(lows, axis=0), np.max(highs, axis=0)]).astype("<f4")

    def resolved_prompt(self, model: LLM2Vec) -> str | None:
        """The text that stands before every input."""
        if self.prompt is not None:
            return self.prompt
        name = self.prompt_name or model.default_prompt_name
        return None if name is None else model.prompts[name]
