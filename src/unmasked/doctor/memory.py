"""How much memory encoding and training take."""

from __future__ import annotations

from typing import Any

import torch

from unmasked.errors import UnmaskedError
from unmasked.forward.batches import token_budget


def to_encode(config: Any, parameters: int, dtype: torch.dtype, device: torch.device) -> str:
    """Weights, and a forward of as many tokens as are batched: an estimate."""
    text, tokens = config.get_text_config(), token_budget(device)
    width = int(text.hidden_size)
    inner = getattr(text, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * width
    live = tokens * (6 * width + 2 * inner) * dtype.itemsize  # states, queries to values, MLP
    weights = parameters * dtype.itemsize
    return f"{_size(weights + live)} ({_size(weights)} of weights, {tokens:,} tokens a forward)"


def to_train(name: str) -> str:
    """MNTP with LoRA as the default recipe has it, counted on the meta device."""
    from unmasked.recipe.schema import Recipe
    from unmasked.train.plan.cost import make_plan

    given = {"name": "plan", "model": {"base": name}, "mntp": {"data": "-"}}
    try:
        stage = make_plan(Recipe.model_validate(given)).stages[0]
    except (UnmaskedError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        return f"not counted ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
    return f"{_size(stage.memory.total)} (MNTP, LoRA, {stage.shape.tokens:,} tokens a forward)"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
