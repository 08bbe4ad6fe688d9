"""Attention without a variable-length kernel: one call of SDPA for each length of text.

It runs everywhere, supports every option of every family, and is the reference for the GPU kernels
in `ragged`. On a CPU it is the fastest way; on a GPU the call for a single length is too small to
keep the device busy.

Shapes: B texts, T tokens of the longest, N tokens of all, H query heads, G key-value heads of
width d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from unmasked.forward.packing.layout import Packed
from unmasked.forward.precision import has_amx

LONG = 64
"""Length from which bfloat16 attention is faster as two matrix products than as SDPA, on a CPU
without matrix units. With them (AMX) SDPA was 1.1 to 4 times as fast at lengths of 48 to 2048
(`benchmarks/attention.py`)."""


@dataclass(frozen=True)
class Extras:
    """Options of attention besides queries, keys and values, as transformers passes them.

    Attributes:
        scaling: factor of the scores; None for ``d**-0.5``.
        dropout: probability of dropping an attention weight.
        softcap: limit of the absolute value of a score; None for none.
        sinks: (H,) scores that take part in the softmax but have no value.
        reach: tokens that a query sees to its left and right, without itself; None for all.
    """

    scaling: float | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None
    reach: tuple[int, int] | None = None


def band(length: int, reach: tuple[int, int], device: torch.device) -> Tensor:
    """(length, length) bool, true where a query (row) may look at a key (column)."""
    positions = torch.arange(length, device=device)
    to_the_right = positions - positions[:, None]
    return (to_the_right >= -reach[0]) & (to_the_right <= reach[1])


def attend_by_text(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, packed: Packed, extras: Extras
) -> Tensor:
    """(1, N, H, d) attention of (1, heads, N, d), each text by itself.

    Args:
        query, key, value: with H, G and G heads.
        mask: (1, 1, T, T) for the longest text; a window is the same for every token, so shorter
            texts use its upper left corner. None for no mask.
        packed: where the texts are.
        extras: the options of the family; a mask is drawn for its reach if none is given.
    """
    if mask is None and extras.reach is not None:
        mask = band(packed.longest, extras.reach, query.device)
    parts = []
    for start, texts, length in packed.groups:
        q, k, v = (
            x[0, :, start : start + texts * length].unflatten(1, (texts, length)).transpose(0, 1)
            for x in (query, key, value)
        )  # (texts, heads, length, d)
        corner = None if mask is None else mask[..., :length, :length]
        parts.append(attend(q, k, v, corner, extras).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None]


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extras: Extras
) -> Tensor:
    """(B, H, T, d) attention: SDPA, or matrix products for what SDPA lacks or does slowly."""
    long_bfloat16 = query.dtype == torch.bfloat16 and query.shape[2] >= LONG
    sdpa_is_slow = query.device.type == "cpu" and (
        extras.dropout > 0 or (long_bfloat16 and not has_amx())
    )
    if extras.softcap is None and extras.sinks is None and not sdpa_is_slow:
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, mask, extras.dropout, scale=extras.scaling, enable_gqa=grouped
        )
    batch, heads, tokens, width = query.shape
    shared = batch * key.shape[1]
    # The queries of all heads that share a key head form one matrix, so no key is repeated.
    queries = query.reshape(shared, -1, width)  # (B * G, H / G * T, d)
    keys = key.reshape(shared, tokens, width).transpose(1, 2)  # (B * G, d, T)
    # baddbmm scales inside the product; beta=0 ignores the (empty) first argument.
    scale = extras.scaling or width**-0.5
    scores = torch.baddbmm(queries.new_empty(1, 1, 1), queries, keys, beta=0, alpha=scale)
    scores = scores.view(batch, heads, tokens, tokens)
    if extras.softcap is not None:
        scores = torch.tanh(scores / extras.softcap) * extras.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if extras.sinks is not None:
        sink = extras.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        scores = torch.cat([scores, sink], dim=-1)  # takes part in the softmax, has no value
    weights = scores.softmax(dim=-1)[..., :tokens]
    weights = nn.functional.dropout(weights, extras.dropout).reshape(shared, -1, tokens)
    return torch.bmm(weights, value.reshape(shared, tokens, width)).view_as(query)
