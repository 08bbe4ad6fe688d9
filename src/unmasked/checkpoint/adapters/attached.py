"""Saves the adapters of an encoder beside the merged weights, so that training can continue.

To resume, the trainer of sentence-transformers loads the checkpoint as a new model, and then the
state dict of that into the model that is trained. A saved folder has the adapters merged; to
continue training exactly, their own weights are needed too. They are saved in a subfolder that no
loader of models reads.

Cost: saving writes them once; loading them merges a copy, to be sure that the weights below them
are those they were trained on.
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
"""The subfolder of a saved folder in which the adapters are."""
_WEIGHTS = f"{FOLDER}/adapters.safetensors"
_SAVED = "saved_in"
"""An attribute of a state dict: the name and the revision from which the encoder was loaded.

Strings only: `torch.load` refuses other objects, and the token of a hub has no place in a file."""
_EXACT = 1e-5  # relative to the norm of a weight; products differ that much between devices


def attached_weights(trunk: nn.Module, merged: nn.Module) -> dict[str, Tensor]:
    """The adapters' own weights by their name in a trunk; empty if no adapter is active.

    Args:
        trunk: a transformer, perhaps with adapters.
        merged: the bare transformer with the adapters merged.
    """
    disabled = (getattr(module, "disable_adapters", False) is True for module in trunk.modules())
    if not has_adapters(trunk) or any(disabled):
        return {}
    own, bare = trunk.state_dict(), merged.state_dict().keys()
    return {key: value for key, value in own.items() if _bare_name(key) not in bare}


def write_attached(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the result of `attached_weights` into a folder."""
    if weights:
        (folder / FOLDER).mkdir()
        copies = {key: value.detach().cpu().clone().contiguous() for key, value in weights.items()}
        save_file(copies, folder / _WEIGHTS)


def remember(encoder: Any, saved: Location) -> None:
    """Make every later state dict of the encoder name the location from which it was loaded."""
    encoder.register_state_dict_post_hook(partial(_name_location, saved))


def _name_location(saved: Location, _: Any, state: Any, prefix: str, __: Any) -> None:
    if not prefix:  # the state dict of the encoder itself, not of a module around it
        setattr(state, _SAVED, [saved.name, saved.hub.get("revision")])


def below_adapters(encoder: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict to load into an encoder with adapters, from one with merged adapters.

    If the folder that `state` comes from has saved its adapters, and they give the merged weights
    together with the weights below, they are loaded into the attached ones. Otherwise the merged
    weights are loaded below the attached LoRA, which is reset, so that the vectors are those of the
    folder.

    Raises:
        ModelError: an adapter of another kind would have to be reset.
    """
    own, trunk = encoder.state_dict(), encoder.backbone.auto_model
    if not has_adapters(trunk) or own.keys() <= state.keys():
        return state
    prefix = _trunk_prefix(encoder)
    name, revision = getattr(state, _SAVED, None) or (None, None)
    if name and (path := Location(name, {"revision": revision}).fetch(_WEIGHTS)):
        attached = load_file(path)
        merged = {key.removeprefix(prefix): value for key, value in state.items()}
        if _merge_to(merged, trunk, attached):
            return {**own, **{prefix + key: value for key, value in attached.items()}}
    found = {}
    for key, value in own.items():
        inside = key.startswith(prefix)
        saved_key = prefix + _bare_name(key.removeprefix(prefix)) if inside else key
        if saved_key in state:
            found[key] = state[saved_key]
        elif ".lora_A." in key:
            found[key] = value
        elif ".lora_B." in key:
            found[key] = torch.zeros_like(value)  # so that the new adapter changes nothing at first
        else:
            raise ModelError(
                f"a saved encoder cannot be loaded below this adapter ({key}): only a plain LoRA "
                "can be reset. Fix: load the folder, and attach a new adapter to it."
            )
    logger.warning("The adapter of this checkpoint is merged; training continues with a new one.")
    return found


def _trunk_prefix(encoder: Any) -> str:
    """The prefix of the names of a trunk's weights in the state dict of its encoder."""
    names = {id(module): name for name, module in encoder.named_children()}
    return f"{names[id(encoder.backbone)]}.auto_model."


def _merge_to(merged: Mapping[str, Any], trunk: nn.Module, attached: Mapping[str, Tensor]) -> bool:
    """Whether saved adapters on the weights of a trunk give the merged weights."""
    own = {k: v.shape for k, v in trunk.state_dict().items() if _bare_name(k) not in merged}
    if own != {key: value.shape for key, value in attached.items()}:
        return False
    trial = copy.deepcopy(trunk)
    trial.load_state_dict(attached, strict=False)
    result = merge_attached(trial).state_dict()
    return all(_is_close(value, merged.get(key)) for key, value in result.items())


def _is_close(found: Tensor, expected: Tensor | None) -> bool:
    if expected is None or found.shape != expected.shape:
        return False
    allowed = max(_EXACT, 4 * torch.finfo(found.dtype).eps) if found.is_floating_point() else 0.0
    wanted = expected.to(found.device).double()
    return bool((found.double() - wanted).norm() <= allowed * wanted.norm())


def _bare_name(key: str) -> str:
    """The name that a trunk's weight has without adapters."""
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")
