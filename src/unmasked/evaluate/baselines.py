"""The causal decoder behind an encoder, which is what the encoder has to beat.

Cost: one load of the decoder for each pooling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from unmasked.checkpoint.location import Location
from unmasked.compat.llm2vec import LLM2Vec
from unmasked.errors import ModelError
from unmasked.forward.pooling import CAUSAL_BASELINES
from unmasked.recipe.schema import CAUSAL


def causal_baselines(base: Location) -> Iterator[tuple[str, Callable[[], LLM2Vec]]]:
    """Name and maker of a causal encoder for each of `CAUSAL_BASELINES`.

    Args:
        base: the decoder, such as `compat.origin.find_base` finds it.

    Raises:
        ModelError: (by a maker) the decoder has no causal mask any more.
    """
    for pooling in CAUSAL_BASELINES:
        yield f"{CAUSAL}{pooling}", partial(causal_encoder, base, pooling)


def causal_encoder(base: Location, pooling: str, max_length: int | None = None) -> LLM2Vec:
    """The decoder as it is, with a pooling.

    Args:
        base: the decoder.
        pooling: how token states become a vector.
        max_length: maximum number of tokens per input; the folder's, or 512, by default.

    Raises:
        ModelError: the decoder has no causal mask any more.
    """
    encoder = LLM2Vec.from_pretrained(
        base.name,
        enable_bidirectional=False,
        pooling_mode=pooling,
        max_length=max_length,
        **base.hub,
    )
    if encoder.report.verdict != "impossible":
        raise ModelError(
            f"{base.name} has no causal mask any more, so it is not a causal baseline. "
            "Fix: name the decoder it was made from with --base."
        )
    return encoder
