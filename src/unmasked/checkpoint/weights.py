"""Reads the weights of a checkpoint: all of them and of the right shapes, or it is an error.

transformers fills what a checkpoint lacks with random numbers and only logs it. A model of which
half is random passes every proof and encodes nonsense, so missing weights and truncated files are
errors here.

Cost: that of `from_pretrained`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModel, PretrainedConfig
from transformers.utils import logging as notes

from unmasked.checkpoint.location import Location
from unmasked.errors import ModelError, first_line

_BEHIND = "pooler."
"""Where base encoders keep what comes after the last states; it is never run."""


@contextmanager
def without_bars() -> Iterator[None]:
    """In the block, transformers draws no bars and prints no reports, unless it was told to.

    What matters in its reports is an error here. Downloads from the hub still show.
    """
    level, bars = notes.get_verbosity(), notes.is_progress_bar_enabled()
    if level < logging.WARNING:
        yield
        return
    notes.disable_progress_bar()
    notes.set_verbosity_error()
    try:
        yield
    finally:
        notes.set_verbosity(level)
        if bars:
            notes.enable_progress_bar()


def load_model(
    source: Location,
    config: PretrainedConfig,
    dtype: torch.dtype,
    attention: str | None,
    auto: Any = AutoModel,
    use_safetensors: bool | None = True,
) -> tuple[Any, list[str]]:
    """A transformer, and the names of those of its weights that the checkpoint lacks.

    Args:
        source: folder or hub repository.
        config: of the model to build.
        dtype: of the weights.
        attention: as in transformers; None lets it choose.
        auto: the auto class.
        use_safetensors: None allows pickles, too.

    Raises:
        ModelError: no weights, half a file, or weights of other shapes than the config says.
    """
    extra: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    # the auto classes look for an adapter too, and ask the hub unless they are told here as well
    asked = {k: v for k, v in source.hub.items() if k in ("cache_dir", "local_files_only")}
    try:
        with without_bars():
            model, info = auto.from_pretrained(
                source.name,
                config=config,
                dtype=dtype,
                use_safetensors=use_safetensors,
                trust_remote_code=False,
                adapter_kwargs=asked,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, by name
                **extra,
                **source.hub,
            )
    except SafetensorError as error:
        raise ModelError(
            f"{source.name}: a .safetensors file is broken ({error}). "
            "Fix: download or save it again; in a git clone, git lfs pull."
        ) from error
    except (OSError, ValueError, ImportError) as error:
        pickled = any(source.fetch(f"pytorch_model.bin{end}") for end in ("", ".index.json"))
        if "safetensors" in str(error) and not pickled:
            raise ModelError(
                f"{source.name} lacks weights: {first_line(error).rstrip('.')}. "
                "Fix: download or save it again, whole; an adapter is given as `peft`."
            ) from error
        if "safetensors" in str(error) and use_safetensors:
            raise ModelError(
                f"{source.name} has no safetensors weights, and pickled ones are not loaded: a "
                "pickle can run code. Fix: convert them, or, if you trust them, allow_pickle=True "
                f"(tensors only). ({first_line(error)})"
            ) from error
        raise source.unreadable(error) from error
    if other := sorted(info["mismatched_keys"]):
        name, there, here = other[0]
        raise ModelError(
            f"{source.name}: {len(other)} weights have other shapes than its config.json says, "
            f"first {name}: {tuple(there)} there, {tuple(here)} by the config. Fix: the "
            "config.json that was saved with these weights."
        )
    return model, sorted(info["missing_keys"])


def with_first_layers(name: str, config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy of a config that has only the first layers; the weights of the others are not read.

    Args:
        name: of the model, for errors.
        config: of a decoder.
        layers: how many to keep.

    Raises:
        ModelError: it has not so many, or its family ties their number to something else.
    """
    before: Any = config.get_text_config()
    depth = int(getattr(before, "num_hidden_layers", 0) or 0)
    if not 1 <= layers <= depth:
        raise ModelError(
            f"layers {layers}: {name} has {depth} layers, of which the first 1 to {depth} can be "
            f"kept. Fix: layers={max(1, depth // 2)}, or another number from 1 to {depth}."
        )
    cut = copy.deepcopy(config)
    text: Any = cut.get_text_config()
    for key, value in vars(before).items():
        if isinstance(value, list | tuple) and len(value) == depth:
            setattr(text, key, value[:layers])  # such as layer_types: one entry of each layer
    if shared := getattr(before, "num_kv_shared_layers", 0):  # the last ones, as Gemma 4 has them
        text.num_kv_shared_layers = max(0, shared - (depth - layers))
    try:
        text.num_hidden_layers = layers
        again = type(cut).from_dict(cut.to_dict())
        same = int(again.get_text_config().num_hidden_layers) == layers
    except Exception as error:  # each family checks its config in its own way
        raise ModelError(
            f"layers {layers}: the config of {name} cannot have fewer layers "
            f"({first_line(error)}). Fix: keep all of them."
        ) from error
    if not same:
        raise ModelError(f"layers {layers}: {name} sets their number itself. Fix: keep all.")
    return cut


def require_whole(name: str, missing: Sequence[str]) -> None:
    """Refuse a checkpoint that lacks weights which the states depend on.

    Raises:
        ModelError: it does; names the first ones.
    """
    if lacking := [key for key in missing if not key.startswith(_BEHIND)]:
        raise ModelError(
            f"{name} lacks {len(lacking)} weights of its model ({', '.join(lacking[:3])}), which "
            "would be random. Fix: download or save it again, whole; an adapter is given as `peft`."
        )


def require_finite(state: Mapping[str, torch.Tensor], source: str) -> None:
    """Refuse weights with a NaN or an infinity: vectors would be NaN, or some of them.

    Raises:
        ModelError: there are such; names the first ones.
    """
    broken = [  # a sum reads every number once, and makes no tensor of the same size
        name
        for name, value in state.items()
        if value.is_floating_point() and not bool(value.sum(dtype=torch.float32).isfinite())
    ]
    if broken:
        raise ModelError(
            f"{source}: {len(broken)} weights hold NaN or infinity ({', '.join(broken[:3])}), as "
            "those of a training that diverged. Fix: an earlier checkpoint, or download it again."
        )
