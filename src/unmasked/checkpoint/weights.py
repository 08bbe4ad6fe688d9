"""Reads the weights of a checkpoint; missing weights and wrong shapes are errors.

transformers fills missing weights with random numbers and only logs it. A model with random weights
passes every proof and encodes nonsense, so missing weights and truncated files are errors here.

Cost: that of `from_pretrained`.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModel, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging as notes

from unmasked.checkpoint.location import Location
from unmasked.errors import ModelError, first_line, unknown
from unmasked.text.inputs import is_count

_NEVER_RUN = "pooler."
"""Prefix of weights that base encoders use after the last states; we never run them."""


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside the block, transformers shows no progress bars and reports, unless it is verbose.

    What matters in its reports is an error here. Downloads from the hub are still shown.
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
    """A transformer, and the names of its weights that the checkpoint lacks.

    Args:
        source: folder or hub repository.
        config: the config of the model to build.
        dtype: the dtype of the weights.
        attention: as in transformers; None lets it choose.
        auto: the auto class.
        use_safetensors: None also allows pickles.

    Raises:
        ModelError: no weights, a truncated file, shapes that differ from the config, or a config
            of which no model can be built.
    """
    extra: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    # The auto classes also look for an adapter, and ask the hub for it without these options.
    adapter_options = {
        key: source.hub[key] for key in ("cache_dir", "local_files_only") if key in source.hub
    }
    try:
        with without_bars():
            model, info = auto.from_pretrained(
                source.name,
                config=config,
                dtype=dtype,
                use_safetensors=use_safetensors,
                trust_remote_code=False,
                adapter_kwargs=adapter_options,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are an error below, with their names
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
    except Exception as error:  # each family builds its layers from the config in its own way
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "memory" in str(error):
            raise
        raise faulty_config(source, error) from error
    if mismatched := sorted(info["mismatched_keys"]):
        name, saved, built = mismatched[0]
        raise ModelError(
            f"{source.name}: {len(mismatched)} weights have other shapes than its config.json "
            f"says, first {name}: {tuple(saved)} in the file, {tuple(built)} by the config. Fix: "
            "use the config.json that was saved with these weights."
        )
    return model, sorted(info["missing_keys"])


def faulty_config(source: Location, error: Exception) -> ModelError:
    """The error for a config.json with which transformers cannot build a model.

    transformers names the value in some of its errors; in others it is looked up in the file.
    """
    given = list(_values(source.read_json("config.json")))
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        named = [(key, value) for key, value in given if error.args and value == error.args[0]]
        said = f"{type(error).__name__} {said}"
        for key, value in named[:1]:
            known = ROPE_INIT_FUNCTIONS if "rope" in key else ACT2FN if "act" in key else {}
            said = unknown(key, str(value), known) if known else f"{key} {value!r} is not known"
            said = said.partition(" Fix: ")[0]
    elif "negative dimension" in said:
        named = [(k, v) for k, v in given if isinstance(v, int) and v < 0 and f"{v}" in said]
        if named:
            wrong = ", ".join(f"{key} {value}" for key, value in named)
            said = f"{wrong} is not a whole number of 1 or more"
    return ModelError(
        f"{source.name}/config.json: transformers {transformers.__version__} cannot build a model "
        f"with it: {said.rstrip('.')}. Fix: correct the value, or use the config.json that was "
        "saved with these weights."
    )


def _values(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a config with its name, such as ``rope_scaling.type``."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _values(value, f"{above}{name}.")
        else:
            yield above + name, value


def with_first_layers(name: str, config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy of a config with only the first layers; the weights of the others are not read.

    Args:
        name: name of the model, for errors.
        config: the config of a decoder.
        layers: how many layers to keep.

    Raises:
        ModelError: it has fewer layers, or its family derives their number from something else.
    """
    full: Any = config.get_text_config()
    depth = int(getattr(full, "num_hidden_layers", 0) or 0)
    if not is_count(layers) or layers > depth:
        raise ModelError(
            f"layers {layers!r}: {name} has {depth} layers, of which the first 1 to {depth} can be "
            f"kept. Fix: layers={max(1, depth // 2)}, or another number from 1 to {depth}."
        )
    cut = copy.deepcopy(config)
    text: Any = cut.get_text_config()
    for key, value in vars(full).items():
        if isinstance(value, list | tuple) and len(value) == depth:
            setattr(text, key, value[:layers])  # such as layer_types, with an entry for each layer
    if shared := getattr(full, "num_kv_shared_layers", 0):  # in Gemma 4, the last layers
        text.num_kv_shared_layers = max(0, shared - (depth - layers))
    try:
        text.num_hidden_layers = layers
        saved = type(cut).from_dict(cut.to_dict())
        is_kept = int(saved.get_text_config().num_hidden_layers) == layers
    except Exception as error:  # each family checks its config in its own way
        raise ModelError(
            f"layers {layers}: the config of {name} cannot have fewer layers "
            f"({first_line(error)}). Fix: keep all of them."
        ) from error
    if not is_kept:
        raise ModelError(f"layers {layers}: {name} sets their number itself. Fix: keep all.")
    return cut


def require_whole(name: str, missing: Sequence[str]) -> None:
    """Refuse a checkpoint that lacks weights on which the states depend.

    Raises:
        ModelError: weights are missing; the message names the first ones.
    """
    if lacking := [key for key in missing if not key.startswith(_NEVER_RUN)]:
        raise ModelError(
            f"{name} lacks {len(lacking)} weights of its model ({', '.join(lacking[:3])}), which "
            "would be random. Fix: download or save it again, whole; an adapter is given as `peft`."
        )


def require_finite(state: Mapping[str, torch.Tensor], source: str) -> None:
    """Refuse weights with NaN or infinity, with which all or some vectors would be NaN.

    Raises:
        ModelError: there are such weights; the message names the first ones.
    """
    broken = [  # a sum is not finite if a number is not, and needs no second tensor of that size
        name
        for name, value in state.items()
        if value.is_floating_point() and not bool(value.sum(dtype=torch.float32).isfinite())
    ]
    if broken:
        raise ModelError(
            f"{source}: {len(broken)} weights hold NaN or infinity ({', '.join(broken[:3])}), as "
            "after a diverged training. Fix: use an earlier checkpoint, or download it again."
        )


def share_weights(folder: Path) -> None:
    """Give the weights the file mode of the other files; safetensors makes them private."""
    for weights in folder.glob("*.safetensors"):
        other = next(file for file in folder.iterdir() if file.suffix == ".json")
        shutil.copymode(other, weights)
