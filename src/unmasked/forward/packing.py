"""Attention over texts laid end to end, so that padding never reaches the network.

With the causal mask off, transformers keeps packed texts apart in no backend but flash attention:
it ignores that position ids restart, and texts silently attend to each other (relative difference
of the states 1.8 to 3.7 for Llama, Qwen3 and Gemma 3). So an attention function of our own is
registered through the library's public interface. While a batch is packed, it attends text
by text: texts of equal length as one batch of plain SDPA, or on a GPU all at once with
`torch.nn.attention.varlen`, or flash-attn, if installed, for dropout or a soft cap. Outside a
packed batch it is SDPA with the mask it is given.

The family's own mask code draws a sliding window once, for the longest text of the batch. Windows
look the same from every token, so shorter texts take the upper left corner of it.

No list says which families can be packed: `enable_packing` compares packed with single forwards on
the loaded model, in five forwards of at most 36 tokens. `benchmarks/encode.py` measures the speed.

Shapes: B texts, T tokens of the longest, N tokens of all, D width, H query heads and G key-value
heads of width d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_flash_attn_2_available

from unmasked.mask.opening import attention_name
from unmasked.mask.proof import evaluating

NAME = "unmasked"
"""The attention implementation registered here."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest relative difference of packed and single states; 5e-2 in other precisions."""

LONG = 64
"""Tokens from which bfloat16 attention on a CPU is faster as two matrix products than as SDPA."""

Extras = tuple[float | None, float, float | None, Tensor | None]
"""Scaling, dropout, soft cap and attention sinks (H,), as transformers hands them over."""


