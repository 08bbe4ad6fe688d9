"""Whether a loaded model may be packed: packed and single forwards are compared as they will run.

There is no list of families that can be packed. `enable_packing` runs a few texts of 1 to 200
tokens one by one through the family's own attention, and packed through ours, in the current
precision (autocast included) and with the kernel for that precision. It asks two questions:

* Are the states of a text the same as when it runs alone? They can only agree up to rounding: in
  bfloat16 the states of a sound decoder of 32 layers differ by 0.05 between a text alone and the
  same text in a padded batch. So that difference is measured too, and the limit is relative to it.
* Do the states of a text change if the other texts do? Only the tokens of the others change, so a
  sound model rounds in the same way and the states do not change at all, at any depth and
  precision, except where the other texts change which numbers are multiplied together (mixtures of
  experts). This finds a leak of a hundredth, which the first question misses in a deep model.

The cost is eleven forwards, of a thousand tokens in all, once for each device and precision. If a
GPU kernel fails or differs, attention runs once for each length of text; if that differs too,
batches stay padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unmasked.errors import ModelError
from unmasked.forward.packing.attending import (
    ALL,
    AT_ONCE,
    NAME,
    REACHES,
    Reaches,
    reading_reaches,
    run_packed,
)
from unmasked.forward.packing.dense import Extras, attend_by_text
from unmasked.forward.packing.layout import pack
from unmasked.forward.packing.ragged import attend_at_once, find_kernel, on_half_gpu
from unmasked.mask.opening import attention_name
from unmasked.mask.proof import evaluating

LENGTHS = (9, 5, 200, 1, 64, 9, 2)
"""Tokens of the texts: two of equal length, and not in the order in which they are packed."""
PADDED = (0, 1, 4)
"""Indices of the texts that also run in a padded batch, to measure how the model rounds."""

FLOOR = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Differences of packed and single states that are always accepted; 2e-2 in other precisions."""
SLACK = 2
"""Packed states may differ from single ones by this many times as much as padded ones do."""

CHECKED, UNPACKED = "packed_checked", "unpacked_attention"
"""Attributes of a model: (device, dtype) pairs that passed, and the family's own attention."""

FAILURES = (RuntimeError, ModelError, ValueError, TypeError, AttributeError, IndexError)


def running_as(model: Any) -> tuple[str, torch.dtype]:
    """Device type and dtype in which a model's attention would run now."""
    weight = model.get_input_embeddings().weight
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return kind, torch.get_autocast_dtype(kind)
    return kind, weight.dtype


def is_checked(model: Any) -> bool:
    """Whether `enable_packing` has accepted a model on its current device and precision."""
    return running_as(model) in getattr(model, CHECKED, ())


def enable_packing(model: Any) -> str | None:
    """Switch a bidirectional transformer to packed attention, if it gives the same states.

    Args:
        model: a bare transformer, perhaps switched before, in another precision. If it cannot be
            packed, it gets the attention of its family back.

    Returns:
        None, or the reason why it is not packed.
    """
    before = attention_name(model)
    before = getattr(model, UNPACKED, before) if before == NAME else before
    kind, dtype = running_as(model)
    at_once = on_half_gpu(torch.empty(0, device=model.device, dtype=dtype))
    reason: str | None = None
    for attempt in (True, False) if at_once else (True,):
        setattr(model, AT_ONCE, attempt)
        try:
            reason = _compare(model, before)
        except FAILURES as error:
            reason = f"the packed forward fails ({type(error).__name__}: {str(error)[:100]})"
        if reason is None:
            setattr(model, UNPACKED, before)
            setattr(model, CHECKED, {*getattr(model, CHECKED, ()), (kind, dtype)})
            return None
    model.set_attn_implementation(before)
    return reason


