"""Reads saved adapters and merges them into the weights below, completely or with an error.

Merging is done in float32, layer by layer, and cast back at the end, because merging in bfloat16
changes weights by up to 4e-3. Nothing else is cast: a rotary embedding in bfloat16 loses its
positions. PEFT silently loads nothing from an adapter whose keys do not match; here that is an
error, as are truncated files and weights that are not finite. A pickled adapter is read only on
request. Cost of merging: one float32 copy of each adapted layer.
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
_UNLOAD = "unload_and_optionally_merge_module"
"""The method of those PEFT wrappers that are not layers (of an embedding, of a saved module)."""


def merge(
    model: nn.Module,
    adapters: Sequence[Location],
    allow_pickle: bool = False,
    layers: int | None = None,
) -> nn.Module:
    """Add saved adapters to the weights of a trunk, one after the other, in float32.

    Args:
        model: a bare transformer; changed and returned.
        adapters: their locations, in the order in which they were trained.
        allow_pickle: read an adapter that exists only as a pickle.
        layers: how many of the first layers the trunk has kept; None for all. The weights of an
            adapter for the other layers are left out.

    Raises:
        ModelError: there is no adapter, it is not in safetensors, or it was made for another base.
    """
    with _kept_dtypes(model):
        for adapter in adapters:
            config = read_adapter_config(adapter)
            config.inference_mode = True
            saved = _read_weights(adapter, allow_pickle)
            state = _trunk_names(saved, model, adapter.name)
            if state.keys() != saved.keys():
                _rename_targets(config, model)
            if layers is not None:
                state = _of_first_layers(state, model, layers)
            peft_model = _with_empty_adapter(model, config, adapter.name)
            load_adapter_state(peft_model, state, adapter.name)
            try:
                _merge_and_detach(model)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                raise ModelError(
                    f"{adapter.name} cannot be merged into the weights of this model: "
                    f"{first_line(error)} Fix: use an adapter without that option."
                ) from error
    return model


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters are attached, by a `PeftModel` or by the model's own `add_adapter`."""
    return isinstance(model, PeftModel) or any(map(_is_wrapper, model.modules()))


def merge_attached(model: nn.Module) -> nn.Module:
    """Add the attached adapters to the weights below them, in float32, and detach them.

    Disabled adapters are only detached.
    """
    trunk = bare(model)
    with _kept_dtypes(trunk):
        _merge_and_detach(trunk)
    return trunk


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module is PEFT's wrapper around a module that an adapter changes."""
    return isinstance(module, BaseTunerLayer) or hasattr(module, _UNLOAD)


def _merge_and_detach(trunk: nn.Module) -> None:
    """Merge the active adapters of a bare transformer in place, and restore its own modules."""
    found = [(name, module) for name, module in trunk.named_modules() if _is_wrapper(module)]
    done: list[str] = []
    for name, wrapper in found:
        if any(name.startswith(f"{outer}.") for outer in done):
            continue  # inside a wrapper that is gone already
        done.append(name)
        layer: Any = wrapper
        active = not layer.disable_adapters
        if hasattr(layer, _UNLOAD):
            own = getattr(layer, _UNLOAD)(active, False, None)  # merge, safe_merge, adapter_names
        else:
            layer.get_base_layer().float()
            if active:
                layer.merge()
            elif layer.merged:
                layer.unmerge()
            own = layer.get_base_layer()
        trunk.set_submodule(name, own)
    # `load_adapter` leaves these; with them, `save_pretrained` would write the weights under the
    # names of a model with an adapter.
    vars(trunk).pop("_weight_conversions", None)
    if names := list(getattr(trunk, "peft_config", {})):
        try:
            trunk.delete_adapter(names)  # type: ignore[operator]
        except (
            AttributeError,
            ValueError,
        ):  # a `PeftModel` had attached them, not the model itself
            del trunk.peft_config


