"""Matryoshka over layers: the first layers alone are trained to be an encoder of their own.

A vector after n layers is what `convert --layers n` gives: the states of layer n behind the model's
last norm (2DMSE, Li et al., arXiv 2402.14776; sentence-transformers' `AdaptiveLayerLoss` pools them
without that norm). Each depth is a forward through its layers, in the same call of the model as the
whole one, so that gradient caching and several devices need to know nothing of it.
Cost: n of L layers once more for each depth.
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
    """In the block, the encoder's vectors are followed by those after its first layers.

    Args:
        encoder: a `TextEncoder`; called as a module it gives (B, D (1 + len(layers))).
        layers: numbers of layers, each from 1 to the number there are.

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
    """In the block, a bare transformer has its first layers only."""
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
