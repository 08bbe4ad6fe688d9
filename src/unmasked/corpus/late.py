"""Passages of a document, pooled from one forward over it (late chunking, arXiv 2409.04701).

A passage alone does not know what its document is about; pooled from the states of the document's
forward, it does. The tokens, the forward and the pooling are those of every text, so a document of
one passage has the vector that `encode` gives it.

Cost: one forward over the document, whose attention grows with the square of its length; beyond the
positions of the model, or `LONGEST` tokens, overlapping forwards of that length, of which a third
is computed twice.

Shapes: P passages, B inputs of a batch, T tokens of the longest, N tokens of all, D width.
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
from unmasked.forward.pooling import pool
from unmasked.text.passages import Window

if TYPE_CHECKING:
    from unmasked.model import TextEncoder

LONGEST = 8192
"""Tokens of the longest forward, whatever positions a model has: memory grows with them."""
_ONE_TOKEN = ("bos_token", "eos_token")


def positions(model: TextEncoder) -> int:
    """The most tokens of a forward over a document."""
    config: Any = model.backbone.auto_model.config
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    most = model.backbone.tokens.max_length
    return max(min(known or most, LONGEST), most)


def check_pooling(model: TextEncoder) -> None:
    """Refuse a pooling that takes one token of the whole input, so that all passages were equal."""
    mode = model.settings.pooling_mode
    if mode in _ONE_TOKEN:
        raise DataError(
            f"pooling {mode} takes one token of a whole input, which has nothing of a passage. "
            "Fix: leave out --late, or use a model with pooling mean."
        )


@torch.inference_mode()
def late_vectors(
    model: TextEncoder,
    windows: Sequence[Window],
    normalize: bool = False,
    truncate_dim: int | None = None,
) -> np.ndarray:
    """(P, D) float32 vectors of the passages of some windows, window by window.

    Args:
        model: encodes; put into evaluation mode meanwhile.
        windows: of one document or of several.
        normalize, truncate_dim: as in `TextEncoder.encode`.
    """
    backbone, device = model.backbone, model.device
    was_training = model.training
    model.eval()
    results: list[Tensor] = [torch.empty(0)] * len(windows)
    try:
        for chosen in plan_batches([len(w.row.ids) for w in windows], token_budget(device)):
            batch = [windows[i] for i in chosen]
            features = backbone.collate([window.row for window in batch])
            moved = {name: value.to(device) for name, value in features.items()}
            backbone.tokens_encoded += int(features["attention_mask"].sum())
            states = backbone({**moved, "repad": False})
            vectors = _pooled(states, batch, model.settings.pooling_mode).float()
            vectors = finish(vectors, truncate_dim, normalize).cpu()
            parts = vectors.split([len(window.spans) for window in batch])
            for place, part in zip(chosen, parts, strict=True):
                results[place] = part
    finally:
        model.train(was_training)
    return torch.cat(results).numpy()


def _pooled(states: dict[str, Any], batch: Sequence[Window], mode: str) -> Tensor:
    """(P, D) vectors of all spans of a batch of windows; a token may be in several of them."""
    rows, columns = states["packed_rows"], states["packed_positions"]  # (N,)
    place = torch.empty_like(states["input_ids"])  # (B, T): where a token is among the packed ones
    place[rows, columns] = torch.arange(len(rows), device=rows.device)
    spans = [(i, *span) for i, window in enumerate(batch) for span in window.spans]
    tokens = torch.cat([place[row, start:stop] for row, start, stop in spans])
    lengths = torch.tensor([stop - start for _, start, stop in spans], device=rows.device)
    owners = torch.arange(len(spans), device=rows.device).repeat_interleave(lengths)
    # Weighted mean and last token count from the start of a passage, as if it stood alone.
    before = torch.tensor([window.row.start for window in batch for _ in window.spans])
    inside = torch.arange(len(tokens), device=rows.device)
    inside -= (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    places = inside + before.to(rows.device).repeat_interleave(lengths)
    text = torch.ones_like(places, dtype=torch.bool)
    return pool(states["packed_states"][tokens], owners, places, text, len(spans), mode)
