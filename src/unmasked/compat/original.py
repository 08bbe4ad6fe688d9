"""What others expect: checkpoints of the original package, options of its calls and of stock ones.

Cost: two small files of a checkpoint are looked for.
"""

from __future__ import annotations

import json
import logging
from abc import ABCMeta
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unmasked.checkpoint import adapters
from unmasked.checkpoint.folder import SETTINGS_NAME
from unmasked.checkpoint.location import HUB_OPTIONS, Location
from unmasked.errors import ModelError, unknown
from unmasked.text.templates import Template

logger = logging.getLogger(__name__)

LAYERS = "layers"
"""The option of `from_pretrained` that goes to `loading.find` beside those of the hub."""
COMPAT = "llm2vec-0.2"
"""The preprocessing of the original package, versions 0.2.x."""
PUBLISHED = Template(joint=" ")
"""What published checkpoints without a template of their own were made with."""
DOC_MAX_LENGTH = 400
"""The original's default for the tokens of a text."""


class NamesItsBase(ABCMeta):
    """Tells what the class is: BERTopic and KeyBERT look for the library in the type's name.

    Without it they silently take a model of their own choice instead.
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
    """A tokenizer whose ``_`` is an ordinary token again.

    The original's MNTP saves ``_`` as mask token, and from then on the tokenizer splits
    ``foo_bar`` at it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or str(tokenizer.mask_token or "") != "_":
        return tokenizer
    content = json.loads(backend.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "_"]
    if "_" not in content["model"]["vocab"]:
        return tokenizer  # a token of its own, with an embedding of its own
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        **{name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name, None)},
    )


def check_compat(compat: str | None) -> str | None:
    """The value itself.

    Raises:
        ModelError: it names rules that do not exist.
    """
    if compat not in (None, COMPAT):
        raise ModelError(unknown("compat", str(compat), [COMPAT]))
    return compat


def loading_options(
    dtype: Any, device: str | None, options: Mapping[str, Any]
) -> tuple[str, str | None, dict[str, Any]]:
    """(dtype, device, hub options) of a `from_pretrained` call in the original's words.

    Args:
        dtype: a name, perhaps with ``torch.`` before it, or a torch dtype.
        device: as given, or None.
        options: ``torch_dtype``, ``device_map``, ``trust_remote_code`` and the hub's options.

    Raises:
        TypeError: an unknown option.
        ModelError: a device map that cannot be used.
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
_ALWAYS = ("low_cpu_mem_usage", "use_safetensors", "use_fast", "padding_side")
"""What changes no vector, or is always so."""
STOCK = (
    "prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim", "model_card_data",
)  # fmt: skip
"""Arguments of `SentenceTransformer` that an encoder takes as they are."""


def stock_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments of `SentenceTransformer` as they are, the others in our words).

    Args:
        options: by name; ``cache_folder``, ``model_kwargs``, ``backend`` and the like are among
            them where stock code builds a model.

    Raises:
        ModelError: one that cannot be followed.
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
                f"{name}: {', '.join(given)} cannot be followed. Allowed: {', '.join(_OF_MODEL)} "
                "in model_kwargs. Fix: LLM2Vec(model, tokenizer) with both loaded your own way."
            )
    if (backend := rest.pop("backend", "torch")) != "torch":
        raise ModelError(
            f"backend {backend!r}: the encoder runs in torch. Fix: save it, and load its folder "
            "with SentenceTransformer(folder, backend=...)."
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
