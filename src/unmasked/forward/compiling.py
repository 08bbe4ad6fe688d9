"""Decoder layers compiled into fewer kernels, where the work is long enough to pay for it.

At 0.6B parameters two thirds of a forward on a GPU are element-wise kernels (norms, rotary
positions, casts), which `torch.compile` fuses. Each layer is compiled with dynamic shapes, so that
one graph serves all layers of a kind and all batches; our attention stays out of the graph. On a
CPU it gains nothing.

The first batch waits some 20 s, so ``auto`` compiles on a GPU only, once a model has done or is
asked to do `LONG_WORK` tokens. An H200 encoded a 0.6B model at 186,000 tokens a second without and
381,000 with it (`benchmarks/gpu.py`): 2.8 seconds per million tokens, or 18 s in
`LONG_WORK`.

Training compiles by the same rule. A trained token costs about three times an encoded one, and
compiling takes longer, because the way back is compiled too: once without dropout, for the
comparison, and once with it.

What is compiled is compared with what it replaces on the loaded model, with its gradient where it
is to be trained, and undone if it differs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unmasked.errors import ModelError, unknown
from unmasked.forward.packing.attending import run_packed
from unmasked.forward.packing.check import FLOOR, SLACK, is_checked, running_as, sample_texts
from unmasked.forward.packing.layout import pack
from unmasked.mask.opening import layers_of
from unmasked.mask.proof import evaluating

logger = logging.getLogger(__name__)

CHOICES = ("auto", "always", "never")
LONG_WORK = 6_500_000
"""Tokens after which compiling has paid for itself."""
LETTERS = 4
"""Characters of a token, roughly, where nothing is tokenised yet."""


def check_choice(choice: str) -> str:
    """The choice as it is.

    Raises:
        ModelError: it is not one of `CHOICES`.
    """
    if choice not in CHOICES:
        raise ModelError(unknown("compile", choice, CHOICES))
    return choice


def pays(choice: str, device: torch.device, tokens: int) -> bool:
    """Whether layers are to be compiled for a number of tokens, done and to come."""
    if choice == "auto":
        return device.type == "cuda" and tokens >= LONG_WORK
    return choice == "always"


def is_compiled(model: Any) -> bool:
    """Whether `compile_layers` has been here, with whatever result."""
    return getattr(model, "layers_compiled", None) is not None


def compile_layers(
    model: Any, backend: str | Callable[..., Any] = "inductor", *, training: bool = False
) -> str | None:
    """Compile the decoder layers of a bare transformer, if that gives the same states.

    Args:
        model: a transformer, packed or not; it runs as before where it cannot be compiled.
        backend: of `torch.compile`.
        training: whether gradients have to be the same as well.

    Returns:
        None, or why the layers are not compiled, which is logged in one line as well.
    """
    layers = _layers(model)
    reason = None if layers else "no list of layers was found"
    # The gradient of the first layer has come through all the others.
    learned = [p for p in layers[0].parameters() if training and p.requires_grad] if layers else []
    if layers:
        try:
            eager, single = _sample(model, learned), _sample(model, learned, together=False)
            for module in _compiled_parts(layers):
                module.compile(dynamic=True, backend=backend)
            compared = zip(eager, single, _sample(model, learned), strict=True)
            floor = FLOOR.get(running_as(model)[1], 2e-2)
            for what, (plain, alone, found) in zip(("states", "gradients"), compared, strict=False):
                limit = max(floor, SLACK * float((plain - alone).norm() / plain.norm()))
                drift = float((found - plain).norm() / plain.norm())
                if not drift <= limit:
                    reason = f"compiled and plain {what} differ by {drift:.1e} (limit {limit:.0e})"
        except Exception as error:  # the compiler's errors have no common class
            reason = f"the compiler fails ({type(error).__name__}: {str(error)[:100]})"
    if reason is not None:
        put_back(model)
        logger.warning("The layers run as they are, not compiled: %s.", reason)
    model.layers_compiled = reason is None
    return reason


def put_back(model: Any) -> None:
    """Have the decoder layers of a bare transformer run as they are, whatever was compiled."""
    for layer in _layers(model):
        for module in (layer, *layer.children()):
            module._compiled_call_impl = None
    model.layers_compiled = None


def _layers(model: Any) -> list[Any]:
    return list(layers_of(model, getattr(model.config.get_text_config(), "num_hidden_layers", 0)))


def _compiled_parts(layers: list[Any]) -> list[nn.Module]:
    """The layers; or attention and MLP where a layer recomputes itself in the backward pass.

    Such a checkpoint is inside the layer, and the compiler passes over one that has our attention
    in it: nothing would be compiled, without a word.
    """
    parts: list[nn.Module] = []
    for layer in layers:
        inner = [part for part in layer.children() if any(part.children())]
        parts += inner if getattr(layer, "gradient_checkpointing", False) else [layer]
    return parts


def _sample(
    model: Any, learned: Sequence[nn.Parameter] = (), together: bool = True
) -> tuple[Tensor, ...]:
    """Last states of a few texts, in one batch or one by one, one text after the other.

    Where something is `learned`, the gradient of a mixture of these states in it comes second.
    """
    ids, mask = sample_texts(model)
    lengths, packed = mask.sum(dim=1).tolist(), pack(mask)
    # As `encode` runs, where a layout comes from outside: other tensors would be compiled for anew.
    grad = torch.set_grad_enabled
    with evaluating(model), torch.inference_mode(not learned), grad(bool(learned)):
        if together and is_checked(model):
            packed = packed.to(ids.device)
            states = run_packed(model, ids, packed)
            parts = [states[packed.rows == row] for row in range(len(ids))]
        elif together:
            outputs = model(input_ids=ids, attention_mask=mask.to(ids.device), use_cache=False)
            rows = zip(outputs.last_hidden_state, lengths, strict=True)
            parts = [row[:length] for row, length in rows]
        else:
            texts = zip(ids, lengths, strict=True)
            alone = [model(input_ids=i[None, :n], use_cache=False) for i, n in texts]
            parts = [outputs.last_hidden_state[0] for outputs in alone]
        states = torch.cat(parts).float()
        if not learned:
            return (states,)
        generator = torch.Generator().manual_seed(0)
        mixture = torch.randn(states.shape, generator=generator).to(states.device)
        gradient = torch.autograd.grad((states * mixture).sum(), learned, allow_unused=True)
    return states.detach(), torch.cat([g.float().flatten() for g in gradient if g is not None])
