"""Attention with dropout over all texts at once, on a GPU without flash-attn: for SimCSE.

Decoders are trained without dropout, and `varlen_attn` does not support it. The operator that it
calls does: `torch.ops.aten._flash_attention_forward`, which SDPA calls too, is differentiable and
takes the offsets of the texts. Its name is private to torch, so its schema is checked first, and
one small batch is compared with plain attention. If either is not as expected, nested tensors are
used, which are public and slower; if these fail too, attention runs once for each length (`dense`).

The comparison costs a few small kernels for each head width, dtype and device, once per process.

Shapes: N tokens of all texts, H query heads, G key-value heads of width d.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention

from unmasked.forward.packing.dense import Extras, attend_by_text
from unmasked.forward.packing.layout import Packed, pack

logger = logging.getLogger(__name__)

FLASH_ARGUMENTS = (
    "query",
    "key",
    "value",
    "cum_seq_q",
    "cum_seq_k",
    "max_q",
    "max_k",
    "dropout_p",
    "is_causal",
    "return_debug_mask",
)
"""The first arguments of the operator, in order; others are passed by name or not at all."""
WINDOW_ARGUMENTS = ("window_size_left", "window_size_right")
LENGTHS = (64, 9, 64, 1, 33)
"""Lengths of the texts on which a kernel is compared."""

Kernel = Callable[[Tensor, Tensor, Tensor, Packed, Extras], Tensor]


def find_dropping_kernel(query: Tensor, extras: Extras) -> Kernel | None:
    """The fastest kernel with dropout whose results are right on this device; None without one.

    Args:
        query: (1, H, N, d).
        extras: the options of the family.
    """
    windows = extras.reach is not None
    return checked_kernel(query.device, query.dtype, query.shape[-1], windows)


@cache
def checked_kernel(
    device: torch.device, dtype: torch.dtype, width: int, windows: bool
) -> Kernel | None:
    """The kernel for heads of a width; with `windows`, one that also has sliding windows."""
    for kernel in (attend_flash_operator, attend_nested):
        if kernel is attend_nested and windows:
            continue
        with suppress(AttributeError, RuntimeError, TypeError, ValueError, NotImplementedError):
            if kernel is attend_flash_operator and not _schema_fits(windows):
                continue
            if _agrees(kernel, device, dtype, width, (3, 5) if windows else None):
                return kernel
    logger.info("Attention with dropout goes text by text: torch has no kernel that agrees.")
    return None


def flash_operator() -> Any:
    """The overload of torch's flash attention that takes the offsets of texts.

    Raises:
        AttributeError: this release of torch has none.
    """
    return torch.ops.aten._flash_attention_forward.default


def _schema_fits(windows: bool) -> bool:
    names = tuple(argument.name for argument in flash_operator()._schema.arguments)
    needed = {"scale", *(WINDOW_ARGUMENTS if windows else ())}
    return names[: len(FLASH_ARGUMENTS)] == FLASH_ARGUMENTS and needed <= {*names}


def attend_flash_operator(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, extras: Extras
) -> Tensor:
    """A `Kernel`: the operator that SDPA calls, with the offsets of the texts."""
    options: dict[str, Any] = {"scale": extras.scaling}
    if extras.reach is not None:
        options |= dict(zip(WINDOW_ARGUMENTS, extras.reach, strict=True))
    offsets = (packed.ends, packed.ends, packed.longest, packed.longest)
    out: Tensor = flash_operator()(q, k, v, *offsets, extras.dropout, False, False, **options)[0]
    return out


def attend_nested(q: Tensor, k: Tensor, v: Tensor, packed: Packed, extras: Extras) -> Tensor:
    """A `Kernel`: SDPA over a nested tensor of the texts, without sliding windows."""
    share = q.shape[1] // k.shape[1]
    if share > 1:  # nested tensors do not support grouped heads
        k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
    offsets = packed.ends.long()
    shortest = packed.groups[-1][2]
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(
            x, offsets, min_seqlen=shortest, max_seqlen=packed.longest
        ).transpose(1, 2)
        for x in (q, k, v)
    )  # (B, H, T of each text, d)
    out = scaled_dot_product_attention(q, k, v, None, extras.dropout, scale=extras.scaling)
    values: Tensor = out.transpose(1, 2).contiguous().values()
    return values


def _agrees(
    kernel: Kernel,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    reach: tuple[int, int] | None,
) -> bool:
    """Whether a kernel agrees with `dense`, drops at the right rate, and has a gradient.

    Without dropout its states and gradients must be those of `dense`. With dropout, two runs must
    differ; and if all values are 1, the states and the gradient of the values must average to 1.
    """
    here = [device] if device.type == "cuda" else []
    # The first call may come from a checkpointed layer, whose hooks would count these tensors.
    apart = saved_tensors_hooks(Tensor.detach, Tensor.detach)
    with torch.enable_grad(), apart, torch.random.fork_rng(devices=here):
        torch.manual_seed(0)
        mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
        packed = pack(mask.long()).to(device)
        tokens = len(packed.rows)
        q, k, v = (
            torch.randn(tokens, heads, width, device=device, dtype=dtype, requires_grad=True)
            for heads in (8, 4, 4)
        )
        plain = Extras(reach=reach)
        found = kernel(q, k, v, packed, plain)  # (N, H, d)
        queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, N, d)
        expected = attend_by_text(queries, keys, values, None, packed, plain)[0]
        pairs = [(found, expected)]
        gradients = (
            torch.autograd.grad(out.float().square().sum(), (q, k, v)) for out in (found, expected)
        )
        pairs += zip(*gradients, strict=True)
        if not all(_near(one, other) for one, other in pairs):
            return False
        noisy, ones = Extras(dropout=0.5, reach=reach), torch.ones_like(v).requires_grad_()
        # Queries of 0 give equal attention weights.
        first, second = (kernel(q * 0, k, ones, packed, noisy).float() for _ in range(2))
        (gradient,) = torch.autograd.grad(first.sum(), ones)
        means = (first.mean(), second.mean(), gradient.float().mean() / 2)  # 2 queries per key
        return not torch.equal(first, second) and all(
            abs(float(m.detach()) - 1) < 0.1 for m in means
        )


def _near(found: Tensor, expected: Tensor) -> bool:
    difference = (found.detach().float() - expected.float()).norm() / expected.float().norm()
    # bfloat16 rounds to three digits; attention over another text would differ by about 1.
    return float(difference.detach()) < 0.03
