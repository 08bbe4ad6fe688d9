"""Take the causal mask off a decoder: first in its config, then in its loaded modules.

With ``config.is_causal = False`` transformers (5.2 and later) leaves out the causal mask of almost
every family, and a saved config carries the flag to every stock loader: `open_config`. Where the
flag has no effect, the loaded model is repaired, in this process only: layers that do not pass it
on to attention (StableLM, Nemotron), attention with a causal triangle in a buffer of its own
(GPT-Neo), and forwards that fail without a mask (MPT). No list of architectures decides what is
repaired: `proof.prove` shows what helped. The cost is one walk over the modules and buffers.
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

from unmasked.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NATIVE_KEY = "use_bidirectional_attention"
"""The config key of families with a key of their own; text-embeddings-inference reads it too."""

_AS_STOCK: ContextVar[bool] = ContextVar("as_stock", default=False)
"""True inside of `as_stock`: the hook `full_mask` does nothing."""


def open_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of ``config`` that loads a bidirectional model and survives ``save_pretrained``.

    Families with a working key of their own (Gemma 3 and 4) get that key, because it also halves
    their sliding windows. All others get ``is_causal=False``. A config that is already
    bidirectional stays as it is, so that a saved folder loads here as it does elsewhere.
    """
    opened = copy.deepcopy(config)
    set_flag(opened, rebuild=True)
    return opened


def set_flag(config: PretrainedConfig, *, rebuild: bool) -> None:
    """Make ``config`` bidirectional in place.

    Args:
        config: to change.
        rebuild: whether the model is built from it later, so that its windows may still change.
    """
    text: Any = config.get_text_config()
    config.use_cache = text.use_cache = False  # otherwise every forward fills a key-value cache
    types = getattr(text, "layer_types", None) or []
    if "chunked_attention" in types:
        # The mask of chunked layers (Llama 4) ignores every flag. For texts within one chunk, full
        # attention is the same.
        text.layer_types = [t.replace("chunked_attention", "full_attention") for t in types]
    native = _native_fields(text)
    if native and getattr(text, NATIVE_KEY) == native[NATIVE_KEY]:
        return  # already open; is_causal in addition would widen the windows of Gemma 3
    if native and rebuild and getattr(text, "is_causal", True):
        for name, value in native.items():
            setattr(text, name, value)
    else:
        config.is_causal = text.is_causal = False


def _native_fields(text: PretrainedConfig) -> dict[str, Any]:
    """The fields that the family's own bidirectional key changes; empty if it has no such key.

    The test is whether the config class converts its sliding window when it is built with the key:
    Gemma 1 declares the key too, but stays causal in padded batches. Gemma 3 takes True, Gemma 4
    "all".
    """
    stored = text.to_dict()
    stored.pop("is_causal", None)
    for value in (True, "all") if NATIVE_KEY in stored else ():
        try:
            rebuilt = type(text).from_dict({**stored, NATIVE_KEY: value})
        except (StrictDataclassError, TypeError):  # not a value of this key, or there is no window
            continue
        if getattr(rebuilt, "sliding_window", None) != stored.get("sliding_window"):
            names = (NATIVE_KEY, "sliding_window", "is_causal")
            return {name: getattr(rebuilt, name) for name in names if hasattr(rebuilt, name)}
    return {}


def window(config: PretrainedConfig) -> int | None:
    """Tokens to each side that the sliding layers of an open model see; None without such layers.

    This holds for eager attention and SDPA; the window of flash attention is one token narrower on
    each side.
    """
    text: Any = config.get_text_config()
    size = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    all_full = types and set(types) == {"full_attention"}
    if not isinstance(size, int) or all_full or getattr(text, "use_sliding_window", None) is False:
        return None
    return size if getattr(text, "is_causal", True) is False else size - 1


def learned_positions(model: Any) -> int | None:
    """The longest input of a model with learned position embeddings; None without them."""
    text = decoder_of(model).config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or 0
    tables = (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))
    offset = 8  # some tables begin with a few rows that belong to no position (OPT: 2)
    # If both sizes are the same, the table cannot be told from that of the vocabulary.
    learned = any(most <= size <= most + offset for size in tables if most != text.vocab_size)
    return int(most) if learned else None