def _with_empty_adapter(model: nn.Module, config: PeftConfig, source: str) -> PeftModel:
    """A trunk with a new adapter for a config.

    Raises:
        ModelError: PEFT cannot attach it, or it cannot be merged.
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


def _trunk_names(
    state: dict[str, torch.Tensor], model: nn.Module, source: str
) -> dict[str, torch.Tensor]:
    """An adapter's weights under the names that they have on a bare transformer.

    An adapter that was trained on the causal language model has the trunk's name in its keys.
    """
    require_finite(state, source)
    own, trunk = "base_model.model.", getattr(model, "base_model_prefix", "")
    longer = f"{own}{trunk}."
    if not trunk or hasattr(model, trunk) or not any(key.startswith(longer) for key in state):
        return state
    others = [key for key in state if not key.startswith(longer)]
    if any(hasattr(model, key.removeprefix(own).split(".")[0]) for key in others):
        return state  # names of both kinds: `load_adapter_state` reports those that do not match
    if others:
        raise ModelError(
            f"{source} was trained on the model with its head, and changes that too "
            f"({', '.join(others[:3])}), but an encoder has none. Fix: merge it into the causal "
            "language model (merge_and_unload), save that, and give its folder."
        )
    return {own + key.removeprefix(longer): value for key, value in state.items()}


def _rename_targets(config: PeftConfig, model: nn.Module) -> None:
    """Change the layer names in the config of a causal model's adapter to those of the trunk.

    ``all-linear`` on a small model, and patterns, are saved with the trunk's name in them.
    """
    settings, trunk = vars(config), f"{model.base_model_prefix}."
    if settings.get("target_modules"):
        every = [name for name, _ in model.named_modules() if name]
        targets = {name for name in every if check_target_module_exists(config, trunk + name)}
        settings["target_modules"] = targets
        # These have been applied in choosing the targets.
        for option in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if option in settings:
                settings[option] = None
    for option in ("modules_to_save", "feedforward_modules"):
        if isinstance(names := settings.get(option), list | set):
            settings[option] = [name.removeprefix(trunk) for name in names]
    for option in ("rank_pattern", "alpha_pattern"):
        if patterns := settings.get(option):
            settings[option] = {name.removeprefix(trunk): v for name, v in patterns.items()}


def _of_first_layers(
    state: dict[str, torch.Tensor], model: nn.Module, layers: int
) -> dict[str, torch.Tensor]:
    """The weights of an adapter without those of layers that the trunk does not have."""
    stack = layers_of(model, layers)
    name = next((name for name, module in model.named_modules() if module is stack), None)
    if name is None:
        return state
    layer_number = re.compile(rf"(?:^|\.){re.escape(name)}\.(\d+)\.")
    found = {key: layer_number.search(key) for key in state}
    return {key: state[key] for key, match in found.items() if not match or int(match[1]) < layers}


@contextmanager
def _kept_dtypes(model: nn.Module) -> Iterator[None]:
    """Restore the dtype of parameters that the block converts to float32."""
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
            f"{adapter.name} does not hold the weights of an adapter "
            f"({WEIGHTS_NAME} or {PICKLED_NAME}). Fix: copy or download them too."
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
        ModelError: there is none, or this version of PEFT cannot read it.
    """
    path = location.fetch(CONFIG_NAME)
    if path is None:
        raise ModelError(
            f"{location.name} does not hold an adapter ({CONFIG_NAME} is missing). "
            "Fix: give the folder that has it, or leave the adapter out."
        )
    saved = location.read_json(CONFIG_NAME)
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(Path(path).parent))
    except Exception as error:  # each kind of PEFT config checks itself in its own way
        raise ModelError(
            f"{location.name}/{CONFIG_NAME} cannot be read by this version of PEFT: "
            f"{first_line(error)} Fix: download or save it again, or update peft."
        ) from error
    if config.peft_type is None:
        raise ModelError(f"{location.name}/{CONFIG_NAME} names no peft_type. Fix: save it again.")
    if not config.base_model_name_or_path:
        config.base_model_name_or_path = saved.get("base_model_name_or_path")
    return config


def load_adapter_state(model: PeftModel, state: dict[str, torch.Tensor], source: str) -> None:
    """Load the weights of a saved adapter into the attached one.

    Args:
        model: the model with the adapter.
        state: the saved weights.
        source: the name of the saved adapter, for errors.

    Raises:
        ModelError: the weights do not match the adapter.
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
            f"resized vocabulary: {len(lines)} weights differ in shape, first "
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
    """The transformer inside any number of nested `PeftModel`s."""
    while isinstance(model, PeftModel):
        model = model.get_base_model()
    return model
