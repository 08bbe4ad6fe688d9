"""Take the causal mask off a decoder: in its config, then in what its modules show.

transformers (5.2 and later) drops the mask of almost every family when ``config.is_causal`` is
``False``, and a saved config carries that to every stock loader. What is left is repaired in the
loaded model, in this process only: layers that lose the flag on their way (StableLM, Nemotron),
attention that keeps a triangle of its own in a buffer (GPT-Neo), forwards that fail without a mask
(MPT). No list of architectures decides; `bidirectional.prove` shows what helped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NATIVE_KEY = "use_bidirectional_attention"
"""The key of families that have one of their own, and what text-embeddings-inference reads."""

_AS_STOCK: ContextVar[bool] = ContextVar("as_stock", default=False)


def open_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of ``config`` that loads a bidirectional model; survives ``save_pretrained``.

    Families with a working key of their own (Gemma 3 and 4) get that one, because it also halves
    their sliding windows; all others get ``is_causal=False``. A config that is bidirectional
    already keeps its way, so that a saved folder loads here as it does elsewhere.
    """
    opened = copy.deepcopy(config)
    set_flag(opened, rebuild=True)
    return opened


def set_flag(config: PretrainedConfig, *, rebuild: bool) -> None:
    """Make ``config`` bidirectional in place; ``rebuild``: its windows may still change."""
    text = config.get_text_config()
    config.use_cache = text.use_cache = False  # else every forward fills a key-value cache
    types = getattr(text, "layer_types", None) or []
    if "chunked_attention" in types:
        # its mask ignores every flag; for texts within a chunk full attention is the same
        text.layer_types = [t.replace("chunked_attention", "full_attention") for t in types]
    native = _native_fields(text)
    if native and getattr(text, NATIVE_KEY) == native[NATIVE_KEY]:
        return  # open already; is_causal on top of it would widen Gemma 3's windows
    if native and rebuild and getattr(text, "is_causal", True):
        vars(text).update(native)
    else:
        config.is_causal = text.is_causal = False


def _native_fields(text: PretrainedConfig) -> dict[str, Any]:
    """The fields that the family's own bidirectional key changes, or nothing.

    The test: a config class that acts on the key converts its sliding window when built with it.
    Gemma 1 declares it but stays causal in padded batches; Gemma 3 wants True, Gemma 4 "all".
    """
    stored = text.to_dict()
    stored.pop("is_causal", None)
    for value in (True, "all") if NATIVE_KEY in stored else ():
        try:
            rebuilt = type(text).from_dict({**stored, NATIVE_KEY: value})
        except (StrictDataclassError, TypeError):  # not a value of this key, or no window at all
            continue
        if getattr(rebuilt, "sliding_window", None) != stored.get("sliding_window"):
            names = (NATIVE_KEY, "sliding_window", "is_causal")
            return {name: getattr(rebuilt, name) for name in names if hasattr(rebuilt, name)}
    return {}


def window(config: PretrainedConfig) -> int | None:
    """How many tokens to each side the sliding layers of an open model see; None without any.

    As eager and sdpa draw it; flash attention's window is one token narrower on each side.
    """
    text: Any = config.get_text_config()
    size = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    full = types and set(types) == {"full_attention"}
    if not isinstance(size, int) or full or getattr(text, "use_sliding_window", None) is False:
        return None
    return size if getattr(text, "is_causal", True) is False else size - 1


def learned_positions(model: Any) -> int | None:
    """The longest input of a model that has a table of positions; None where they are computed."""
    text = bare(model).config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or 0
    tables = (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))
    offset = 8  # some tables begin with a few rows that no token has
    learned = any(most <= size <= most + offset for size in tables if most != text.vocab_size)
    return int(most) if learned else None


def bare(model: Any) -> Any:
    """The bare transformers model inside PEFT wrappers and language-model heads."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model


def clear_module_flags(model: nn.Module) -> list[str]:
    """Set ``is_causal=False`` on every submodule that has it ``True``; returns their names."""
    found = {n: m for n, m in model.named_modules() if getattr(m, "is_causal", None) is True}
    for module in found.values():
        vars(module)["is_causal"] = False
    return list(found)


def mirror_triangles(model: nn.Module) -> list[str]:
    """Make causal masks that modules keep in buffers symmetric; returns the buffers' names.

    A local layer's band is mirrored as well: its window then reaches as far to the right.
    """
    found = {n: b for n, b in model.named_buffers() if _is_mask(b) and not b.triu(1).any()}
    for buffer in found.values():
        buffer.copy_(buffer.maximum(buffer.mT))
    return list(found)


def _is_mask(buffer: Tensor) -> bool:
    """Whether a buffer has the shape (1, 1, T, T), T > 1, and holds zeros and ones only."""
    square = buffer.dim() == 4 and buffer.shape == (1, 1, buffer.shape[-1], buffer.shape[-1])
    return square and buffer.shape[-1] > 1 and bool(((buffer == 0) | (buffer == 1)).all())


def give_mask(model: nn.Module) -> Any:
    """Hand a full mask (B, 1, T, T) to every forward of a bare model; returns the hook's handle.

    For families that fail where transformers leaves the mask out. It would lift sliding windows,
    and a dense mask keeps fast kernels away: the last resort.
    """
    return model.register_forward_pre_hook(_full_mask, with_kwargs=True)


def _full_mask(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    mask = kwargs.get("attention_mask")
    if _AS_STOCK.get() or (mask is not None and mask.dim() != 2):
        return None
    given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    tokens = next(value for value in given if value is not None)
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    hidden = mask[:, None, None, :].eq(0).expand(-1, 1, mask.shape[1], -1)
    full = torch.zeros(hidden.shape, dtype=model.dtype, device=tokens.device)
    return args, {
        **kwargs,
        "attention_mask": full.masked_fill(hidden, torch.finfo(model.dtype).min),
    }


@contextmanager
def as_stock(decoder: Any) -> Iterator[str]:
    """Run a bare model as a fresh instance of its class would, without the repairs made here.

    Yields:
        The attention implementation that the stock loader would pick.
    """
    config = copy.deepcopy(decoder.config)
    config._attn_implementation = None
    with torch.device("meta"):  # no memory for weights
        stock = type(decoder)(config)
    causal = (n for n, module in stock.named_modules() if getattr(module, "is_causal", None))
    flags = [m for m in map(decoder.get_submodule, causal) if vars(m).get("is_causal") is False]
    triangles = [b for b in decoder.buffers() if _is_mask(b) and b.equal(b.mT)]
    here, token = decoder.config._attn_implementation, _AS_STOCK.set(True)
    try:
        for module in flags:
            vars(module)["is_causal"] = True
        for buffer in triangles:
            buffer.tril_()
        yield stock.config._attn_implementation
    finally:
        _AS_STOCK.reset(token)
        decoder.set_attn_implementation(here)
        for module in flags:
            vars(module)["is_causal"] = False
        for buffer in triangles:
            buffer.copy_(buffer.maximum(buffer.mT))
