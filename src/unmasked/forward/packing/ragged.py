"""GPU kernels that attend over all texts of a batch at once, and the choice between them.

In `dense` every length of a batch is a call of its own, too small for a GPU. These kernels take all
texts and the offsets at which they begin:

* `torch.nn.attention.varlen.varlen_attn`, without dropout and soft cap. Its arguments differ from
  release to release, so it gets those that its signature has: 2.10 has no ``scale``, 2.10 and 2.11
  have no ``enable_gqa`` (grouped heads need no flag there), 2.10 has no ``window_size``.
* flash-attn, if it is installed, with dropout or a soft cap, not both.
* For dropout without flash-attn, the kernels in `dropout`.

A kernel is used only after its results agreed with single texts on the loaded model (`check`).

Shapes: N tokens of all texts, H query heads, G key-value heads of width d.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_flash_attn_2_available

from unmasked.forward.packing import dropout
from unmasked.forward.packing.dense import Extras
from unmasked.forward.packing.layout import Packed

WIDEST_DROPPED = 192
"""Largest head width d with which every GPU has a backward pass of attention with dropout."""

Kernel = Callable[[Tensor, Tensor, Tensor, Packed, Extras], Tensor]
"""(N, H, d) attention of queries (N, H, d), keys (N, G, d) and values (N, G, d)."""


def on_half_gpu(query: Tensor) -> bool:
    """Whether a tensor is on a GPU and in half precision, as these kernels need it."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def find_kernel(query: Tensor, extras: Extras) -> Kernel | None:
    """The kernel that takes all texts at once; None if `dense` has to be used.

    Args:
        query: (1, H, N, d).
        extras: the options of the family.
    """
    if extras.sinks is not None or not on_half_gpu(query):
        return None
    if extras.dropout == 0 and extras.softcap is None:
        windowless = extras.reach is not None and "window_size" not in arguments_of(_varlen())
        return None if windowless else attend_varlen
    if extras.dropout > 0 and (extras.softcap is not None or query.shape[-1] > WIDEST_DROPPED):
        return None
    if is_flash_attn_2_available():
        return attend_flash
    return dropout.find_dropping_kernel(query, extras) if extras.dropout > 0 else None


def attend_at_once(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, packed: Packed, extras: Extras
) -> Tensor:
    """(1, N, H, d) attention of (1, heads, N, d) with a kernel of `find_kernel`."""
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # (N, heads, d)
    return kernel(q, k, v, packed, extras)[None]


def _varlen() -> Callable[..., Any]:
    from torch.nn.attention import varlen

    return varlen.varlen_attn


@cache
def arguments_of(function: Callable[..., Any]) -> frozenset[str]:
    """The names of a function's parameters."""
    return frozenset(inspect.signature(function).parameters)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed, extras: Extras) -> Tensor:
    """A `Kernel`: torch's own, without dropout and soft cap."""
    function = _varlen()
    known, options = arguments_of(function), dict[str, Any]()
    if extras.scaling is not None and "scale" in known:
        options["scale"] = extras.scaling
    elif extras.scaling is not None:
        q = q * (extras.scaling * q.shape[-1] ** 0.5)  # the kernel itself multiplies by d**-0.5
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    if extras.reach is not None:
        options["window_size"] = extras.reach
    texts = (packed.ends, packed.ends, packed.longest, packed.longest)
    out: Tensor = function(q, k, v, *texts, **options)
    return out


def attend_flash(q: Tensor, k: Tensor, v: Tensor, packed: Packed, extras: Extras) -> Tensor:
    """A `Kernel`: flash-attn's, with dropout or a soft cap."""
    from flash_attn import flash_attn_varlen_func

    options: dict[str, Any] = {"softmax_scale": extras.scaling, "dropout_p": extras.dropout}
    if extras.softcap is not None:
        options["softcap"] = extras.softcap
    if extras.reach is not None:
        options["window_size"] = extras.reach
    texts = (packed.ends, packed.ends, packed.longest, packed.longest)
    out: Tensor = flash_attn_varlen_func(q, k, v, *texts, **options)
    return out
