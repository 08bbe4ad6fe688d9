"""Finds the causal decoder behind an encoder, which is what the encoder has to beat.

Cost: one load of the decoder for each pooling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from unmasked.checkpoint import adapters
from unmasked.checkpoint.location import locate
from unmasked.compat.llm2vec import LLM2Vec
from unmasked.errors import ModelError
from unmasked.evaluate.compare import CAUSAL
from unmasked.forward.pooling import CAUSAL_BASELINES
from unmasked.recipe.files import load_recipe


def find_base(model: str) -> str:
    """The decoder that a model was made from, as far back as can be told.

    That is what an adapter names; for the ``model`` of a run folder, what its recipe names; else
    the model itself.
    """
    folder, place = Path(model), locate(model)
    recipe = folder.parent / "recipe.yaml"
    if folder.is_dir() and recipe.is_file():
        return find_base(load_recipe(recipe).model.base)
    if adapters.is_adapter(place):
        return find_base(adapters.read_adapter_config(place).base_model_name_or_path or model)
    return model


def causal_baselines(base: str) -> Iterator[tuple[str, Callable[[], LLM2Vec]]]:
    """Name and maker of a causal encoder for each of `CAUSAL_BASELINES`.

    Raises:
        ModelError: (by a maker) the decoder has no causal mask any more.
    """
    for pooling in CAUSAL_BASELINES:
        yield f"{CAUSAL}{pooling}", partial(_causal_encoder, base, pooling)


def _causal_encoder(base: str, pooling: str) -> LLM2Vec:
    encoder = LLM2Vec.from_pretrained(base, enable_bidirectional=False, pooling_mode=pooling)
    if encoder.report.verdict != "impossible":
        raise ModelError(
            f"{base} has no causal mask any more, so it is not a causal baseline. "
            "Fix: name the decoder it was made from with --base."
        )
    return encoder
