"""A decoder's sizes without its weights: everything here is counted on torch's meta device.

Activations are not guessed from a formula: one forward is run on shapes alone, and what autograd
keeps for the backward pass is added up, for any family. Cost: well under a second, no memory.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from unmasked.checkpoint import adapters
from unmasked.recipe.schema import MNTP, SimCSE, Supervised

KERNEL = "unmasked-plan"
Stage = MNTP | SimCSE | Supervised


class Base:
    """The decoder's sizes, counted on the meta device."""

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype
        self.text: Any = config.get_text_config()
        self.layers = int(self.text.num_hidden_layers)
        trunk = self.trunk()
        embedding: Any = trunk.get_input_embeddings()
        self.parameters = sum(p.numel() for p in trunk.parameters())
        self.embedding = int(embedding.weight.numel())
        heads = int(getattr(self.text, "num_attention_heads", 0) or 0)
        head = getattr(self.text, "head_dim", None) or self.text.hidden_size // max(heads, 1)
        self.attention_width = heads * int(head)
        self.heads = heads
        tied = bool(getattr(self.text, "tie_word_embeddings", False))
        self.head = 0 if tied else self.embedding

    def trunk(self, layers: int | None = None, device: str = "meta") -> Any:
        """The bare transformer with random weights, perhaps of fewer layers."""
        config = _shallow(self.config, layers or self.layers)
        kernel = KERNEL if device == "meta" else None
        with torch.device(device):
            return AutoModel.from_config(
                config, dtype=self.dtype, **({"attn_implementation": kernel} if kernel else {})
            )


def attach(trunk: nn.Module, stage: Stage) -> nn.Module:
    """A trunk as a stage trains it; weights of 4 bits are left as they are."""
    lora = stage.lora
    method = "lora" if lora.method == "qlora" else lora.method
    return adapters.attach(trunk, lora.rank, lora.alpha, lora.dropout, lora.targets, method)


def saved_activations(stage: Stage, rows: int, length: int, base: Base, layers: int) -> int:
    """Bytes that autograd keeps from a forward of (rows, length) tokens, on meta tensors."""
    model = attach(base.trunk(layers), stage)
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    model.train()
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, use_cache=False)
    noise = getattr(stage, "attention_dropout", 0.0)
    weights = rows * base.heads * length * length * layers  # kept by kernels with dropout
    return sum(int(s.nbytes()) for s in kept.values()) + (weights * 9 if noise else 0)


def _shallow(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


class _Kernel(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps: its inputs, its output and a sum a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    del module
    return _Kernel.apply(query, key, value), None  # type: ignore[no-untyped-call]


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(KERNEL, _attention)
AttentionMaskInterface.register(KERNEL, _no_mask)
