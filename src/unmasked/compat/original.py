"""Recognises checkpoints of the original package, and translates its options and stock ones.

Cost: two small files of a checkpoint are looked for.
"""

from __future__ import annotations

import json
import logging
from abc import ABCMeta
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unmasked.checkpoint import adapters
from unmasked.checkpoint.folder import SETTINGS_NAME, Settings, read_settings
from unmasked.checkpoint.location import HUB_OPTIONS, Location
from unmasked.errors import ModelError, unknown
from unmasked.text.templates import Template

logger = logging.getLogger(__name__)

LAYERS = "layers"
"""An option of `from_pretrained` that is passed to `loading.find` like those of the hub."""
COMPAT = "llm2vec-0.2"  # the preprocessing of the original package, versions 0.2.x
PUBLISHED = Template(joint=" ")
"""The template of published checkpoints whose tokenizer has none: a space after the instruction."""
DOC_MAX_LENGTH = 400  # the original's default for the maximum number of tokens of a text


class NamesItsBase(ABCMeta):
    """Adds ``sentence_transformers`` to a class's repr, where BERTopic and KeyBERT look for it.

    Without it they silently use a default model of their own instead.
    """

    def __repr__(cls) -> str:
        return f"<class '{cls.__module__}.{cls.__qualname__}' (sentence_transformers)>"


def is_original(location: Location) -> bool:
    """Whether a folder or repository comes from the original package (or the seed system).

    Its encoders have an `llm2vec_config.json` that does not mention a template; its MNTP stage
    leaves an adapter with a tokenizer beside it.
    """
    settings = location.read_json(SETTINGS_NAME)
    if settings:
        return "template" not in settings
    return adapters.is_adapter(location) and location.has_tokenizer()


def without_blank_mask(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer in which ``_`` is an ordinary token again.

    The original's MNTP saves ``_`` as the mask token, and such a tokenizer splits ``foo_bar`` at
    it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or str(tokenizer.mask_token or "") != "_":
        return tokenizer
    content = json.loads(backend.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "_"]
    if "_" not in content["model"]["vocab"]:
        return tokenizer  # "_" was added as a new token, which has an embedding of its own
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        **{name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name, None)},
    )


def check_compat(compat: str | None) -> str | None:
    """Return the value, after checking it.

    Raises:
        ModelError: it is neither None nor `COMPAT`.
    """
    if compat not in (None, COMPAT):
        raise ModelError(unknown("compat", str(compat), [COMPAT]))
    return compat


def settings_for_name(
    name: str | Path, given: Mapping[str, Any], settings: Settings | None, **objects: object
) -> dict[str, Any]:
    """The settings to load a model with, which were given together with its name.

    Args:
        name: the model.
        given: settings by name, as for `read_settings`; they take precedence.
        settings: all of them, or None.
        objects: what a named model brings itself; each should be None.

    Raises:
        ModelError: an object was given, or a setting cannot be used.
    """
    kind = next((kind for kind, value in objects.items() if value is not None), None)
    if kind is not None:
        raise ModelError(
            f"{kind} was given with the name '{name}', which is loaded with its own {kind}. "
            f"Fix: leave {kind} out, or load the transformer too: model = "
            "AutoModel.from_pretrained(name), then LLM2Vec(model, tokenizer)."
        )
    return dict(given if settings is None else vars(read_settings(vars(settings), given)))


def loading_options(
    dtype: Any, device: str | None, options: Mapping[str, Any]
) -> tuple[str, str | None, dict[str, Any]]:
    """(dtype, device, hub options) of a `from_pretrained` call with the original's options.

    Args:
        dtype: a name, perhaps with the prefix ``torch.``, or a torch dtype.
        device: the device that the caller gave, or None.
        options: ``torch_dtype``, ``device_map``, ``trust_remote_code`` and the hub's options.

    Raises:
        TypeError: an option is unknown.
        ModelError: the device map cannot be used.
    """
    rest = dict(options)
    dtype = str(rest.pop("torch_dtype", None) or rest.pop("dtype", None) or dtype)
    dtype = dtype.removeprefix("torch.")
    device = device or _one_device(rest.pop("device_map", None))
    if rest.pop("trust_remote_code", False):
        logger.info("trust_remote_code is not needed: code from a repository is never run.")
    if strange := [key for key in rest if key not in (*HUB_OPTIONS, LAYERS)]:
        allowed = [*HUB_OPTIONS, LAYERS, "torch_dtype", "device_map", "trust_remote_code"]
        raise TypeError(f"from_pretrained: {unknown('option', strange[0], allowed)}")
    return dtype, device, rest


_OF_MODEL = ("torch_dtype", "dtype", "device_map", "attn_implementation")
"""Entries of ``model_kwargs`` that are options here."""
_ALWAYS = ("low_cpu_mem_usage", "use_safetensors", "use_fast", "padding_side")
"""Entries that change no vector, or are always True here: ignored, unless they are False."""
STOCK = (
    "prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim", "model_card_data",
)  # fmt: skip
"""Arguments of `SentenceTransformer` that an encoder accepts unchanged."""


def stock_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments of `SentenceTransformer` that stay unchanged, the others under our names).

    Args:
        options: arguments by name; stock code that builds a model also passes ``cache_folder``,
            ``model_kwargs``, ``backend`` and the like.

    Raises:
        ModelError: an argument is not supported.
    """
    rest = dict(options)
    stock = {name: rest.pop(name) for name in STOCK if name in rest}
    if cache := rest.pop("cache_folder", None):
        rest["cache_dir"] = cache
    for name in ("model_kwargs", "processor_kwargs", "tokenizer_kwargs", "config_kwargs"):
        asked = dict(rest.pop(name, None) or {})
        given = {key: asked[key] for key in asked if key not in _ALWAYS or asked[key] is False}
        if name == "model_kwargs":
            rest |= {key: given.pop(key) for key in _OF_MODEL if key in given}
        if given:
            raise ModelError(
                f"{name}: {', '.join(given)} is not supported. Allowed: {', '.join(_OF_MODEL)} in "
                "model_kwargs. Fix: load model and tokenizer yourself: LLM2Vec(model, tokenizer)."
            )
    if (backend := rest.pop("backend", "torch")) != "torch":
        raise ModelError(
            f"backend {backend!r}: this class always runs in torch. Fix: save the encoder, and "
            "load its folder with SentenceTransformer(folder, backend=...)."
        )
    return stock, {name: value for name, value in rest.items() if value is not None}


def _one_device(device_map: Any) -> str | None:
    if isinstance(device_map, dict) and len(set(device_map.values())) == 1:
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, int):
        return f"cuda:{device_map}"
    if device_map in (None, "auto"):
        return None
    if isinstance(device_map, str | torch.device) and str(device_map) not in (
        "balanced", "balanced_low_0", "sequential",
    ):  # fmt: skip
        return str(device_map)
    raise ModelError(
        f"device_map {device_map!r} spreads the model over devices, which is not supported. "
        "Allowed: one device, or auto. Fix: device='cuda'."
    )
