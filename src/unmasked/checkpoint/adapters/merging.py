"""Reads saved adapters and makes them part of the weights below: all of an adapter, or an error.

Merging is done in float32, layer by layer, and cast back at the end, because merging in bfloat16
moves weights by up to 4e-3. Nothing else is cast: a rotary embedding in bfloat16 loses its
positions. PEFT silently loads nothing from an adapter whose keys do not fit; here that is an error,
as are weights that are cut short or not finite. A pickled adapter is read only where it is asked
for. Cost of merging: one float32 copy of each adapted layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from unmasked.checkpoint.adapters.attaching import CONFIG_NAME, WEIGHTS_NAME, adapter_state
from unmasked.checkpoint.location import Location
from unmasked.checkpoint.weights import require_finite
from unmasked.errors import ModelError, first_line
from unmasked.mask.opening import layers_of

PICKLED_NAME = "adapter_model.bin"
_TAKES_ITSELF_OFF = "unload_and_optionally_merge_module"
"""The method of those wrappers of PEFT that are no layers (of an embedding, a saved module)."""


def merge(
    model: nn.Module,
    adapters: Sequence[Location],
    allow_pickle: bool = False,
    layers: int | None = None,
) -> nn.Module:
    """Add saved adapters to the weights of a trunk, one after the other, in float32.

    Args:
        model: a bare transformer; changed and returned.
        adapters: where they are, in the order they were trained.
        allow_pickle: read an adapter that is there as a pickle only.
        layers: how many first layers were kept of the trunk; None for all. What an adapter has for
            the others is left out with them.

    Raises:
        ModelError: no adapter there, not safetensors, or made for another base.
    """
    with _kept_dtypes(model):
        for adapter in adapters:
            config = read_adapter_config(adapter)
            config.inference_mode = True
            saved = _read_weights(adapter, allow_pickle)
            state = _of_trunk(saved, model, adapter.name)
            if state.keys() != saved.keys():
                _aim_at_trunk(config, model)
            if layers is not None:
                state = _of_layers(state, model, layers)
            peft_model = _wrapped(model, config, adapter.name)
            load_adapter_state(peft_model, state, adapter.name)
            try:
                _take_off(model)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                raise ModelError(
                    f"{adapter.name} cannot become part of the weights of this model: "
                    f"{first_line(error)} Fix: an adapter without that option."
                ) from error
    return model


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters are attached, by a `PeftModel` or by the model's own `add_adapter`."""
    return isinstance(model, PeftModel) or any(map(_is_wrapper, model.modules()))


