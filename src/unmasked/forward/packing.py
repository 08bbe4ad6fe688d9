"""Attention over texts laid end to end, so that padding never reaches the network.

With the causal mask off, transformers separates packed texts in no backend but flash attention:
resetting position ids silently lets texts attend to each other. So this module registers an
attention function of its own, which transformers calls in place of its own ones. While a batch is
packed it attends text by text: texts of equal length as one batch of plain SDPA, or all at once
with `torch.nn.attention.varlen` on GPU, or flash-attn, if installed, for dropout or a soft cap.
Otherwise it is SDPA with the mask it is given.

A sliding window is drawn by the family's own mask code, once for the longest text of the batch;
windows look the same from every token, so shorter texts take the corner of it.

Whether a family may be packed is not listed anywhere: `packing_drift` compares packed with single
forwards on the loaded model. Measured on CPU: `benchmarks/encode.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils.import_utils import is_flash_attn_2_available

NAME = "unmasked"
"""The attention implementation registered here."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest relative difference between packed and single; 5e-2 in half precision."""

DROPOUT_HEAD = 192  # the widest head whose backward pass has dropout in flash-attn on every GPU

LONG = 64
"""Tokens from which bfloat16 attention on CPU is faster as two matrix products than as SDPA."""


@dataclass(frozen=True)
class Layout:
    """Where the texts of a packed batch lie, longest first.

    The order matters: some families cut their mask where positions restart, and `_mask` draws
    it over the first tokens, which are then one text.

    Attributes:
        groups: (first token, texts, length) of each run of texts of equal length.
        tokens: N, the tokens of all texts.
        ends: (B + 1,) int32 token offsets, from 0 to N.
    """

    groups: tuple[tuple[int, int, int], ...]
    tokens: int
    ends: Tensor

    @property
    def longest(self) -> int:
        return self.groups[0][2]


@dataclass(frozen=True)
class Packed:
    """How the real tokens of a padded (B, T) batch are laid end to end.

    Attributes:
        rows, columns: (N,) where each packed token stands in the padded batch.
        positions: (N,) its position in its text, from 0.
        layout: where the texts lie.
    """

    rows: Tensor
    columns: Tensor
    positions: Tensor
    layout: Layout

    def to(self, device: torch.device) -> Packed:
        """The same plan on a device; from pinned memory without waiting."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Packed:
        """The same plan in memory that a GPU copies from by itself."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Packed:
        layout = replace(self.layout, ends=change(self.layout.ends))
        return Packed(change(self.rows), change(self.columns), change(self.positions), layout)


_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def packed_attention(layout: Layout | None) -> Iterator[None]:
    """Attention inside the block separates the texts of a layout."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`: the recomputed forward sees the layout of the first one."""
    return nullcontext(), packed_attention(_LAYOUT.get())


def pack(attention_mask: Tensor) -> Packed:
    """Plan the packing of a padded batch, on the CPU; one copy of the mask if it is elsewhere.

    Args:
        attention_mask: (B, T), 1 for real tokens; padding on either side.
    """
    mask = attention_mask.cpu()
    lengths = mask.sum(dim=1)  # (B,)
    order = lengths.argsort(descending=True, stable=True)
    layout = _lay_out(lengths[order])
    sorted_rows, columns = mask[order].nonzero(as_tuple=True)
    positions = torch.arange(layout.tokens) - layout.ends[sorted_rows]
    return Packed(order[sorted_rows], columns, positions, layout).to(attention_mask.device)


