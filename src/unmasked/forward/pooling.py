"""From the states of the tokens to one vector a text.

Works on packed states, (N, D) for the N real tokens of a batch, so padding cannot be pooled by any
mistake. Sums are taken in float32. Cost: one pass over the states.

The positions used by `weighted_mean` count from the first token of the input, BOS included, as the
stock sentence-transformers `Pooling` counts them, so that a saved folder gives the same vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor

from unmasked.errors import ModelError, unknown

STOCK_MODES = {
    "mean": "mean",
    "weighted_mean": "weightedmean",
    "last_token": "lasttoken",
    "eos_token": "lasttoken",
    "bos_token": "cls",
}
"""Our pooling modes (those of LLM2Vec) and what stock sentence-transformers calls them."""
CAUSAL_BASELINES = ("mean", "weighted_mean", "last_token")
"""Modes of the paper's causal baselines (arXiv 2404.05961, section 3)."""


def check_mode(mode: str) -> str:
    """The mode itself, or a `ModelError` that names the allowed ones."""
    if mode not in STOCK_MODES:
        raise ModelError(unknown("pooling mode", mode, STOCK_MODES))
    return mode


def pool(
    states: Tensor,
    rows: Tensor,
    positions: Tensor,
    is_text: Tensor,
    batch: int,
    mode: str,
    from_text: bool = False,
) -> Tensor:
    """Pool packed token states into one vector a row (LLM2Vec, arXiv 2404.05961, section 2).

    Args:
        states: (N, D) last hidden states of the real tokens.
        rows: (N,) the row of each token, in any order.
        positions: (N,) the position of each token in its row, from 0.
        is_text: (N,) which tokens are pooled; at least one in each row.
        batch: B, the number of rows.
        mode: a key of `STOCK_MODES`.
        from_text: ``weighted_mean`` counts from the first token that is pooled, as the original
            package does, and not from the input's first, as the stock module does.

    Returns:
        (B, D) vectors in the dtype of the states.
    """
    if mode in ("mean", "weighted_mean"):
        weights = is_text.to(torch.float32)
        if mode == "weighted_mean":
            if from_text:
                late = torch.where(is_text, positions, positions.amax())
                first = late.new_full((batch,), int(positions.amax())) if len(late) else late
                positions = positions - first.scatter_reduce(0, rows, late, "amin")[rows]
            weights = weights * (positions + 1)
        sums = states.new_zeros(batch, states.shape[1], dtype=torch.float32)
        sums = sums.index_add(0, rows, states.float() * weights[:, None])
        totals = weights.new_zeros(batch).index_add(0, rows, weights)
        return (sums / totals[:, None]).to(states.dtype)
    order = torch.where(is_text, positions, -1)
    if mode == "bos_token":
        chosen = positions == 0
    else:
        last = order.new_full((batch,), -1).scatter_reduce(0, rows, order, "amax")
        chosen = is_text & (order == last[rows])
    return torch.empty_like(states[:batch]).index_copy(0, rows[chosen], states[chosen])


class TextPooling(Pooling):
    """The stock `Pooling` module, made to pool exactly the text of each row."""

    def __init__(
        self,
        embedding_dimension: int,
        mode: str,
        skip_instruction: bool = True,
        from_text: bool = False,
    ) -> None:
        # BOS is context: the stock loader may only find it where the prompt is not left out.
        include = not skip_instruction or mode == "bos_token"
        stock_mode: Any = STOCK_MODES[check_mode(mode)]
        super().__init__(embedding_dimension, pooling_mode=stock_mode, include_prompt=include)
        self.mode = mode
        self.from_text = from_text

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        features["sentence_embedding"] = pool(
            features["packed_states"],
            features["packed_rows"],
            features["packed_positions"],
            features["packed_is_text"],
            features["input_ids"].shape[0],
            self.mode,
            self.from_text,
        )
        return features
