"""Whether a loaded model may be packed: packed and single forwards are compared as they will run.

No list says which families can be packed. `enable_packing` runs a few texts of 1 to 200 tokens one
by one through the family's own attention, and packed through ours, at the precision of the moment
(autocast included) and with the kernel that this precision gets. Two things are asked:

* Are the states of a text those that it has alone? Not closer than the model rounds: in bfloat16 a
  sound decoder of 32 layers gives states that differ by 0.05 between one text alone and the same
  text in a padded batch. So the limit is relative to exactly that difference, measured beside it.
* Do the states of a text change when the others beside it do? Nothing but the words of the others
  is changed, so a sound model rounds alike and nothing changes at all, at any depth and precision,
  except where other texts change which numbers are multiplied together (mixtures of experts). This
  finds a leak of a hundredth, which the first question cannot see in a deep model.

The cost is eleven forwards, of a thousand tokens in all, once for each device and precision. Where
a kernel of the GPU fails or differs, texts go one length at a time; where that differs, batches
stay padded.
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
"""The texts that are also run in a padded batch, to see how the model rounds."""

FLOOR = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Differences of packed and single states that are always accepted; 2e-2 in other precisions."""
SLACK = 2
"""Packed states may differ from single ones by this many times what padded ones do."""

CHECKED, UNPACKED = "packed_checked", "unpacked_attention"

FAILURES = (RuntimeError, ModelError, ValueError, TypeError, AttributeError, IndexError)


def running_as(model: Any) -> tuple[str, torch.dtype]:
    """Kind of device and dtype of the attention of a model, here and now."""
    weight = model.get_input_embeddings().weight
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return kind, torch.get_autocast_dtype(kind)
    return kind, weight.dtype


def is_checked(model: Any) -> bool:
    """Whether `enable_packing` has accepted a model as it runs here and now."""
    return running_as(model) in getattr(model, CHECKED, ())


def enable_packing(model: Any) -> str | None:
    """Switch a bidirectional transformer to packed attention, if it gives the same states.

    Args:
        model: a bare transformer, perhaps switched before, at another precision. It has the
            attention of its family if it cannot be packed.

    Returns:
        None, or why it is not packed.
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
    """Why the packed states of a few texts are not what they should be; None if they are."""
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
        together = run_packed(model, ids, packed).float()
        others = torch.zeros(len(mask), dtype=torch.bool)
        others[mask.sum(dim=1).argsort(descending=True, stable=True)[::2]] = True
        changed = ids.where(~others.to(ids.device)[:, None], ids.flip(1).roll(1, dims=0))
        again = run_packed(model, changed, packed).float()
    places = [packed.rows == row for row in range(len(mask))]
    own = _largest([_apart(beside[i, : len(alone[row])], alone[row]) for i, row in enumerate(rows)])
    drift = _largest([_apart(together[at], one) for at, one in zip(places, alone, strict=True)])
    kept = [places[row] for row in range(len(mask)) if not others[row]]
    leak = _largest([_apart(again[at], together[at]) for at in kept])
    floor = FLOOR.get(running_as(model)[1], 2e-2)
    if not drift <= (limit := max(floor, SLACK * own)):
        return (
            f"packed and single forwards differ by {drift:.1e} (limit {limit:.0e}; padded and "
            f"single ones by {own:.1e})"
        )
    if not leak <= (limit := max(floor / 10, own)):
        return (
            f"packed texts see each other: the states of one change by {leak:.1e} with the others"
        )
    return None


def sample_texts(model: Any) -> tuple[Tensor, Tensor]:
    """Random ids (B, T) on the model's device, and their mask on the host."""
    words, config = model.get_input_embeddings().weight, model.config.get_text_config()
    highest = min(config.vocab_size, len(words))
    most = getattr(config, "max_position_embeddings", None) or max(LENGTHS)
    lengths = torch.tensor(LENGTHS).clamp(max=most)
    generator = torch.Generator().manual_seed(0)
    width = int(lengths.max())
    ids = torch.randint(highest, (len(lengths), width), generator=generator)
    return ids.to(words.device), (torch.arange(width) < lengths[:, None]).long()


@contextmanager
def _attending(model: Any, name: str) -> Iterator[None]:
    now = attention_name(model)
    if name != now:
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        if name != now:
            model.set_attn_implementation(now)


def _states(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    outputs = model(input_ids=ids, attention_mask=mask, use_cache=False)
    states: Tensor = outputs.last_hidden_state.float()
    return states


def _apart(found: Tensor, wanted: Tensor) -> Tensor:
    apart: Tensor = (found - wanted).norm() / wanted.norm()
    return apart


def _largest(numbers: list[Tensor]) -> float:
    return float(torch.stack(numbers).max())  # not Python's largest: NaN must win


def _confirmed_reaches(model: Any, ids: Tensor) -> Reaches:
    """How far windows reach, as read off the family's own mask, where a kernel agrees."""
    probe = torch.empty(1, 1, 1, 64, device=ids.device, dtype=running_as(model)[1])
    if not getattr(model, AT_ONCE) or find_kernel(probe, Extras()) is None:
        return {}
    with reading_reaches() as found:
        _states(model, ids)
    return {
        size: reach for size, reach in found.items() if reach == ALL or _kernel_agrees(probe, reach)
    }


def _kernel_agrees(probe: Tensor, reach: tuple[int, int]) -> bool:
    """Whether the kernel's window is that of a mask, for texts that are longer than it reaches."""
    lengths = torch.tensor([sum(reach) + 9, max(reach) + 2, 3])
    packed = pack((torch.arange(int(lengths.max())) < lengths[:, None]).long()).to(probe.device)
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, 1, len(packed.rows), probe.shape[-1])
    q, k, v = torch.randn(shape, generator=generator).to(probe)
    extras = Extras(reach=reach)
    kernel = find_kernel(q, extras)
    if kernel is None:
        return False
    try:
        found = attend_at_once(kernel, q, k, v, packed, extras)
    except (RuntimeError, TypeError, ValueError):
        return False
    return (
        float(_apart(found.float(), attend_by_text(q, k, v, None, packed, extras).float())) < 0.02
    )
