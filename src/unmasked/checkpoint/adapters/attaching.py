"""Makes a trunk trainable, by a LoRA or as a whole, and saves the LoRA.

Adapters are attached to the bare transformer, so their keys are those of published LLM2Vec
checkpoints (``base_model.model.layers.N...``), and the language-model head is never trained.

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
    """Attach a LoRA to a trunk and freeze the trunk (LLM2Vec, arXiv 2404.05961, appendix D).

    Args:
        model: a bare transformer.
        rank, alpha, dropout: settings of the LoRA.
        targets: names of the linear layers; None for every linear layer of the trunk.
        method: ``lora``; ``dora``, which also trains the norm of each row (arXiv 2402.09353);
            ``qlora``, with frozen weights of 4 bits (arXiv 2305.14314); ``full``, all weights and
            no adapter.

    Returns:
        The `PeftModel`; for ``full`` the model itself.

    Raises:
        ModelError: the targets match no layer, or layers that share their weights.
        MissingExtraError: bitsandbytes is needed for ``qlora`` and not installed.
    """
    if method == "full":
        return model.requires_grad_(True)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets or "all-linear",
        exclude_modules=None if targets else _unsuitable_layers(model),
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
                "PEFT supports the fused experts of this family only without dropout. "
                "Fix: lora.dropout=0, or lora.targets with the layers of attention alone."
            ) from error
        linear = sorted(
            {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        )
        raise ModelError(
            f"LoRA targets {targets} match no layer. Allowed: {', '.join(linear)}. "
            "Fix: name some of these in lora.targets, or leave it out for all of them."
        ) from error
    _check_unshared(peft_model)
    return peft_model


def _unsuitable_layers(model: nn.Module) -> list[str]:
    """Linear layers on which a LoRA has no effect, so that "all linear layers" leaves them out.

    These are routers that return more than a product, and the output projections of Mamba's mixers,
    whose kernels read the weight directly (PEFT refuses those).
    """
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            row = module.weight.new_zeros(1, module.in_features)
            if not isinstance(module(row), torch.Tensor):
                names.append(name)
        if hasattr(module, "out_proj") and isinstance(getattr(module, "conv1d", None), nn.Conv1d):
            names.append(f"{name}.out_proj")
    return names


def _check_unshared(model: nn.Module) -> None:
    """Refuse adapters on layers that share a weight: the adapters could not all be merged."""
    seen: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            weight = getattr(module.get_base_layer(), "weight", module)
            if other := seen.get(id(weight)):
                raise ModelError(
                    f"{other} and {name} share one weight, so their adapters cannot be merged. "
                    "Fix: lora.method=full, or lora.targets with other layers."
                )
            seen[id(weight)] = name


def quantize_4bit(model: nn.Module) -> None:
    """Quantize the linear layers of a trunk to 4 bits (NF4) in place, an eighth of float32.

    Only for training: the adapter is merged into the original weights later.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "qlora") from error
    layers = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]
    for name, layer in layers:
        has_bias = layer.bias is not None
        device, dtype = layer.weight.device, layer.weight.dtype
        quantized = Linear4bit(
            layer.in_features, layer.out_features, has_bias, compute_dtype=dtype, quant_type="nf4"
        )
        quantized.load_state_dict(layer.state_dict())
        # bitsandbytes quantizes a weight when it is moved to a device.
        model.set_submodule(name, quantized.to(dtype).to(device).requires_grad_(False))


def adapter_state(
    model: PeftModel, state: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The adapter's own weights under the names by which they are saved.

    Args:
        model: the model with the adapter.
        state: a state dict to take the weights from; by default, that of the model.
    """
    found = get_peft_model_state_dict(model, state, save_embedding_layers=False)
    return {name: value.detach() for name, value in found.items()}


def save_adapter(
    model: PeftModel, folder: str | Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, with the weights in `state`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    weights = {k: v.cpu().contiguous() for k, v in (state or adapter_state(model)).items()}
    save_file(weights, str(Path(folder) / WEIGHTS_NAME), metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))
    # safetensors makes its files private; give them the mode of other files
    shutil.copymode(Path(folder) / CONFIG_NAME, Path(folder) / WEIGHTS_NAME)


def check_nested(model: nn.Module) -> None:
    """Refuse a `PeftModel` around a `PeftModel` in which no adapter has an effect any more.

    PEFT replaces the first adapter by the second one, loads nothing into it, because its keys have
    changed, and only warns.

    Raises:
        ModelError: no adapter has an effect.
    """
    if not (isinstance(model, PeftModel) and isinstance(model.get_base_model(), PeftModel)):
        return
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    if factors and not any(bool(p.any()) for p in factors):
        raise ModelError(
            "neither adapter of this model has an effect: PEFT replaces the first adapter by the "
            "second and loads nothing into it. Fix: model = model.merge_and_unload() before the "
            "second PeftModel, or LLM2Vec.from_pretrained(base, [first, second])."
        )
