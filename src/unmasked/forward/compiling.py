"""Decoder layers compiled into fewer kernels, if the work is long enough to pay for it.

At 0.6B parameters two thirds of a forward on a GPU are element-wise kernels (norms, rotary
positions, casts), which `torch.compile` fuses. Each layer is compiled with dynamic shapes, so that
one graph serves all layers of a kind and all batches; our attention stays out of the graph. On a
CPU half of the time or more goes to matrix products, so there is less to gain.

Compiling takes some 20 s, so ``auto`` compiles on a GPU only, when the tokens that a model has
encoded and is about to encode reach `LONG_WORK`. With a 0.6B model, an H200 encoded 186,000 tokens
a second without and 381,000 with it (`benchmarks/gpu.py`), which saves 2.8 s per million tokens, or
18 s in `LONG_WORK`.

Training follows the same rule. A training token costs about three times as much as an encoded one,
and compiling takes longer, because the backward pass is compiled too: once without dropout, for the
comparison, and once with it.

The states of the compiled layers (in training, the gradient too) are compared with those of the
plain layers on the loaded model. If they differ, the compilation is undone.
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
"""Number of tokens after which compiling has paid for itself."""
LETTERS = 4
"""Rough number of characters per token, for inputs that are not tokenised yet."""


def check_choice(choice: str) -> str:
    """Return the choice unchanged.

    Raises:
        ModelError: the choice is not one of `CHOICES`.
    """
    if choice not in CHOICES:
        raise ModelError(unknown("compile", choice, CHOICES))
    return choice


def pays(choice: str, device: torch.device, tokens: int) -> bool:
    """Whether compiling layers pays for a number of tokens, past and future ones together."""
    if choice == "auto":
        return device.type == "cuda" and tokens >= LONG_WORK
    return choice == "always"


def is_compiled(model: Any) -> bool:
    """Whether `compile_layers` has tried this model, successfully or not."""
    return getattr(model, "layers_compiled", None) is not None


def compile_layers(
    model: Any, backend: str | Callable[..., Any] = "inductor", *, training: bool = False
) -> str | None:
    """Compile the decoder layers of a bare transformer, if that gives the same states.

    Args:
        model: a transformer, packed or not; it stays as it was if it cannot be compiled.
        backend: of `torch.compile`.
        training: whether the gradients must be the same too.

    Returns:
        None, or the reason why the layers are not compiled, which is also logged.
    """
    try:
        reason = _compile_and_compare(model, backend, training)
    except Exception as error:  # the compiler's errors have no common class
        reason = f"the compiler fails ({type(error).__name__}: {str(error)[:100]})"
    if reason is not None:
        put_back(model)
        logger.warning("The layers run as they are, not compiled: %s.", reason)
    model.layers_compiled = reason is None
    return reason


def _compile_and_compare(
    model: Any, backend: str | Callable[..., Any], training: bool
) -> str | None:
    """Compile the layers; returns how their results differ from before, None if they agree."""
    layers = _layers(model)
    if not layers:
        return "no list of layers was found"
    # The gradient of the first layer has passed through all the others.
    learned = [p for p in layers[0].parameters() if training and p.requires_grad]
    plain, single = _sample(model, learned), _sample(model, learned, together=False)
    for module in _compiled_parts(layers):
        module.compile(dynamic=True, backend=backend)
    compiled = _sample(model, learned)
    floor = FLOOR.get(running_as(model)[1], 2e-2)
    names = ("states", "gradients")[: len(plain)]
    for name, expected, alone, found in zip(names, plain, single, compiled, strict=True):
        # The limit depends on how this model rounds: texts in one batch against one by one.
        limit = max(floor, SLACK * float((expected - alone).norm() / expected.norm()))
        drift = float((found - expected).norm() / expected.norm())
        if not drift <= limit:  # also for NaN
            return f"compiled and plain {name} differ by {drift:.1e} (limit {limit:.0e})"
    return None


def put_back(model: Any) -> None:
    """Undo the compilation of the decoder layers of a bare transformer."""
    for layer in _layers(model):
        for module in (layer, *layer.children()):
            module._compiled_call_impl = None
    model.layers_compiled = None


def _layers(model: Any) -> list[Any]:
    return list(layers_of(model, getattr(model.config.get_text_config(), "num_hidden_layers", 0)))


def _compiled_parts(layers: list[Any]) -> list[nn.Module]:
    """The modules to compile: the layers, or with gradient checkpointing their attention and MLP.

    A checkpoint is inside the layer, and the compiler silently skips a checkpoint that contains our
    attention, so compiling the whole layer would do nothing.
    """
    parts: list[nn.Module] = []
    for layer in layers:
        inner = [part for part in layer.children() if any(part.children())]  # not the norms
        parts += inner if getattr(layer, "gradient_checkpointing", False) else [layer]
    return parts


def _sample(
    model: Any, learned: Sequence[nn.Parameter] = (), together: bool = True
) -> tuple[Tensor, ...]:
    """Last states (N, D) of a few texts, which run in one batch or one by one.

    If there are `learned` parameters, the second item is the gradient of a random projection of
    these states with respect to them.
    """
    ids, mask = sample_texts(model)
    # The layout is made outside of inference mode, as `encode` makes it in a thread: the compiler
    # would make another graph for tensors of inference mode.
    lengths, packed = mask.sum(dim=1).tolist(), pack(mask)
    grad = torch.set_grad_enabled
    with evaluating(model), torch.inference_mode(not learned), grad(bool(learned)):
        if together and is_checked(model):
            packed = packed.to(ids.device)
            states = run_packed(model, ids, packed)  # longest text first
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
        weights = torch.randn(states.shape, generator=generator).to(states.device)
        gradient = torch.autograd.grad((states * weights).sum(), learned, allow_unused=True)
    return states.detach(), torch.cat([g.float().flatten() for g in gradient if g is not None])
