"""Adapters that were attached when an encoder was saved, beside the weights they are merged into.

The trainer of sentence-transformers goes on from a checkpoint by loading it anew, and its state
dict into the model that is trained. A saved folder has the adapters merged; to train on exactly as
before, their own weights are needed as well. They lie in a folder that no loader of models reads.

Cost: saving writes them once; loading below an attached adapter merges a copy, to be sure that the
weights below are those they were trained on.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unmasked.checkpoint.adapters.merging import has_adapters, merge_attached
from unmasked.checkpoint.location import Location
from unmasked.errors import ModelError

logger = logging.getLogger(__name__)

FOLDER = "attached"
"""Where they lie in a saved folder."""
_WEIGHTS = f"{FOLDER}/adapters.safetensors"
_SAVED = "saved_in"
"""The attribute of a state dict that says where the encoder was loaded from."""
_EXACT = 1e-5  # of the length of a weight; products differ that much between devices


def attached_weights(trunk: nn.Module, merged: nn.Module) -> dict[str, Tensor]:
    """The adapters' own weights by their name in a trunk; none where no adapter acts.

    Args:
        trunk: a transformer, perhaps with adapters.
        merged: the bare one, in which they are merged.
    """
    off = (getattr(module, "disable_adapters", False) is True for module in trunk.modules())
    if not has_adapters(trunk) or any(off):
        return {}
    own, plain = trunk.state_dict(), merged.state_dict().keys()
    return {key: value for key, value in own.items() if _plain(key) not in plain}


def write_attached(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write what `attached_weights` gave into a folder that is saved."""
    if weights:
        (folder / FOLDER).mkdir()
        copies = {key: value.detach().cpu().clone().contiguous() for key, value in weights.items()}
        save_file(copies, folder / _WEIGHTS)


def remember(encoder: Any, saved: Location) -> None:
    """From now on a state dict of the encoder says where its weights were loaded from."""
    encoder.register_state_dict_post_hook(partial(_say_where, saved))


def _say_where(saved: Location, _: Any, state: Any, prefix: str, __: Any) -> None:
    if not prefix:
        setattr(state, _SAVED, saved)


def below_adapters(encoder: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict to load where a saved folder, in which adapters are merged, is loaded back.

    With an adapter attached, the folder's own adapter goes into it, if together with the weights
    below it gives the weights of the folder. If it does not, or the folder has none, what the
    folder holds goes into the weights below, and a LoRA begins anew, so that the vectors are those
    of the folder.

    Raises:
        ModelError: adapters of another kind would have to begin anew.
    """
    own, trunk = encoder.state_dict(), encoder.backbone.auto_model
    if not has_adapters(trunk) or own.keys() <= state.keys():
        return state
    prefix = _prefix(encoder)
    saved: Location | None = getattr(state, _SAVED, None)
    if saved is not None and (path := saved.fetch(_WEIGHTS)):
        attached = load_file(path)
        if _gives(trunk, attached, {k.removeprefix(prefix): v for k, v in state.items()}):
            return {**own, **{prefix + key: value for key, value in attached.items()}}
    found = {}
    for key, value in own.items():
        inside = key.startswith(prefix)
        plain = prefix + _plain(key.removeprefix(prefix)) if inside else key
        if plain in state:
            found[key] = state[plain]
        elif ".lora_A." in key:
            found[key] = value
        elif ".lora_B." in key:
            found[key] = torch.zeros_like(value)
        else:
            raise ModelError(
                f"a saved encoder cannot be loaded below this adapter ({key}): only plain LoRA "
                "begins anew. Fix: load the folder, and attach a new adapter to it."
            )
    logger.warning("The adapter of this checkpoint is merged; training goes on with a new one.")
    return found


def _prefix(encoder: Any) -> str:
    """What stands before the names of a trunk's weights in those of its encoder."""
    names = {id(module): name for name, module in encoder.named_children()}
    return f"{names[id(encoder.backbone)]}.auto_model."


def _gives(trunk: nn.Module, attached: Mapping[str, Tensor], state: Mapping[str, Any]) -> bool:
    """Whether these adapters, on the weights that a trunk has, give those of a folder."""
    own = {key: value for key, value in trunk.state_dict().items() if _plain(key) not in state}
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in attached.items()}:
        return False
    trial = copy.deepcopy(trunk)
    trial.load_state_dict(attached, strict=False)
    merged = merge_attached(trial).state_dict()
    return all(_same(value, state.get(key)) for key, value in merged.items())


def _same(found: Tensor, wanted: Tensor | None) -> bool:
    if wanted is None or found.shape != wanted.shape:
        return False
    allowed = max(_EXACT, 4 * torch.finfo(found.dtype).eps) if found.is_floating_point() else 0.0
    expected = wanted.to(found.device).double()
    return bool((found.double() - expected).norm() <= allowed * expected.norm())


def _plain(key: str) -> str:
    """The name that a weight of a trunk has where no adapter is attached."""
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")