def check_length(asked: int, config: Any) -> None:
    """Refuse a length of inputs that is beyond the positions of a model.

    Raises:
        ModelError: the length is too large.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most and asked > most:
        raise ModelError(
            f"max_length {asked:,}: this model has {most:,} positions, and was trained on no "
            f"longer input. Fix: max_length={most} (--max-length {most}), or less."
        )


def decoder_of(model: Any) -> Any:
    """The bare transformers model inside PEFT wrappers and language-model heads."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model


def layers_of(decoder: nn.Module, depth: int) -> nn.ModuleList:
    """The decoder's layers; those of all its stacks, if it has several and runs them in cycles."""
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    whole = next((layers for layers in lists if len(layers) == depth), None)
    if whole is not None:
        return whole
    longest = max(map(len, lists), default=0)
    stacks = [layers for layers in lists if len(layers) == longest]
    if len({type(stack[0]) for stack in stacks}) != 1:
        stacks = []
    return nn.ModuleList(layer for stack in stacks for layer in stack)


def attention_name(model: Any) -> str:
    """The attention implementation that a transformers model runs, such as ``sdpa``."""
    # transformers has a public setter (`set_attn_implementation`) and no public getter.
    return str(model.config._attn_implementation)


def clear_module_flags(model: nn.Module) -> list[str]:
    """Set ``is_causal=False`` on every submodule that has it ``True``; returns their names."""
    found = [name for name, m in model.named_modules() if getattr(m, "is_causal", None) is True]
    _set_flags(model, found, False)
    return found


def _set_flags(model: nn.Module, names: list[str], value: bool) -> None:
    for name in names:
        module: Any = model.get_submodule(name)
        module.is_causal = value


def mirror_triangles(model: nn.Module) -> None:
    """Make causal masks that modules keep in buffers symmetric.

    The band of a local layer is mirrored too: its window then reaches as far to the right.
    """
    for buffer in model.buffers():
        if _is_mask(buffer) and not buffer.triu(1).any():  # nothing above the diagonal: causal
            buffer.copy_(buffer.maximum(buffer.mT))


def _is_mask(buffer: Tensor) -> bool:
    """Whether a buffer has the shape (1, 1, T, T), T > 1, and holds zeros and ones only."""
    square = buffer.dim() == 4 and buffer.shape == (1, 1, buffer.shape[-1], buffer.shape[-1])
    return square and buffer.shape[-1] > 1 and bool(((buffer == 0) | (buffer == 1)).all())


def full_mask(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """A forward pre-hook that passes a full mask (B, 1, T, T) to a bare model.

    For families whose forward fails when transformers leaves the mask out. It is the last resort,
    because it would lift sliding windows, and fast kernels do not take a dense mask.
    """
    mask = kwargs.get("attention_mask")
    if _AS_STOCK.get() or (mask is not None and mask.dim() != 2):
        return None
    given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    tokens = next(value for value in given if value is not None)  # (B, T) or (B, T, D)
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    padding = mask[:, None, None, :].eq(0).expand(-1, 1, mask.shape[1], -1)  # (B, 1, T, T)
    full = torch.zeros(padding.shape, dtype=model.dtype, device=tokens.device)
    full = full.masked_fill(padding, torch.finfo(model.dtype).min)
    return args, {**kwargs, "attention_mask": full}


@contextmanager
def as_stock(decoder: Any) -> Iterator[str]:
    """Inside the block, a bare model runs as a stock loader would load it, without our repairs.

    Yields:
        The attention implementation that the stock loader would pick.
    """
    # The stock loader reads the saved form of the config, which names no attention.
    config = type(decoder.config).from_dict(decoder.config.to_dict())
    with torch.device("meta"):  # allocates no memory for weights
        stock = type(decoder)(config)
    causal = (name for name, m in stock.named_modules() if getattr(m, "is_causal", None))
    flags = [name for name in causal if decoder.get_submodule(name).is_causal is False]
    triangles = [b for b in decoder.buffers() if _is_mask(b) and b.equal(b.mT)]  # mirrored
    here, token = attention_name(decoder), _AS_STOCK.set(True)
    try:
        _set_flags(decoder, flags, True)
        for buffer in triangles:
            buffer.tril_()
        yield attention_name(stock)
    finally:
        _AS_STOCK.reset(token)
        decoder.set_attn_implementation(here)
        _set_flags(decoder, flags, False)
        for buffer in triangles:
            buffer.copy_(buffer.maximum(buffer.mT))
