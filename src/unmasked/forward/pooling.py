"""Turns the states of tokens into one vector per text.

Pooling works on packed states, (N, D) for the N real tokens of a batch, so padding cannot be pooled
by mistake. Sums are taken in float32. Cost: one pass over the states.

``weighted_mean`` weights a token by its position, counted from 1 at the first token of the input
(BOS included). sentence-transformers counts in the same way, so a saved folder gives the same
vectors there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from unmasked.errors import ModelError, unknown

STOCK_MODES = {
    "mean": "mean",
    "weighted_mean": "weightedmean",
    "last_token": "lasttoken",
    "eos_token": "lasttoken",
    "bos_token": "cls",
}
"""Our pooling modes (those of LLM2Vec), and their names in stock sentence-transformers."""
LAYERS = "all_layer_embeddings"
"""The feature that holds the states of every layer, in the stock modules and here."""
CAUSAL_BASELINES = ("mean", "weighted_mean", "last_token")
"""Modes of the paper's causal baselines (arXiv 2404.05961, section 3)."""


def check_mode(mode: str) -> str:
    """The mode itself, or a `ModelError` that names the allowed ones."""
    if not isinstance(mode, str) or mode not in STOCK_MODES:
        raise ModelError(unknown("pooling mode", str(mode), STOCK_MODES))
    return mode


def pool(
    states: Tensor,
    rows: Tensor,
    positions: Tensor,
    is_text: Tensor,
    batch: int,
    mode: str,
) -> Tensor:
    """Pool packed token states into one vector per row (LLM2Vec, arXiv 2404.05961, section 2).

    Args:
        states: (N, D) last hidden states of the real tokens.
        rows: (N,) the row of each token, in any order.
        positions: (N,) the position of each token in its row, from 0.
        is_text: (N,) which tokens are pooled; at least one in each row.
        batch: B, the number of rows.
        mode: a key of `STOCK_MODES`.

    Returns:
        (B, D) vectors in the dtype of the states.
    """
    if mode in ("mean", "weighted_mean"):
        weights = is_text.to(torch.float32)
        if mode == "weighted_mean":
            weights = weights * (positions + 1)
        sums = states.new_zeros(batch, states.shape[1], dtype=torch.float32)
        sums = sums.index_add(0, rows, states.float() * weights[:, None])
        totals = weights.new_zeros(batch).index_add(0, rows, weights)
        return (sums / totals[:, None]).to(states.dtype)
    # Pick the last allowed token of each row by its index among the N; a boolean mask would make
    # the host wait for the device. The key orders by position and has the index as its remainder.
    count = len(rows)
    allowed = positions == 0 if mode == "bos_token" else is_text
    keys = torch.where(allowed, positions * count + torch.arange(count, device=rows.device), -1)
    last = keys.new_full((batch,), -1).scatter_reduce(0, rows, keys, "amax")  # (B,)
    return states[last % count]


class TextPooling(Pooling):
    """The stock `Pooling` module, restricted to the tokens of each row that are its text.

    Args:
        width: D, the width of the states.
        mode: a key of `STOCK_MODES`.
        skip_instruction: False pools BOS and the instruction as well.
    """

    def __init__(self, width: int, mode: str, skip_instruction: bool = True) -> None:
        # A stock loader counts BOS as part of the prompt, so it pools BOS only with the prompt.
        include = not skip_instruction or mode == "bos_token"
        stock_mode: Any = STOCK_MODES[check_mode(mode)]
        super().__init__(width, pooling_mode=stock_mode, include_prompt=include)
        self.mode = mode

    def check_unchanged(self) -> None:
        """Refuse a pooling mode that was set on the module later: the tokenizer depends on it.

        Raises:
            ModelError: `pooling_mode` was changed.
        """
        if self.pooling_mode != STOCK_MODES[self.mode]:
            raise ModelError(
                f"this encoder was made to pool '{self.mode}', and its pooling_mode was set to "
                f"{self.pooling_mode!r}. Fix: LLM2Vec.from_pretrained(..., pooling_mode='mean'); "
                f"allowed: {', '.join(STOCK_MODES)}."
            )

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        self.check_unchanged()
        is_text = features["packed_is_text"]
        states = features["packed_states"]
        if LAYERS in features:
            # `AdaptiveLayerLoss` may have replaced the last layer's embeddings by another layer's.
            where = features["packed_rows"], features["packed_columns"]
            states = features["token_embeddings"][where]  # (N, D)
        features["sentence_embedding"] = pool(
            states,
            features["packed_rows"],
            features["packed_positions"],
            torch.ones_like(is_text) if self.include_prompt else is_text,
            features["input_ids"].shape[0],
            self.mode,
        )
        return features


def after_pooling(modules: Iterable[nn.Module], vectors: Tensor) -> Tensor:
    """(B, D) pooled vectors, after the modules behind the pooling, such as `Normalize`."""
    features = {"sentence_embedding": vectors}
    for module in modules:
        features = module(features)
    return features["sentence_embedding"]


def own_pooling(encoder: Any) -> TextPooling:
    """The second module of a `TextEncoder`.

    Raises:
        ModelError: it was replaced, or set to another mode.
    """
    module = encoder[1]
    if not isinstance(module, TextPooling):
        raise ModelError(
            f"the second module is {module}, not the pooling of this encoder, so no folder can say "
            "what is pooled. Fix: keep modules 0 and 1, and append others after them."
        )
    module.check_unchanged()
    return module
