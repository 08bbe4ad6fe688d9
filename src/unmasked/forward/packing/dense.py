"""Attention without a kernel for texts of any length: one batch of SDPA per length of text.

It runs everywhere, takes every extra that a family asks for, and is what the kernels of a GPU
(`ragged`) are measured against. On a CPU it is the fastest way; on a GPU each length of a batch is
a product of its own, too small to fill it.

Shapes: B texts, T tokens of the longest, N tokens of all, H query heads, G key-value heads of
width d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from unmasked.forward.packing.layout import Packed

LONG = 64
"""Tokens from which bfloat16 attention on a CPU is faster as two matrix products than as SDPA."""


@dataclass(frozen=True)
class Extras:
    """What a family hands over beside queries, keys and values, as transformers names it.

    Attributes:
        scaling: of the scores; None for ``d**-0.5``.
        dropout: probability of dropping a weight.
        softcap: largest size of a score; None for none.
        sinks: (H,) scores that take part in the softmax and have no value.
        reach: tokens that a query sees to its left and right, itself not counted; None for all.
    """

    scaling: float | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None
    reach: tuple[int, int] | None = None


def band(length: int, reach: tuple[int, int], device: torch.device) -> Tensor:
    """(length, length) bool, true where a query (row) may look at a key (column)."""
    to_the_right = (
        torch.arange(length, device=device) - torch.arange(length, device=device)[:, None]
    )
    return (to_the_right >= -reach[0]) & (to_the_right <= reach[1])


def attend_by_text(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, packed: Packed, extras: Extras
) -> Tensor:
    """(1, N, H, d) attention of (1, heads, N, d), each text by itself.

    Args:
        query, key, value: of H, G and G heads.
        mask: (1, 1, T, T) for the longest text; windows look the same from every token, so shorter
            texts take its upper left corner. None for none.
        packed: where the texts lie.
        extras: of the family; a reach is drawn where there is no mask.
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
    """(B, H, T, d) attention: SDPA, or written out for what SDPA does not have or does slowly."""
    half = query.dtype == torch.bfloat16 and query.shape[2] >= LONG
    slow = query.device.type == "cpu" and (extras.dropout > 0 or half)
    if extras.softcap is None and extras.sinks is None and not slow:
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, mask, extras.dropout, scale=extras.scaling, enable_gqa=grouped
        )
    batch, heads, tokens, width = query.shape
    shared = batch * key.shape[1]
    # The queries that share a key stand one below the other, so that no key is repeated.
    queries = query.reshape(shared, -1, width)  # (B * G, H / G * T, d)
    keys = key.reshape(shared, tokens, width).transpose(1, 2)
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
