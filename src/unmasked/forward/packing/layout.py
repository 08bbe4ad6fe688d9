"""Where the texts of a batch are once they are laid end to end, longest first.

A layout is planned on the host, in the thread that prepares batches, and is passed along with its
batch. It costs one copy of the attention mask, if that is already on a device.

Shapes: B texts, T tokens of the longest, N tokens of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(eq=False)  # if it were frozen, torch 2.11 would compile a graph per number of groups
class Packed:
    """How the N real tokens of a padded (B, T) batch are laid end to end, longest text first.

    The order matters: some families cut their mask where positions restart, and the mask is drawn
    for the first tokens of the batch (`attending`), which must therefore be the longest text.

    Attributes:
        rows, columns: (N,) place of each packed token in the padded batch.
        positions: (N,) its position in its text, from 0.
        ends: (B + 1,) int32 offsets of the texts, from 0 to N.
        groups: (first token, number of texts, length) of each run of texts of equal length. They
            are on the host, so that no forward has to fetch the lengths from the device.
        at_once: whether a kernel may take all texts at once; otherwise attention runs once for
            each length.
    """

    rows: Tensor
    columns: Tensor
    positions: Tensor
    ends: Tensor
    groups: tuple[tuple[int, int, int], ...]
    at_once: bool = True

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.groups[0][2]

    def to(self, device: torch.device) -> Packed:
        """The same layout on a device; the host does not wait if it is in pinned memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Packed:
        """The same layout in pinned memory, which a GPU copies asynchronously."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Packed:
        rows, columns = change(self.rows), change(self.columns)
        positions, ends = change(self.positions), change(self.ends)
        return Packed(rows, columns, positions, ends, self.groups, self.at_once)


def pack(attention_mask: Tensor) -> Packed:
    """Plan the packing of a padded batch, on the CPU.

    Args:
        attention_mask: (B, T), 1 for real tokens; padding on either side.
    """
    mask = attention_mask.cpu()
    lengths = mask.sum(dim=1)  # (B,)
    order = lengths.argsort(descending=True, stable=True)  # (B,) rows, longest first
    ends, groups = _lay_out(lengths[order])
    sorted_rows, columns = mask[order].nonzero(as_tuple=True)  # (N,) each
    positions = torch.arange(len(columns)) - ends[sorted_rows]
    return Packed(order[sorted_rows], columns, positions, ends, groups).to(attention_mask.device)


def pack_documents(begins: Tensor) -> Packed:
    """Plan the packing of blocks that hold several documents each, without padding.

    Args:
        begins: (B, T) bool, true where a document begins; always true in the first column.
    """
    starts = begins.flatten().nonzero()[:, 0]  # (documents,)
    lengths = torch.diff(starts, append=starts.new_tensor([begins.numel()]))
    order = lengths.argsort(descending=True, stable=True)
    ends, groups = _lay_out(lengths[order])
    document = torch.repeat_interleave(lengths[order])  # (N,) place of its document in the order
    positions = torch.arange(begins.numel(), device=begins.device) - ends[document]
    source = starts[order][document] + positions  # (N,) index in the flattened blocks
    width = begins.shape[1]
    return Packed(source // width, source % width, positions, ends, groups)


def pack_blocks(rows: int, length: int, device: torch.device) -> Packed:
    """The layout of blocks without padding, each one text; the host never waits for the device."""
    tokens = torch.arange(rows * length, device=device)
    ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)
    row, column = tokens // length, tokens % length
    return Packed(row, column, column, ends, ((0, rows, length),))


def _lay_out(lengths: Tensor) -> tuple[Tensor, tuple[tuple[int, int, int], ...]]:
    """``ends`` and ``groups`` of `Packed` for the (B,) lengths of texts, longest first."""
    ends = lengths.new_zeros(len(lengths) + 1, dtype=torch.int32)
    ends[1:] = lengths.cumsum(0)
    groups, start = [], 0
    for length, same in groupby(lengths.tolist()):
        texts = len(list(same))
        groups.append((start, texts, length))
        start += texts * length
    return ends, tuple(groups)
