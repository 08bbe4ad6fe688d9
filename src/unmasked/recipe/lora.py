"""The settings of an adapter, which every stage has. Cost: none."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, model_validator

from unmasked.recipe.values import STRICT, Count, Dropout, Strings, changed_from_default


class Lora(BaseModel):
    """What is trained: low-rank adapters, unless ``method`` says otherwise."""

    model_config = STRICT

    method: Literal["lora", "dora", "qlora", "full"] = "lora"
    """``dora`` also trains the norm of each row of a weight; ``qlora`` keeps the frozen weights in
    4 bits (needs bitsandbytes); ``full`` trains all weights and no adapter, best in float32."""
    start: Literal["new", "continue"] = "new"
    """``continue`` keeps training the adapter of the stage before, as the paper does from SimCSE to
    supervised training; ``new`` merges that adapter first and starts another."""
    rank: Count = 16
    """Rank of the two matrices of an adapter."""
    alpha: Count = 32
    """The update is scaled by alpha / rank. The paper uses twice the rank."""
    dropout: Dropout = 0.05
    """Probability of dropout on the input of the adapter."""
    targets: Strings | None = None
    """Names of the linear layers with an adapter; None takes all of attention and MLP (paper)."""

    @model_validator(mode="after")
    def _no_adapter(self) -> Lora:
        unread = changed_from_default(self, "start", "rank", "alpha", "dropout", "targets")
        if self.method == "full" and unread:
            raise ValueError(
                f"method full trains all weights and no adapter, so that nothing reads {unread}. "
                "Fix: lora: {method: full}"
            )
        return self
