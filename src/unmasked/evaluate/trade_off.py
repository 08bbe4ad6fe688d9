"""What does a smaller encoder cost in quality: fewer layers, shorter vectors, or both?

An encoder that was trained by Matryoshka over layers or dimensions is many in one. Each of them
that is asked for is scored as it would be served: with its first layers alone, its vectors cut.

Cost: the model is read once for every number of layers, and every text is encoded once for each
(layers, dimensions).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from unmasked.compat.llm2vec import LLM2Vec
from unmasked.errors import DataError
from unmasked.mask.opening import decoder_of, layers_of


@dataclass(frozen=True)
class Cut:
    """A part of an encoder, and what it costs.

    Attributes:
        layers, dimensions: how many of each, the first ones.
        compute: share of the multiplications in the layers, of those of the whole.
        bytes: of a vector in float32.
    """

    layers: int
    dimensions: int
    compute: float
    bytes: int

    @property
    def name(self) -> str:
        """What it is called among encoders that are compared."""
        return f"{self.layers} layers, {self.dimensions} numbers"


def cut_encoders(
    model: str, layers: Sequence[int] = (), dimensions: Sequence[int] = (), **options: Any
) -> Iterator[tuple[Cut, LLM2Vec]]:
    """The whole encoder, then every part that is asked for, each loaded as it is needed.

    Args:
        model: hub name or folder.
        layers: numbers of first layers; all are always among them.
        dimensions: numbers of leading numbers of a vector; all are always among them.
        options: of `LLM2Vec.from_pretrained`.

    Raises:
        DataError: a number that the encoder does not have; before anything is yielded.
    """
    whole = LLM2Vec.from_pretrained(model, **options)
    trunk = decoder_of(whole.backbone.auto_model)
    depth = int(trunk.config.get_text_config().num_hidden_layers)
    width = int(whole.get_embedding_dimension())  # type: ignore[arg-type]
    _check("layers", layers, depth, model)
    _check("dimensions", dimensions, width, model)
    weights = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(trunk, depth)]
    del trunk
    encoder: LLM2Vec | None = whole
    del whole
    for count in dict.fromkeys((depth, *sorted(layers, reverse=True))):
        share = sum(weights[:count]) / max(1, sum(weights)) if weights else count / depth
        if encoder is None:
            encoder = LLM2Vec.from_pretrained(model, layers=count, **options)
        for size in dict.fromkeys((width, *sorted(dimensions, reverse=True))):
            encoder.truncate_dim = None if size == width else size
            yield Cut(count, size, share, 4 * size), encoder
        encoder = None


def _check(what: str, given: Sequence[int], most: int, model: str) -> None:
    for number in given:
        if not 1 <= number <= most:
            raise DataError(
                f"--{what} {number}: {model} has {most}. Fix: a number from 1 to {most}."
            )
