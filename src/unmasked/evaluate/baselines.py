"""Causal baselines: the decoder that an encoder was made from, with its mask closed.

Cost: the decoder is loaded once for each pooling.
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
    """For each of `CAUSAL_BASELINES`, a name and a function that loads it by `causal_encoder`."""
    for pooling in CAUSAL_BASELINES:
        yield f"{CAUSAL}{pooling}", partial(causal_encoder, base, pooling)


def causal_encoder(base: Location, pooling: str, max_length: int | None = None) -> LLM2Vec:
    """The untouched decoder with a pooling mode; `base` is from `compat.origin.find_base`.

    Raises:
        ModelError: the decoder no longer has a causal mask.
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
