"""Decoder layers compiled into fewer kernels, where the work is long enough to pay for it.

At 0.6B parameters two thirds of a forward on a GPU are element-wise kernels (norms, rotary
positions, casts), which `torch.compile` fuses. Each layer is compiled with dynamic shapes, so that
one graph serves all layers of a kind and all batches; our attention stays out of the graph. On a
CPU it gains nothing.

The first batch waits some 20 s, so ``auto`` compiles on a GPU only, once a model has done or is
asked to do `LONG_WORK` tokens. An H100 encoded a 0.6B model at 161,000 tokens a second without and
330,000 with it: 3.1 seconds per million tokens, so 20 s are back after 6.5 million. These rates
were measured by hand, of an earlier state of the package.

What is compiled is compared with what it replaces on the loaded model, and undone if it differs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


def compile_layers(model: Any, backend: str | Callable[..., Any] = "inductor") -> str | None:
    """Compile the decoder layers of a bare transformer, if that gives the same states.

    Args:
        model: a transformer, packed or not; it runs as before where it cannot be compiled.
        backend: of `torch.compile`.

    Returns:
        None, or why the layers are not compiled, which is logged in one line as well.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    layers = list(layers_of(model, depth))
    reason = None if layers else "no list of layers was found"
    if layers:
        try:
            eager, single = _sample(model), _sample(model, together=False)
            for layer in layers:
                layer.compile(dynamic=True, backend=backend)
            found = _sample(model)
            own = float((eager - single).norm() / eager.norm())
            limit = max(FLOOR.get(running_as(model)[1], 2e-2), SLACK * own)
            drift = float((found - eager).norm() / eager.norm())
            if not drift <= limit:
                reason = f"compiled and plain states differ by {drift:.1e} (limit {limit:.0e})"
        except Exception as error:  # the compiler's errors have no common class
            reason = f"the compiler fails ({type(error).__name__}: {str(error)[:100]})"
        if reason is not None:
            for layer in layers:
                layer._compiled_call_impl = None
    model.layers_compiled = reason is None
    if reason is not None:
        logger.warning("The layers run as they are, not compiled: %s.", reason)
    return reason


@torch.no_grad()
def _sample(model: Any, together: bool = True) -> Tensor:
    """Last states of a few texts, in one batch or one by one, one text after the other."""
    ids, mask = sample_texts(model)
    lengths = mask.sum(dim=1).tolist()
    with evaluating(model):
        if together and is_checked(model):
            packed = pack(mask).to(ids.device)
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
    return torch.cat(parts).float()