@torch.no_grad()
def _compare(model: Any, before: str) -> str | None:
    """Why the packed states of a few texts are not accepted; None if they are."""
    ids, mask = sample_texts(model)
    packed = pack(mask).to(ids.device)
    with evaluating(model):
        with _attending(model, before):
            texts = zip(ids, mask.sum(dim=1).tolist(), strict=True)
            alone = [_states(model, row[None, :length])[0] for row, length in texts]
            rows = list(PADDED)
            width = int(mask[rows].sum(dim=1).max())
            beside = _states(model, ids[rows, :width], mask[rows, :width].to(ids.device))
        model.set_attn_implementation(NAME)
        reaches = _confirmed_reaches(model, ids[:1, : LENGTHS[0]])
        setattr(model, REACHES, reaches)
        together = run_packed(model, ids, packed).float()  # (N, D)
        # Change every second text in the packed order, so that each other one has new neighbours.
        others = torch.zeros(len(mask), dtype=torch.bool)
        others[mask.sum(dim=1).argsort(descending=True, stable=True)[::2]] = True
        changed = ids.where(~others.to(ids.device)[:, None], ids.flip(1).roll(1, dims=0))
        again = run_packed(model, changed, packed).float()
    tokens_of = [packed.rows == row for row in range(len(mask))]
    rounding = _largest(
        [_difference(beside[i, : len(alone[row])], alone[row]) for i, row in enumerate(rows)]
    )
    drift = _largest(
        [_difference(together[at], one) for at, one in zip(tokens_of, alone, strict=True)]
    )
    unchanged = [tokens_of[row] for row in range(len(mask)) if not others[row]]
    leak = _largest([_difference(again[at], together[at]) for at in unchanged])
    floor = FLOOR.get(running_as(model)[1], 2e-2)
    limit = max(floor, SLACK * rounding)
    if not drift <= limit:  # also for NaN
        return (
            f"packed and single forwards differ by {drift:.1e} (limit {limit:.0e}; padded and "
            f"single ones by {rounding:.1e})"
        )
    if not leak <= max(floor / 10, rounding):
        return (
            f"packed texts see each other: the states of one change by {leak:.1e} with the others"
        )
    return None


def sample_texts(model: Any) -> tuple[Tensor, Tensor]:
    """Random ids (B, T) on the model's device, and their mask (B, T) on the host."""
    embeddings, config = model.get_input_embeddings().weight, model.config.get_text_config()
    vocabulary = min(config.vocab_size, len(embeddings))
    positions = getattr(config, "max_position_embeddings", None) or max(LENGTHS)
    lengths = torch.tensor(LENGTHS).clamp(max=positions)
    generator = torch.Generator().manual_seed(0)
    width = int(lengths.max())
    ids = torch.randint(vocabulary, (len(lengths), width), generator=generator)
    return ids.to(embeddings.device), (torch.arange(width) < lengths[:, None]).long()


@contextmanager
def _attending(model: Any, name: str) -> Iterator[None]:
    """Run a model with another attention implementation inside the block."""
    current = attention_name(model)
    if name != current:
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        if name != current:
            model.set_attn_implementation(current)


def _states(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    outputs = model(input_ids=ids, attention_mask=mask, use_cache=False)
    states: Tensor = outputs.last_hidden_state.float()
    return states


def _difference(found: Tensor, expected: Tensor) -> Tensor:
    relative: Tensor = (found - expected).norm() / expected.norm()
    return relative


def _largest(numbers: list[Tensor]) -> float:
    return float(torch.stack(numbers).max())  # unlike Python's max, this returns NaN if one is NaN


def _confirmed_reaches(model: Any, ids: Tensor) -> Reaches:
    """The reaches of windows, read from the family's own mask and confirmed for the kernel."""
    probe = torch.empty(1, 1, 1, 64, device=ids.device, dtype=running_as(model)[1])
    if not getattr(model, AT_ONCE) or find_kernel(probe, Extras()) is None:
        return {}
    with reading_reaches() as found:
        _states(model, ids)
    return {
        size: reach for size, reach in found.items() if reach == ALL or _kernel_agrees(probe, reach)
    }


def _kernel_agrees(probe: Tensor, reach: tuple[int, int]) -> bool:
    """Whether the kernel's window is the same as a mask's, for texts longer than the window."""
    lengths = torch.tensor([sum(reach) + 9, max(reach) + 2, 3])
    packed = pack((torch.arange(int(lengths.max())) < lengths[:, None]).long()).to(probe.device)
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, 1, len(packed.rows), probe.shape[-1])
    q, k, v = torch.randn(shape, generator=generator).to(probe)  # (1, 1, N, d) each
    extras = Extras(reach=reach)
    kernel = find_kernel(q, extras)
    if kernel is None:
        return False
    try:
        found = attend_at_once(kernel, q, k, v, packed, extras)
    except (RuntimeError, TypeError, ValueError):
        return False
    expected = attend_by_text(q, k, v, None, packed, extras)
    return float(_difference(found.float(), expected.float())) < 0.02