@dataclass(frozen=True)
class Packed:
    """How the N real tokens of a padded (B, T) batch are laid end to end, longest text first.

    The order matters: some families cut their mask where positions restart, and `_mask` draws it
    for the first tokens, which have to be one text then.

    Attributes:
        rows, columns: (N,) where each packed token stands in the padded batch.
        positions: (N,) its position in its text, from 0.
        ends: (B + 1,) int32 offsets of the texts, from 0 to N.
        groups: (first token, number of texts, length) of each run of texts of equal length; on the
            host, so that no forward waits for the device to tell the lengths.
    """

    rows: Tensor
    columns: Tensor
    positions: Tensor
    ends: Tensor
    groups: tuple[tuple[int, int, int], ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.groups[0][2]

    def to(self, device: torch.device) -> Packed:
        """The same plan on a device, without waiting where it comes from pinned memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Packed:
        """The same plan in memory that a GPU copies from by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Packed:
        rows, columns = change(self.rows), change(self.columns)
        return Packed(rows, columns, change(self.positions), change(self.ends), self.groups)


def pack(attention_mask: Tensor) -> Packed:
    """Plan the packing of a padded batch, on the CPU; one copy of the mask if it is elsewhere.

    Args:
        attention_mask: (B, T), 1 for real tokens; padding on either side.
    """
    mask = attention_mask.cpu()
    lengths = mask.sum(dim=1)  # (B,)
    order = lengths.argsort(descending=True, stable=True)
    ends, groups = _lay_out(lengths[order])
    sorted_rows, columns = mask[order].nonzero(as_tuple=True)
    positions = torch.arange(len(columns)) - ends[sorted_rows]
    return Packed(order[sorted_rows], columns, positions, ends, groups).to(attention_mask.device)


def pack_documents(begins: Tensor) -> Packed:
    """Plan the packing of blocks that hold several documents each, without padding.

    Args:
        begins: (B, T) bool, true where a document begins, and so in the first column.
    """
    starts = begins.flatten().nonzero()[:, 0]  # one for each document
    lengths = torch.diff(starts, append=starts.new_tensor([begins.numel()]))
    order = lengths.argsort(descending=True, stable=True)
    ends, groups = _lay_out(lengths[order])
    document = torch.repeat_interleave(lengths[order])  # (N,)
    positions = torch.arange(begins.numel(), device=begins.device) - ends[document]
    source = starts[order][document] + positions
    width = begins.shape[1]
    return Packed(source // width, source % width, positions, ends, groups)


def _lay_out(lengths: Tensor) -> tuple[Tensor, tuple[tuple[int, int, int], ...]]:
    """``ends`` and ``groups`` of `Packed` for texts of these (B,) lengths, longest first."""
    ends = lengths.new_zeros(len(lengths) + 1, dtype=torch.int32)
    ends[1:] = lengths.cumsum(0)
    groups, start = [], 0
    for length, same in groupby(lengths.tolist()):
        texts = len(list(same))
        groups.append((start, texts, length))
        start += texts * length
    return ends, tuple(groups)


_PACKED: ContextVar[Packed | None] = ContextVar("packed", default=None)


@contextmanager
def packed_attention(packed: Packed | None) -> Iterator[None]:
    """Attention inside the block keeps the texts of a packed batch apart."""
    token = _PACKED.set(packed)
    try:
        yield
    finally:
        _PACKED.reset(token)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`: the recomputed forward is packed as the first one was."""
    return nullcontext(), packed_attention(_PACKED.get())


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
    **_: Any,
) -> tuple[Tensor, None]:
    """Bidirectional attention, packed or not, with the signature that transformers calls.

    Args:
        module: the attention layer (unused).
        query: (B, H, T, d); (1, H, N, d) while a batch is packed.
        key, value: (B, G, T, d), where H is a multiple of G; (1, G, N, d) while packed.
        attention_mask: bool, true where a query may look; while packed, (1, 1, T, T) for the
            longest text.
        scaling, dropout, softcap, s_aux: as in transformers; ``s_aux`` are attention sinks, (H,).

    Returns:
        (B, T, H, d), or (1, N, H, d) while packed, and no weights.
    """
    del module
    extras = (scaling, dropout, softcap, s_aux)
    packed = _PACKED.get()
    if packed is None:
        return _attend(query, key, value, attention_mask, extras).transpose(1, 2), None
    # A layer with a window goes text by text on a GPU too. The kernels could take it as a number,
    # but the number that a family hands over does not tell the window: four tokens to each side
    # are a 4 in Mistral and a 5 in Gemma 3.
    if attention_mask is None and _has_varlen(query, extras):
        return _attend_varlen(query, key, value, packed, extras), None
    parts = []
    for start, texts, length in packed.groups:
        q, k, v = (
            x[0, :, start : start + texts * length].unflatten(1, (texts, length)).transpose(0, 1)
            for x in (query, key, value)
        )  # (texts, heads, length, d)
        mask = None if attention_mask is None else attention_mask[..., :length, :length]
        parts.append(_attend(q, k, v, mask, extras).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extras: Extras
) -> Tensor:
    """(B, H, T, d) attention: SDPA, or written out for what SDPA does not have or does slowly."""
    scaling, dropout, softcap, sinks = extras
    half = query.dtype == torch.bfloat16 and query.shape[2] >= LONG
    slow = query.device.type == "cpu" and (dropout > 0 or half)
    if softcap is None and sinks is None and not slow:
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, mask, dropout, scale=scaling, enable_gqa=grouped
        )
    batch, heads, tokens, width = query.shape
    shared = batch * key.shape[1]
    # The queries that share a key stand one below the other, so that no key is repeated.
    queries = query.reshape(shared, -1, width)  # (B * G, H / G * T, d)
    keys = key.reshape(shared, tokens, width).transpose(1, 2)
    # baddbmm scales inside the product; beta=0 ignores the (empty) first argument.
    scale = scaling or width**-0.5
    scores = torch.baddbmm(queries.new_empty(1, 1, 1), queries, keys, beta=0, alpha=scale)
    scores = scores.view(batch, heads, tokens, tokens)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        scores = torch.cat([scores, sink], dim=-1)  # takes part in the softmax, has no value
    weights = scores.softmax(dim=-1)[..., :tokens]
    weights = nn.functional.dropout(weights, dropout).reshape(shared, -1, tokens)
    return torch.bmm(weights, value.reshape(shared, tokens, width)).view_as(query)


def _has_varlen(query: Tensor, extras: Extras) -> bool:
    """Whether a kernel for texts of any length is here, on a GPU and in half precision.

    torch has one without dropout, soft cap and sinks; flash-attn has dropout or a soft cap, not
    both, and the backward pass of dropout on every GPU for heads of at most 192.
    """
    _, dropout, softcap, sinks = extras
    if sinks is not None or not _on_half_gpu(query):
        return False
    if dropout > 0 and (softcap is not None or query.shape[-1] > 192):
        return False
    return (dropout == 0 and softcap is None) or is_flash_attn_2_available()


def _on_half_gpu(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, extras: Extras
) -> Tensor:
    """(1, N, H, d) attention of all texts in one kernel."""
    scaling, dropout, softcap, _ = extras
    # Text by text, every length in a batch would be a product of its own, too small for a GPU.
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # (N, heads, d)
    texts = (packed.ends, packed.ends, packed.longest, packed.longest)
    if dropout == 0 and softcap is None:
        from torch.nn.attention.varlen import varlen_attn

        grouped = q.shape[1] != k.shape[1]
        out: Any = varlen_attn(q, k, v, *texts, scale=scaling, enable_gqa=grouped)
    else:
        from flash_attn import flash_attn_varlen_func

        extra = {"dropout_p": dropout} if softcap is None else {"softcap": softcap}
        out = flash_attn_varlen_func(q, k, v, *texts, softmax_scale=scaling, **extra)
    return out[None]  # type: ignore[no-any-return]


def _mask(q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """The family's mask; while a batch is packed, that of one text as long as the longest."""
    packed = _PACKED.get()
    if packed is not None:
        q_length = kv_length = packed.longest
        kwargs |= {"q_offset": 0, "kv_offset": 0, "attention_mask": None}
    return sdpa_mask(q_length=q_length, kv_length=kv_length, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)


def run_packed(model: nn.Module, input_ids: Tensor, packed: Packed) -> Tensor:
    """Last hidden states (N, D) of the real tokens of (B, T) ids."""
    with packed_attention(packed):
        states: Tensor = model(
            input_ids=input_ids[packed.rows, packed.columns][None],
            position_ids=packed.positions[None],
            use_cache=False,
        ).last_hidden_state
    return states[0]


def enable_packing(model: Any) -> str | None:
    """Switch a bidirectional transformer to packed attention, if it gives the same states.

    Args:
        model: a bare transformer. It is left as it was if it cannot be packed.

    Returns:
        None, or why it is not packed.
    """
    before = attention_name(model)
    try:
        model.set_attn_implementation(NAME)
        drift = _packing_drift(model)
        if drift <= TOLERANCE.get(next(model.parameters()).dtype, 5e-2):
            return None
        reason = f"packed and single forwards differ by {drift:.1e}"
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        reason = f"the packed forward fails ({type(error).__name__}: {str(error)[:100]})"
    model.set_attn_implementation(before)
    return reason


@torch.no_grad()
def _packing_drift(model: Any) -> float:
    """Largest relative difference between packed and single forwards of a few texts."""
    words = model.get_input_embeddings().weight
    highest = min(model.config.get_text_config().vocab_size, len(words))
    lengths = (9, 5, 9, 13)  # two of them equal, and not in the order in which they are packed
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(highest, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids, packed = ids.to(words.device), pack(mask.long()).to(words.device)
    with evaluating(model):
        together, drifts = run_packed(model, ids, packed).float(), []
        for row, length in enumerate(lengths):
            alone = model(input_ids=ids[row : row + 1, :length], use_cache=False)
            single = alone.last_hidden_state[0].float()
            drifts.append((together[packed.rows == row] - single).norm() / single.norm())
    return float(torch.stack(drifts).max())  # not the largest of numbers: NaN must win
