"""The attention function that keeps packed texts apart, and how the layout of a batch reaches it.

With the causal mask off, transformers keeps packed texts apart with flash attention only. The other
backends ignore that position ids restart, and texts silently attend to each other (relative
difference of the states 1.8 to 3.7 for Llama, Qwen3 and Gemma 3). So we register an attention
function of our own through the library's public interface.

A layer may run twice: gradient checkpointing computes it again in the backward pass, from another
thread on a GPU. So the layout is not kept in the process but passed with the call. `run_packed`
passes it to the model as a keyword argument, which nearly every family hands on to its attention,
and also as an attribute of the mask, which every family hands on. The mask of a packed batch never
has N columns, so an attention call that gets the mask without the layout is refused instead of
mixing texts. A call without a mask is refused too: the mask code below always makes one, even if
every token sees all others, so a missing mask means that a layer is run by hand, perhaps on the
states of many texts.

The family's own mask code draws a sliding window once, for the longest text of the batch. If the
kernel takes windows as numbers, and the check has read and confirmed the reach of this one, the
mask is empty and its last two dimensions encode the reach.

Shapes: B texts, T tokens of the longest, N tokens of all, D width, H query heads and G key-value
heads of width d.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from unmasked.errors import ModelError
from unmasked.forward.packing.dense import Extras, attend, attend_by_text
from unmasked.forward.packing.layout import Packed
from unmasked.forward.packing.ragged import attend_at_once, find_kernel

NAME = "unmasked"
"""The attention implementation registered here."""

LAYOUT = "packed_layout"
"""The keyword argument, and the attribute of a mask, that carries the layout of a batch."""

Reaches = Mapping[int, tuple[int, int]]
"""How many tokens a query sees to its left and right, by window size in the config (0: none).

