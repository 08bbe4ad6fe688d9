"""Puts on a trunk what trains: a LoRA, or the whole of it; and saves the LoRA.

Adapters sit on the bare transformer, so their keys are those of published LLM2Vec checkpoints
(``base_model.model.layers.N...``), and the language-model head is never trained.

Cost: that of PEFT.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

from unmasked.errors import MissingExtraError, ModelError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def attach(
    model: nn.Module,
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.05,
    targets: list[str] | None = None,
    method: str = "lora",
) -> nn.Module:
    """Make a trunk trainable: freeze it under a LoRA (LLM2Vec, arXiv 2404.05961, appendix D).

    Args:
        model: a bare transformer.
        rank, alpha, dropout: of the LoRA.
        targets: names of the linear layers; None for every linear layer of the trunk.
        method: ``lora``; ``dora``, which also trains the length of each row (arXiv 2402.09353);
            ``qlora``, over weights of 4 bits (arXiv 2305.14314); ``full``, every weight and no
            adapter.

    Returns:
        The `PeftModel`; for ``full`` the model itself.

    Raises:
        ModelError: the targets fit no layer, or layers that share their weights.
        MissingExtraError: no bitsandbytes for ``qlora``.
    """
    if method == "full":
        return model.requires_grad_(True)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets or "all-linear",
        exclude_modules=None if targets else _left_out(model),
        bias="none",
        use_dora=method == "dora",
    )
    if method == "qlora":
        quantize_4bit(model)
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        if "lora_dropout" in str(error):
            raise ModelError(
                "PEFT adapts the fused experts of this family, and without dropout only. "
                "Fix: lora.dropout=0, or lora.targets with the layers of attention alone."
            ) from error
        linear = sorted(
            {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        )
        raise ModelError(
            f"LoRA targets {targets} fit no layer. Allowed: {', '.join(linear)}. "
            "Fix: name some of these in lora.targets, or leave it out for all of them."
        ) from error
    _check_unshared(peft_model)
    return peft_model


def _left_out(model: nn.Module) -> list[str]:
    """Linear layers that "every linear layer" does not mean: a LoRA does not act on them.

    Routers that return more than a product, and the way out of Mamba's mixers, whose kernels read
    the weight itself (PEFT refuses those).
    """
    left_out = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            row = module.weight.new_zeros(1, module.in_features)
            if not isinstance(module(row), torch.Tensor):
                left_out.append(name)
        if hasattr(module, "out_proj") and isinstance(getattr(module, "conv1d", None), nn.Conv1d):
            left_out.append(f"{name}.out_proj")
    return left_out


def _check_unshared(model: nn.Module) -> None:
    """Refuse adapters on layers that share a weight: it cannot take the sum of each of them."""
    seen: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            weight = getattr(module.get_base_layer(), "weight", module)
            if other := seen.get(id(weight)):
                raise ModelError(
                    f"{other} and {name} share one weight, so that their adapters cannot be "
                    "merged. Fix: lora.method=full, or lora.targets with other layers."
                )
            seen[id(weight)] = name


def quantize_4bit(model: nn.Module) -> None:
    """Put the linear layers of a trunk into 4 bits (NF4) in place, an eighth of float32.

    Only for training: the adapter is merged into the weights as they were.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "qlora") from error
    layers = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]
    for name, layer in layers:
        bias = layer.bias is not None
        device, dtype = layer.weight.device, layer.weight.dtype
        packed = Linear4bit(
            layer.in_features, layer.out_features, bias, compute_dtype=dtype, quant_type="nf4"
        )
        packed.load_state_dict(layer.state_dict())
        model.set_submodule(name, packed.to(dtype).to(device).requires_grad_(False))


def adapter_state(
    model: PeftModel, state: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The adapter's own weights under the names they are saved by.

    Args:
        model: what they are attached to.
        state: where to take them from, the `state_dict` of the model by default.
    """
    found = get_peft_model_state_dict(model, state, save_embedding_layers=False)
    return {name: value.detach() for name, value in found.items()}


def save_adapter(
    model: PeftModel, folder: str | Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, the latter from `state`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    weights = {k: v.cpu().contiguous() for k, v in (state or adapter_state(model)).items()}
    save_file(weights, str(Path(folder) / WEIGHTS_NAME), metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))
    # safetensors makes its files private
    shutil.copymode(Path(folder) / CONFIG_NAME, Path(folder) / WEIGHTS_NAME)


def check_nested(model: nn.Module) -> None:
    """Refuse a `PeftModel` around a `PeftModel` in which no adapter acts any more.

    PEFT puts the second adapter in the place of the first, loads nothing into it, because its keys
    are now others, and only warns.

    Raises:
        ModelError: no adapter has any effect.
    """
    if not (isinstance(model, PeftModel) and isinstance(model.get_base_model(), PeftModel)):
        return
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    if factors and not any(bool(p.any()) for p in factors):
        raise ModelError(
            "neither adapter of this model acts: PEFT puts a second adapter in the place of the "
            "first and loads nothing into it. Fix: model = model.merge_and_unload() before the "
            "second PeftModel, or LLM2Vec.from_pretrained(base, [first, second])."
        )
