"""Matryoshka over layers: the first n layers are trained to be an encoder of their own.

Their vector is the one that `convert --layers n` gives: pooled from the states of layer n after the
model's final norm (2DMSE, Li et al., arXiv 2402.14776; sentence-transformers' `AdaptiveLayerLoss`
pools them without that norm). Each depth is a separate forward through its layers, within one call
of the model, so that gradient caching and distributed training work unchanged.
Cost: a forward and backward through n of the L layers for each depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from unmasked.errors import ModelError
from unmasked.mask.opening import decoder_of, layers_of

VECTOR = "sentence_embedding"


@contextmanager
def depths(encoder: Any, layers: Sequence[int]) -> Iterator[None]:
    """Within the block, the encoder's vectors are followed by those of its first layers.

    Args:
        encoder: a `TextEncoder`; called as a module it gives (B, D (1 + len(layers))).
        layers: numbers of layers, each at least 1 and less than the model has.

    Raises:
        ModelError: the model keeps its layers in more than one list.
    """
    if not layers:
        yield
        return
    trunk = decoder_of(encoder.backbone.auto_model)
    _require_one_stack(trunk)

    def deeper(module: nn.Module, args: tuple[Any, ...], kwargs: Any, found: Any) -> Any:
        vectors = [found[VECTOR]]
        for count in layers:
            with first_layers(trunk, count):
                vectors.append(module.forward(*args, **kwargs)[VECTOR])
        return {**found, VECTOR: torch.cat(vectors, dim=1)}

    hook = encoder.register_forward_hook(deeper, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def first_layers(trunk: Any, count: int) -> Iterator[None]:
    """Within the block, a bare transformer has only its first layers."""
    text = trunk.config.get_text_config()
    depth = text.num_hidden_layers
    stack = layers_of(trunk, depth)
    name = next(name for name, module in trunk.named_modules() if module is stack)
    trunk.set_submodule(name, nn.ModuleList(list(stack)[:count]))
    text.num_hidden_layers = count
    try:
        yield
    finally:
        text.num_hidden_layers = depth
        trunk.set_submodule(name, stack)


def _require_one_stack(trunk: Any) -> None:
    stack = layers_of(trunk, trunk.config.get_text_config().num_hidden_layers)
    if not any(module is stack for module in trunk.modules()):
        raise ModelError(
            "supervised.matryoshka_layers: this model keeps its layers in several lists, so that "
            "its first ones cannot run alone. Fix: supervised.matryoshka_layers=[]."
        )
