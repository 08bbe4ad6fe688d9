"""Many devices: who speaks and writes, and who waits.

``torchrun`` and ``accelerate launch`` start the same command once per device and tell each process
its rank. The first one scores, prints and writes; the others train along. On one device everything
here is a constant.
"""

from __future__ import annotations

import atexit
import gc
import os
from datetime import timedelta

import torch
from torch import distributed

from unmasked.errors import RecipeError

LONGEST_WAIT = timedelta(days=1)
"""How long the others wait for the first process, which may be scoring."""


def world() -> int:
    """How many processes were started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process scores, prints and writes."""
    return rank() == 0


def join() -> None:
    """Meet the other processes; returns at once where there are none."""
    if world() > 1 and not distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
        atexit.register(leave)


def leave() -> None:
    """Part from the other processes; without this, gloo may abort or hang a process that ends.

    A model that is shared holds the group too, and must not be the last to: it would end the group
    while it holds the GIL, which gloo's threads wait for.
    """
    gc.collect()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def wait() -> None:
    """Until every process is here."""
    if distributed.is_initialized():
        distributed.barrier()


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any process; all of them must ask."""
    if not distributed.is_initialized():
        return flag
    shared = torch.tensor(int(flag), device=device)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return bool(shared.item())


def rows_per_device(batch_size: int, key: str) -> int:
    """A device's share of a batch, so that a recipe takes the same steps on any number of them.

    Raises:
        RecipeError: the batch does not divide.
    """
    if batch_size % world():
        below = batch_size // world() * world()
        near = [str(n) for n in (below, below + world()) if n]
        raise RecipeError(
            f"{key}: {batch_size} rows do not divide among {world()} devices. "
            f"Fix: {key}={' or '.join(near)}."
        )
    return batch_size // world()


def micro_batch(rows: int, most: int) -> int:
    """The largest part of `rows`, at most `most`, that divides them."""
    return next(size for size in range(max(1, min(rows, most)), 0, -1) if rows % size == 0)
