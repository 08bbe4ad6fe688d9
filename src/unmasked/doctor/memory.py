"""Estimates how much memory encoding and training take."""

from __future__ import annotations

from typing import Any

import torch

from unmasked.errors import UnmaskedError, first_line
from unmasked.forward.batches import token_budget
from unmasked.recipe.schema import Recipe
from unmasked.train.plan.cost import make_plan


def estimates(name: str, whole: Any, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """The memory that encoding takes with a model (perhaps on the meta device), and training it."""
    text, tokens = whole.config.get_text_config(), token_budget(device, dtype)
    width = int(text.hidden_size)
    inner = getattr(text, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * width
    # Per token: hidden states, queries, keys and values; and two tensors inside the MLP.
    live = tokens * (6 * width + 2 * inner) * dtype.itemsize
    weights = sum(p.numel() for p in whole.parameters()) * dtype.itemsize
    encode = f"{_size(weights + live)} ({_size(weights)} of weights, {tokens:,} tokens per forward)"
    return {"memory_to_encode": encode, "memory_to_train": _to_train(name)}


def _to_train(name: str) -> str:
    """MNTP with the default LoRA settings, computed without weights, on the meta device."""
    given = {"name": "plan", "model": {"base": name}, "mntp": {"data": "-"}}
    try:
        stage = make_plan(Recipe.model_validate(given)).stages[0]
    except (UnmaskedError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        return f"not counted ({type(error).__name__}: {first_line(error)[:80]})"
    return f"{_size(stage.memory.total)} (MNTP, LoRA, {stage.tokens:,} tokens per forward)"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