The size alone does not tell: four tokens to each side are a 4 in Mistral and a 5 in Gemma 3.
"""

ALL, WITHOUT_WINDOW = (-1, -1), 64
"""The reach of a mask without a window, and the window size with which such a mask is probed."""

NO_REACHES: Reaches = MappingProxyType({})
REACHES, AT_ONCE = "packed_reaches", "packed_at_once"
"""Attributes of a model in which the check stores its results."""

_ENTERED: ContextVar[tuple[Packed, Reaches] | None] = ContextVar("entered", default=None)
"""The batch that runs, for `_mask`: it is called once at the start of a forward, without our
keyword argument."""
_READ: ContextVar[dict[int, tuple[int, int]] | None] = ContextVar("read", default=None)
"""The dictionary of `reading_reaches`."""


def run_packed(
    model: Any, input_ids: Tensor, packed: Packed, reaches: Reaches | None = None
) -> Tensor:
    """Last hidden states (N, D) of the real tokens of (B, T) ids.

    Args:
        model: a transformer that `enable_packing` accepted, perhaps with an adapter.
        input_ids: (B, T).
        packed: how the batch is laid end to end.
        reaches: the windows that a kernel may take as numbers; None for those that the check
            confirmed for this model.
    """
    if reaches is None:
        reaches = getattr(model, REACHES, NO_REACHES)
    packed = replace(packed, at_once=packed.at_once and getattr(model, AT_ONCE, True))
    token = _ENTERED.set((packed, reaches))
    try:
        states: Tensor = model(
            input_ids=input_ids[packed.rows, packed.columns][None],  # (1, N)
            position_ids=packed.positions[None],
            use_cache=False,
            **{LAYOUT: packed},
        ).last_hidden_state
    finally:
        _ENTERED.reset(token)
    return states[0]


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for `torch.utils.checkpoint` that do nothing: the layout is passed with the call.

    Earlier versions needed them; scripts that pass this function as ``context_fn`` still run.
    """
    return nullcontext(), nullcontext()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Bidirectional attention, packed or not, with the signature that transformers calls.

    Args:
        module: the attention layer (unused).
        query: (B, H, T, d); (1, H, N, d) while a batch is packed.
        key, value: (B, G, T, d), where H is a multiple of G; (1, G, N, d) while packed.
        attention_mask: bool, true where a query may look; while packed, as `_mask` makes it.
        scaling, dropout, softcap, s_aux: as in transformers; ``s_aux`` are attention sinks, (H,).
        others: the layout of a packed batch, and keywords that this function does not use.

    Returns:
        (B, T, H, d), or (1, N, H, d) while packed, and no weights.

    Raises:
        ModelError: tokens were packed, but the layout of the batch was not passed with the call.
    """
    del module
    packed: Packed | None = others.get(LAYOUT) or getattr(attention_mask, LAYOUT, None)
    tokens = key.shape[2]
    if packed is None:
        if attention_mask is None:
            raise _lost("no mask, no keywords")
        if attention_mask.shape[-1] != tokens:
            raise _lost(f"the mask has {attention_mask.shape[-1]} columns for {tokens} tokens")
        if attention_mask.numel() == 0:  # from `_mask`: every token sees all others
            attention_mask = None
        extras = Extras(scaling, dropout, softcap, s_aux)
        return attend(query, key, value, attention_mask, extras).transpose(1, 2), None
    if tokens != len(packed.rows):
        raise _lost(f"the layout is of {len(packed.rows)} tokens, and {tokens} were given")
    reach = None
    if attention_mask is not None and attention_mask.numel() == 0:
        reach, attention_mask = _encoded_reach(attention_mask), None
    extras = Extras(scaling, dropout, softcap, s_aux, reach)
    query, key, value = _as_under_autocast(query, key, value)
    at_once = packed.at_once and attention_mask is None
    kernel = find_kernel(query, extras) if at_once else None
    if kernel is not None:
        return attend_at_once(kernel, query, key, value, packed, extras), None
    return attend_by_text(query, key, value, attention_mask, packed, extras), None


def _lost(seen: str) -> ModelError:
    return ModelError(
        f"attention over packed texts was called without the layout of its batch ({seen}), and "
        "texts would see each other. Fix: where a layer is run by hand, pass on all keywords that "
        f"it was called with ('{LAYOUT}' among them): torch.utils.checkpoint.checkpoint(layer, "
        "states, use_reentrant=False, **kwargs)."
    )


def _as_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype that autocast gives to SDPA; it does not convert for other kernels."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def _mask(q_length: int, kv_length: int, **kwargs: Any) -> Tensor:
    """The family's mask; while a batch is packed, the mask for its longest text alone.

    A mask without restrictions is an empty tensor, with the last two dimensions of the full mask.
    While a batch is packed these are 0; or, if a kernel takes the reach of a window as numbers, one
    more than the number of tokens that are seen to the left and to the right.
    """
    entered = _ENTERED.get()
    # Only the forward of `run_packed` itself asks for one row of N tokens.
    if entered is None or (kwargs.get("batch_size"), q_length) != (1, len(entered[0].rows)):
        _read_reach(**kwargs)
        plain = sdpa_mask(q_length=q_length, kv_length=kv_length, **kwargs)
        return _empty(q_length, kv_length, kwargs["device"]) if plain is None else plain
    packed, reaches = entered
    reach = reaches.get(kwargs.get("local_size") or 0)
    if reach is not None:
        mask: Tensor | None = _empty(reach[0] + 1, reach[1] + 1, kwargs["device"])
    else:
        alone = {"q_offset": 0, "kv_offset": 0, "attention_mask": None}
        longest = packed.longest
        mask = sdpa_mask(q_length=longest, kv_length=longest, **{**kwargs, **alone})  # (1, 1, T, T)
    if mask is None:
        mask = _empty(0, 0, kwargs["device"])
    setattr(mask, LAYOUT, packed)
    return mask


def _empty(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.empty(0, 1, rows, columns, dtype=torch.bool, device=device)


def _encoded_reach(mask: Tensor) -> tuple[int, int] | None:
    left, right = mask.shape[-2] - 1, mask.shape[-1] - 1
    return None if left < 0 or right < 0 else (left, right)


@contextmanager
def reading_reaches() -> Iterator[dict[int, tuple[int, int]]]:
    """Yield a dictionary that is filled with the reaches of the masks made inside the block."""
    found: dict[int, tuple[int, int]] = {}
    token = _READ.set(found)
    try:
        yield found
    finally:
        _READ.reset(token)


def _read_reach(
    mask_function: Any = None, local_size: int | None = None, device: Any = "cpu", **_: Any
) -> None:
    """Record which keys a few queries see, if all of them see equally far to each side."""
    found = _READ.get()
    if found is None or mask_function is None:
        return
    size = local_size or WITHOUT_WINDOW
    zero = torch.zeros((), dtype=torch.long, device=device)  # index of the batch and of the head
    keys = torch.arange(5 * size + 16, device=device)
    reaches = set[tuple[int, int] | None]()
    for query in (2 * size + 3, 2 * size + 4, 3 * size + 7):
        try:
            seen = mask_function(zero, zero, zero + query, keys).expand(len(keys)).nonzero()[:, 0]
        except (RuntimeError, IndexError, TypeError):  # the mask depends on more than positions
            return
        first, last = int(seen[0]), int(seen[-1])
        if len(seen) == len(keys):
            reaches.add(ALL)
        elif len(seen) == last - first + 1:
            reaches.add((query - first, last - query))
        else:  # with gaps: it is not a window
            reaches.add(None)
    reach = reaches.pop()
    if not reaches and reach is not None and (reach == ALL) == (local_size is None):
        found[local_size or 0] = reach


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)
