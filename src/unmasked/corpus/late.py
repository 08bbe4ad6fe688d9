"""Passages of a document, pooled from one forward over it (late chunking, arXiv 2409.04701).

The vector of a passage that is encoded alone knows nothing of the rest of its document; if it is
pooled from the hidden states of the whole document, it does. Tokenisation, forward and pooling are
the same as for any text, so a document with one passage has the vector that `encode` gives it.

Cost: one forward over the document, whose attention grows with the square of its length. A document
longer than the model's positions, or than `LONGEST` tokens, takes overlapping forwards of that
length, so that a third of its tokens is computed twice.

Shapes: P passages, B inputs of a batch, T tokens of the longest input, N packed tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unmasked.errors import DataError
from unmasked.forward.batches import plan_batches, token_budget
from unmasked.forward.loop.running import finish
from unmasked.forward.pooling import after_pooling, pool
from unmasked.text.passages import Window

if TYPE_CHECKING:
    from unmasked.model import TextEncoder

LONGEST = 8192
"""Maximum number of tokens of a forward, even if the model has more positions, to save memory."""
_ONE_TOKEN = ("bos_token", "eos_token")


def positions(model: TextEncoder) -> int:
    """The maximum number of tokens of a forward over a document."""
    config: Any = model.backbone.auto_model.config
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    most = model.backbone.tokens.max_length
    return max(min(known or most, LONGEST), most)


def check_pooling(model: TextEncoder) -> None:
    """Refuse pooling that takes one token of the input: all passages would have the same vector."""
    mode = model.settings.pooling_mode
    if mode in _ONE_TOKEN:
        raise DataError(
            f"pooling {mode} takes one token of the whole document, so all its passages would have "
            "the same vector. Fix: leave out --late, or use a model with pooling mean."
        )


@torch.inference_mode()
def late_vectors(
    model: TextEncoder,
    windows: Sequence[Window],
    normalize: bool = False,
    truncate_dim: int | None = None,
) -> np.ndarray:
    """(P, D) float32 vectors of the passages of all windows, window by window.

    `normalize` and `truncate_dim` are as in `TextEncoder.encode`.
    """
    backbone, device = model.backbone, model.device
    was_training = model.training
    model.eval()
    results: list[Tensor] = [torch.empty(0)] * len(windows)  # batches are in order of length
    try:
        lengths, budget = [len(w.row.ids) for w in windows], token_budget(device, backbone.dtype)
        for chosen in plan_batches(lengths, budget, apart=backbone.longest_unscaled):
            batch = [windows[i] for i in chosen]
            features = backbone.collate([window.row for window in batch])
            moved = {name: value.to(device) for name, value in features.items()}
            backbone.tokens_encoded += int(features["attention_mask"].sum())
            states = backbone({**moved, "repad": False})
            pooled = _pooled(states, batch, model.settings.pooling_mode)
            vectors = after_pooling(list(model)[2:], pooled).float()
            vectors = finish(vectors, truncate_dim, normalize).cpu()
            parts = vectors.split([len(window.spans) for window in batch])
            for place, part in zip(chosen, parts, strict=True):
                results[place] = part
    finally:
        model.train(was_training)
    return torch.cat(results).numpy()


def _pooled(states: dict[str, Any], batch: Sequence[Window], mode: str) -> Tensor:
    """(P, D) vectors of all spans of a batch of windows; a token may be in several spans.

    M is the number of tokens of all spans together.
    """
    rows, columns = states["packed_rows"], states["packed_positions"]  # (N,)
    place = torch.empty_like(states["input_ids"])  # (B, T): the packed position of each token
    place[rows, columns] = torch.arange(len(rows), device=rows.device)
    spans = [(i, *span) for i, window in enumerate(batch) for span in window.spans]
    tokens = torch.cat([place[row, start:stop] for row, start, stop in spans])  # (M,)
    lengths = torch.tensor([stop - start for _, start, stop in spans], device=rows.device)  # (P,)
    owners = torch.arange(len(spans), device=rows.device).repeat_interleave(lengths)  # (M,)
    # Weighted mean and last token need positions as if each passage were an input of its own:
    # counted from its first token, after the tokens that precede the text of an input.
    before = torch.tensor([window.row.start for window in batch for _ in window.spans])  # (P,)
    inside = torch.arange(len(tokens), device=rows.device)
    inside -= (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    places = inside + before.to(rows.device).repeat_interleave(lengths)  # (M,)
    text = torch.ones_like(places, dtype=torch.bool)
    return pool(states["packed_states"][tokens], owners, places, text, len(spans), mode)