def merge_attached(model: nn.Module) -> nn.Module:
    """Add the attached adapters to the weights below them, in float32, and take them off.

    Adapters that are switched off are only taken off.
    """
    trunk = bare(model)
    with _kept_dtypes(trunk):
        _take_off(trunk)
    return trunk


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module stands in the place of one that an adapter changes."""
    return isinstance(module, BaseTunerLayer) or hasattr(module, _TAKES_ITSELF_OFF)


def _take_off(trunk: nn.Module) -> None:
    """Merge the active adapters of a bare transformer in place, and put its own modules back."""
    found = [(name, module) for name, module in trunk.named_modules() if _is_wrapper(module)]
    done: list[str] = []
    for name, wrapper in found:
        if any(name.startswith(f"{outer}.") for outer in done):
            continue
        done.append(name)
        layer: Any = wrapper
        active = not layer.disable_adapters
        if hasattr(layer, _TAKES_ITSELF_OFF):
            own = getattr(layer, _TAKES_ITSELF_OFF)(active, False, None)
        else:
            layer.get_base_layer().float()
            if active:
                layer.merge()
            elif layer.merged:
                layer.unmerge()
            own = layer.get_base_layer()
        trunk.set_submodule(name, own)
    # what load_adapter leaves: names under which `save_pretrained` would write the whole model
    vars(trunk).pop("_weight_conversions", None)
    if names := list(getattr(trunk, "peft_config", {})):
        try:
            trunk.delete_adapter(names)  # type: ignore[operator]
        except (AttributeError, ValueError):  # it has none of its own: a PeftModel attached them
            del trunk.peft_config


def _wrapped(model: nn.Module, config: PeftConfig, source: str) -> PeftModel:
    """A trunk with an empty adapter of a config.

    Raises:
        ModelError: PEFT cannot attach it, or it cannot become part of the weights.
    """
    if config.is_prompt_learning:
        raise ModelError(
            f"{source} is {_kind(config)}: it puts trained tokens before every text and "
            "changes no weight, so there is nothing to merge. Fix: an adapter such as LoRA."
        )
    try:
        peft_model = PeftModel(model, config)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ModelError(
            f"{source}: PEFT cannot attach this {_kind(config)} to this model: "
            f"{first_line(error)} Fix: merge it into the model that it was trained on "
            "(merge_and_unload), save that, and give its folder."
        ) from error
    return peft_model


def _kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _of_trunk(
    state: dict[str, torch.Tensor], model: nn.Module, source: str
) -> dict[str, torch.Tensor]:
    """Weights under the names that they have on a bare transformer.

    An adapter that was trained on the causal language model has the trunk's name in its keys.
    """
    require_finite(state, source)
    own, trunk = "base_model.model.", getattr(model, "base_model_prefix", "")
    longer = f"{own}{trunk}."
    if not trunk or hasattr(model, trunk) or not any(key.startswith(longer) for key in state):
        return state
    others = [key for key in state if not key.startswith(longer)]
    if any(hasattr(model, key.removeprefix(own).split(".")[0]) for key in others):
        return state  # names of both kinds: `load_adapter_state` says which do not fit
    if heads := others:
        raise ModelError(
            f"{source} was trained on the model with its head, and changes that too "
            f"({', '.join(heads[:3])}), but an encoder has none. Fix: merge it into the causal "
            "language model (merge_and_unload), save that, and give its folder."
        )
    return {own + key.removeprefix(longer): value for key, value in state.items()}


def _aim_at_trunk(config: PeftConfig, model: nn.Module) -> None:
    """Name the layers of an adapter of the causal language model as the bare transformer has them.

    ``all-linear`` on a small model, and patterns, are saved with the trunk's name in them.
    """
    settings, trunk = vars(config), f"{model.base_model_prefix}."
    if settings.get("target_modules"):
        every = [name for name, _ in model.named_modules() if name]
        aimed = {name for name in every if check_target_module_exists(config, trunk + name)}
        left = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        settings |= {"target_modules": aimed} | {k: v for k, v in left.items() if k in settings}
    for option in ("modules_to_save", "feedforward_modules"):
        if isinstance(names := settings.get(option), list | set):
            settings[option] = [name.removeprefix(trunk) for name in names]
    for option in ("rank_pattern", "alpha_pattern"):
        if found := settings.get(option):
            settings[option] = {name.removeprefix(trunk): v for name, v in found.items()}


def _of_layers(
    state: dict[str, torch.Tensor], model: nn.Module, layers: int
) -> dict[str, torch.Tensor]:
    """The weights of an adapter without those of layers that the trunk does not have."""
    stack = layers_of(model, layers)
    name = next((name for name, module in model.named_modules() if module is stack), None)
    if name is None:
        return state
    behind = re.compile(rf"(?:^|\.){re.escape(name)}\.(\d+)\.")
    found = {key: behind.search(key) for key in state}
    return {key: state[key] for key, match in found.items() if not match or int(match[1]) < layers}


@contextmanager
def _kept_dtypes(model: nn.Module) -> Iterator[None]:
    """Parameters that the block makes float32 get the dtype back that they had."""
    before = {id(p): p.dtype for p in model.parameters()}
    yield
    for parameter in model.parameters():
        dtype = before.get(id(parameter), parameter.dtype)
        parameter.data = parameter.data.to(dtype)


def _read_weights(adapter: Location, allow_pickle: bool) -> dict[str, torch.Tensor]:
    if path := adapter.fetch(WEIGHTS_NAME):
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{adapter.name}/{WEIGHTS_NAME} is broken ({first_line(error)}). "
                "Fix: download or save it again."
            ) from error
    if not allow_pickle:
        raise ModelError(
            f"{adapter.name} has no {WEIGHTS_NAME}. Pickled adapters are not loaded: a pickle can "
            "run code. Fix: convert it to safetensors, or, if you trust it, allow_pickle=True "
            f"(reads {PICKLED_NAME}, tensors only)."
        )
    path = adapter.fetch(PICKLED_NAME)
    if path is None:
        raise ModelError(
            f"{adapter.name} does not hold the weights of an adapter. "
            f"Looked for: {WEIGHTS_NAME}, {PICKLED_NAME}. Fix: copy or download them too."
        )
    try:
        weights: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickles fail in many ways
        raise ModelError(
            f"{adapter.name}/{PICKLED_NAME} is broken, or holds more than tensors "
            f"({first_line(error)}). Fix: download it again."
        ) from error
    return weights


def is_adapter(location: Location) -> bool:
    """Whether a folder or hub repository holds an adapter."""
    return location.fetch(CONFIG_NAME) is not None


def read_adapter_config(location: Location) -> PeftConfig:
    """The `adapter_config.json` of a folder or hub repository.

    Raises:
        ModelError: it has none.
    """
    path = location.fetch(CONFIG_NAME)
    if path is None:
        raise ModelError(
            f"{location.name} does not hold an adapter ({CONFIG_NAME} is missing). "
            "Fix: give the folder that has it, or leave the adapter out."
        )
    stated = location.read_json(CONFIG_NAME)
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(Path(path).parent))
    except Exception as error:  # PEFT checks by building, each kind in its own way
        raise ModelError(
            f"{location.name}/{CONFIG_NAME} is not one that this version of PEFT reads: "
            f"{first_line(error)} Fix: download or save it again, or update peft."
        ) from error
    if config.peft_type is None:
        raise ModelError(f"{location.name}/{CONFIG_NAME} names no peft_type. Fix: save it again.")
    if not config.base_model_name_or_path:
        config.base_model_name_or_path = stated.get("base_model_name_or_path")
    return config


def load_adapter_state(model: PeftModel, state: dict[str, torch.Tensor], source: str) -> None:
    """Put the weights of a saved adapter into the one that is attached.

    Raises:
        ModelError: they do not fit; names `source`, where they are from.
    """
    base = model.peft_config["default"].base_model_name_or_path
    missing = sorted(set(adapter_state(model)) - state.keys())
    unexpected: list[str] = []
    try:
        if not missing:
            result: Any = set_peft_model_state_dict(model, state)
            unexpected = list(result.unexpected_keys)
    except (RuntimeError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise ModelError(
            f"the adapter {source} was made for another base ({base}), or for this one with a "
            f"vocabulary that was resized: {len(lines)} weights differ in shape, first "
            f"{lines[0] if lines else error} Fix: load it on that base; if its vocabulary was "
            "resized, merge it there (merge_and_unload), save that, and give its folder."
        ) from error
    if missing or unexpected:
        raise ModelError(
            f"the adapter {source} does not fit this model: {len(missing)} weights missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} unexpected "
            f"({', '.join(unexpected[:3])}). It was made for {base}. Fix: load it on that base, or "
            "download it again, whole."
        )


def bare(model: nn.Module) -> nn.Module:
    """The transformer inside however many `PeftModel`s."""
    while isinstance(model, PeftModel):
        model = model.get_base_model()
    return model
