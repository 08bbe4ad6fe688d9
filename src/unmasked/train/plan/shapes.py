"""A decoder's sizes without its weights, counted on torch's meta device.

Activations are not estimated by a formula: a forward is run on the meta device, and the tensors
that autograd keeps for the backward pass are added up, which works for any family. Cost: well under
a second, no memory. Compiled layers keep about half as much, because the compiler computes cheap
tensors again; to know how much, two layers are traced, which takes some 5 s (`saved_by_a_layer`).

Shapes: B rows, H heads, T tokens, D width of a head.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, PretrainedConfig

from unmasked.checkpoint import adapters
from unmasked.mask.opening import decoder_of, layers_of
from unmasked.recipe.schema import MNTP, AnyStage
from unmasked.train.losses.depth import first_layers

PARTITION = "aot_eager_decomp_partition"
"""The compiler up to the division into forward and backward, which decides what is kept."""
TRACED = 1024
"""Number of tokens with which compiled layers are traced; what they keep is proportional to it."""
KERNEL = "unmasked-plan"
"""Name under which transformers knows the attention function for the meta device."""


class DecoderSizes:
    """A decoder's sizes, from its config.

    Attributes:
        dtype: precision of the weights.
        layers, heads, width, vocabulary: as in the config; `heads` is 0 without attention.
        parameters: number of parameters of the trunk, including the input embedding.
        embedding: number of parameters of the input embedding.
        head: number of parameters of the language-model head; 0 if it is tied to the embedding.
        attention_width: number of heads times the width of a head.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype
        text: Any = config.get_text_config()
        self.layers = int(text.num_hidden_layers)
        self.width, self.vocabulary = int(text.hidden_size), int(text.vocab_size)
        self.heads = int(getattr(text, "num_attention_heads", 0) or 0)
        head = getattr(text, "head_dim", None) or self.width // max(self.heads, 1)
        self.attention_width = self.heads * int(head)
        trunk = self.trunk()
        self.parameters = sum(p.numel() for p in trunk.parameters())
        self.embedding = int(trunk.get_input_embeddings().weight.numel())
        self.head = 0 if getattr(text, "tie_word_embeddings", False) else self.embedding

    def trunk(self, layers: int | None = None, device: str = "meta") -> Any:
        """The bare transformer with random weights; `layers` limits its depth."""
        config = copy.deepcopy(self.config)
        text: Any = config.get_text_config()
        text.num_hidden_layers = layers or self.layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
        attention = {"attn_implementation": KERNEL} if device == "meta" else {}
        with torch.device(device):
            return AutoModel.from_config(config, dtype=self.dtype, **attention)


def trained_trunk(trunk: nn.Module, stage: AnyStage) -> nn.Module:
    """A trunk as a stage trains it; with ``qlora`` too, its weights keep their precision here."""
    lora = stage.lora
    method = "lora" if lora.method == "qlora" else lora.method
    return adapters.attach(trunk, lora.rank, lora.alpha, lora.dropout, lora.targets, method)


def saved_activations(
    model: nn.Module, rows: int, length: int, device: str | torch.device = "meta"
) -> int:
    """Bytes that autograd keeps from a forward of (rows, length) tokens of a model there."""
    own = {p.untyped_storage() for p in [*model.parameters(), *model.buffers()]}
    kept: set[torch.UntypedStorage] = set()  # a living storage has one object, so sets work

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage())
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.int64, device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept - own)


def saved_by_a_layer(sizes: DecoderSizes, stage: AnyStage, device: torch.device) -> float:
    """Bytes per token that autograd keeps of one compiled layer, as it is trained on a device.

    The compiler's own division into forward and backward is applied to two layers with weights of
    no meaning; no kernels are made. It needs the weights of two layers and of the embedding.
    """
    model: Any = trained_trunk(sizes.trunk(2), stage).to_empty(device=device).train()
    decoder = decoder_of(model)
    if stage.lora.method != "full":  # as in training, so that all layers are alike
        decoder.enable_input_require_grads()
    for layer in layers_of(decoder, 2):
        layer.compile(dynamic=False, backend=PARTITION)
    length = min(stage.block_length if isinstance(stage, MNTP) else stage.max_length, TRACED)
    rows = max(1, TRACED // length)
    lower = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    with lower, torch.random.fork_rng():
        both = saved_activations(model, rows, length, device)
        with first_layers(decoder, 1):
            one = saved_activations(model, rows, length, device)
    return (both - one) / (rows * length)


class _Kernel(torch.autograd.Function):
    """Saves for backward what fused attention kernels save: inputs, output and a sum per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)  # (B, H, T, D)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)  # (B, H, T)
        ctx.save_for_backward(query, key, value, out, sums)
        return out.transpose(1, 2)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    return _Kernel.apply(query, key, value), None  # type: ignore[no-untyped-call]


AttentionInterface.register(KERNEL, _attention)
# No mask function is registered, on purpose: then transformers builds no mask. For Gemma 3 it would
# look for packed texts in the values of the positions, which the meta device does not have.