def _lay_out(lengths: Tensor) -> Layout:
    """The layout of texts of these (B,) lengths, longest first."""
    ends = lengths.new_zeros(len(lengths) + 1, dtype=torch.int32)
    ends[1:] = lengths.cumsum(0)
    groups, start = [], 0
    for length, same in groupby(lengths.tolist()):
        texts = len(list(same))
        groups.append((start, texts, length))
        start += texts * length
    return Layout(tuple(groups), start, ends)


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
    """Bidirectional attention, packed or not, as transformers calls it.

    Args:
        module: the attention layer (unused).
        query: (B, H, T, d); B is 1 and T is N while a batch is packed.
        key, value: (B, G, T, d), G key-value heads for H query heads.
        attention_mask: bool, True where a query may look; (1, 1, longest, longest) while packed.
        scaling, dropout, softcap, s_aux: as in transformers.

    Returns:
        (B, T, H, d) and no weights.
    """
    del module
    extras = (scaling, dropout, softcap, s_aux)
    layout = _LAYOUT.get()
    if layout is None:
        return _attend(query, key, value, attention_mask, *extras).transpose(1, 2), None
    plain = attention_mask is None and s_aux is None and _on_half_gpu(query)
    if plain and _has_varlen(query.shape[-1], dropout, softcap):
        return _attend_varlen(query, key, value, layout, scaling, dropout, softcap), None
    parts = []
    for start, texts, length in layout.groups:
        q, k, v = (
            x[0, :, start : start + texts * length].unflatten(1, (texts, length)).transpose(0, 1)
            for x in (query, key, value)
        )  # (texts, heads, length, d)
        mask = None if attention_mask is None else attention_mask[..., :length, :length]
        parts.append(_attend(q, k, v, mask, *extras).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(B, H, T, d) attention: SDPA, or written out where SDPA has no word for it or is slow."""
    if softcap is None and sinks is None and not _slow(query, dropout):
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, mask, dropout, scale=scaling, enable_gqa=grouped
        )
    batch, heads, tokens, width = query.shape
    shared = batch * key.shape[1]  # B * G; the queries that share a key stand one below the other
    queries = query.reshape(shared, -1, width)  # (B * G, H / G * T, d)
    keys = key.reshape(shared, tokens, width).transpose(1, 2)
    start = queries.new_empty(1, 1, 1)  # times beta: nothing
    scale = scaling or width**-0.5
    scores = torch.baddbmm(start, queries, keys, beta=0, alpha=scale)
    scores = scores.view(batch, heads, tokens, tokens)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1)[..., :tokens]
    weights = nn.functional.dropout(weights, dropout).reshape(shared, -1, tokens)
    return torch.bmm(weights, value.reshape(shared, tokens, width)).view_as(query)


def _slow(query: Tensor, dropout: float) -> bool:
    """Whether SDPA is slower than two matrix products: on CPU with dropout, or in bfloat16."""
    if query.device.type != "cpu":
        return False
    return dropout > 0 or (query.dtype == torch.bfloat16 and query.shape[2] >= LONG)


def _on_half_gpu(query: Tensor) -> bool:
    """Whether the kernels for texts of any length could run: on a GPU, in half precision."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def _has_varlen(head: int, dropout: float, softcap: float | None) -> bool:
    """Whether a kernel is here: torch's for neither, flash-attn's for one of the two, not both."""
    if dropout > 0 and (softcap is not None or head > DROPOUT_HEAD):
        return False
    return (dropout == 0 and softcap is None) or is_flash_attn_2_available()


def _attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # (N, heads, d)
    texts = (layout.ends, layout.ends, layout.longest, layout.longest)
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
    """The family's mask; while a batch is packed, for one text as long as the longest."""
    layout = _LAYOUT.get()
    if layout is not None:
        q_length = kv_length = layout.longest
        kwargs |= {"q_offset": 0, "kv_offset": 0, "attention_mask": None}
    return sdpa_mask(q_length=q_length, kv_length=kv_length, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)


def run_packed(model: nn.Module, input_ids: Tensor, packed: Packed) -> Tensor:
    """Last hidden states (N, D) of the real tokens of (B, T) ids."""
    with packed_attention(packed.layout):
        states: Tensor = model(
            input_ids=input_ids[packed.rows, packed.columns][None],
            position_ids=packed.positions[None],
            use_cache=False,
        ).last_hidden_state
    return states[0]


@torch.no_grad()
def packing_drift(model: nn.Module) -> float:
    """Largest relative difference between packed and single forwards of a few texts."""
    config: Any = model.config
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = embeddings.weight.device
    generator = torch.Generator().manual_seed(0)
    highest = min(config.get_text_config().vocab_size, len(embeddings.weight))
    lengths = (9, 5, 9, 13)
    ids = torch.randint(highest, (len(lengths), max(lengths)), generator=generator).to(device)
    mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    packed = pack(mask.long())
    was_training = model.training
    model.eval()
    try:
        together = run_packed(model, ids, packed).float()
        worst = 0.0
        for row, length in enumerate(lengths):
            alone = model(input_ids=ids[row : row + 1, :length], use_cache=False)
            single = alone.last_hidden_state[0].float()
            apart = (together[packed.rows == row] - single).norm() / single.norm()
            worst = max(worst, float(apart))
    finally:
        model.train(was_training)
    return worst if worst == worst else float("inf")


def enable_packing(model: Any) -> str | None:
    """Switch a bidirectional transformer to packed attention, if it gives the same states.

    Args:
        model: a bare transformer. Left as it was if it cannot be packed.

    Returns:
        None, or why it is not packed.
    """
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(NAME)
        drift = packing_drift(model)
        tolerance = TOLERANCE.get(next(model.parameters()).dtype, 5e-2)
        if drift <= tolerance:
            return None
        reason = f"packed and single forwards differ by {drift:.1e}"
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        reason = f"the packed forward fails ({type(error).__name__}: {str(error)[:100]})"
    model.set_attn_implementation(before)
    return reason


def pack_documents(begins: Tensor) -> Packed:
    """Plan the packing of blocks that hold several documents each, with no padding.

    Args:
        begins: (B, T) bool, where a document begins; true in the first column.
    """
    starts = begins.flatten().nonzero()[:, 0]  # (D,)
    lengths = torch.diff(starts, append=starts.new_tensor([begins.numel()]))
    order = lengths.argsort(descending=True, stable=True)
    layout = _lay_out(lengths[order])
    document = torch.repeat_interleave(lengths[order])  # (N,)
    positions = torch.arange(layout.tokens, device=begins.device) - layout.ends[document]
    source = starts[order][document] + positions
    width = begins.shape[1]
    return Packed(source // width, source % width, positions, layout)
