"""Many devices: which process writes, which ones wait, and what they share.

``torchrun`` and ``accelerate launch`` start the same command once per device and tell each process
its rank. The first one scores, prints and writes; the others train along. On one device everything
here is a constant.
"""

from __future__ import annotations

import atexit
import gc
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, disable_fsdp_ram_efficient_loading
from torch import Tensor, distributed, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from unmasked.checkpoint.adapters import bare
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
    if world() == 1:
        return
    disable_fsdp_ram_efficient_loading()
    if not distributed.is_initialized():
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


def most(number: int, device: torch.device) -> int:
    """The largest number of any process; every process must give one."""
    if not distributed.is_initialized():
        return number
    shared = torch.tensor(number, device=device)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return int(shared.item())


def mean(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The means of scalars over all processes, each of which must give the same names."""
    names = sorted(values)
    shared = torch.stack([values[name].double().to(device) for name in names])
    distributed.all_reduce(shared)
    return dict(zip(names, shared / world(), strict=True))


def rows_per_device(batch_size: int, key: str) -> int:
    """A device's share of a batch, so that a recipe takes the same steps on any number of them.

    Raises:
        RecipeError: the batch cannot be divided.
    """
    if batch_size % world():
        below = batch_size // world() * world()
        near = [str(n) for n in (below, below + world()) if n]
        raise RecipeError(
            f"{key}: {batch_size} rows cannot be divided among {world()} devices. "
            f"Fix: {key}={' or '.join(near)}."
        )
    return batch_size // world()


def micro_batch(rows: int, most: int) -> int:
    """The largest part of `rows`, at most `most`, that divides them."""
    return next(size for size in range(max(1, min(rows, most)), 0, -1) if rows % size == 0)


def peak_memory(device: torch.device) -> int:
    """Highest number of bytes so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` counts the memory of the parent, too
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


# Shared weights (FSDP2)


def check_sharding(wanted: bool, key: str) -> None:
    """Refuse to share weights (FSDP) where there are no devices to share them among.

    Args:
        wanted: whether the recipe asks for it; `accelerate launch` may have, too.
        key: of the recipe.

    Raises:
        RecipeError: one process, or several on CPUs, where accelerate would keep them whole.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if world() == 1:
        here = "one process" if wanted else ""
    else:
        on_cpus = PartialState().distributed_type == DistributedType.MULTI_CPU
        here = "no accelerator" if on_cpus and (wanted or launched) else ""
    if here:
        raise RecipeError(
            "weights are shared (FSDP) among the processes of several accelerators, but here is "
            f"{here}. Fix: leave out {key} and --use_fsdp, or run it on a machine that has them."
        )


def prepare_sharding(trainer: Any, model: nn.Module, name: str) -> None:
    """Where a trainer shares weights (FSDP2), have it do so layer by layer.

    accelerate looks for the names of the layers on the model that is trained, which is a module
    around the transformer; a model that is not divided into layers is gathered whole in every
    forward. State is gathered on the first process, so that a checkpoint does not depend on the
    number of devices. Every process loads all weights first: they are proved before they are cut.

    Args:
        trainer: a transformers `Trainer`.
        model: the trunk that it trains.
        name: of the stage.

    Raises:
        RecipeError: FSDP1, FSDP's own activation checkpointing, or weights of 4 bits.
    """
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise RecipeError(
            f"{name}: FSDP{plugin.fsdp_version} is asked for, but only FSDP2 is supported. "
            "Fix: accelerate launch --use_fsdp --fsdp_version 2, or "
            f"{name}.trainer.fsdp_config.version=2."
        )
    if plugin.activation_checkpointing:  # accelerate gives it preserve_rng_state=False
        raise RecipeError(
            f"{name}: FSDP's activation checkpointing computes a layer again with other dropout, "
            "so gradients would be wrong. Fix: leave it out, and "
            f"{name}.gradient_checkpointing=true."
        )
    if not all(p.is_floating_point() for p in model.parameters()):
        raise RecipeError(
            f"{name}.lora.method qlora: FSDP does not share weights of 4 bits, every device would "
            "have all of them. Fix: accelerate launch --multi_gpu, or lora.method lora."
        )
    plugin.auto_wrap_policy = plugin.auto_wrap_policy or transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or _layers(model)
    plugin.cpu_ram_efficient_loading = False
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")


def _layers(model: nn.Module) -> list[str]:
    """Names of the classes of a trunk's layers: the list of modules that has most of its weights.

    Of the 158 families that could be compared, text decoders agree with the layers transformers
    names. Where the largest list is of another modality (phi4_multimodal, git), that is taken.
    """

    def weights(modules: nn.ModuleList) -> int:
        return sum(p.numel() for p in modules.parameters())

    lists = [m for m in bare(model).modules() if isinstance(m, nn.ModuleList)]
    return sorted({type(layer).__name__ for layer in max(lists, key=weights, default=())})


@contextmanager
def own_environment() -> Iterator[None]:
    """What accelerate notes in the environment about sharing weights holds for the block only."""
    names = ("ACCELERATE_USE_FSDP", "FSDP_")
    before = {name: value for name, value in os.environ.items() if name.startswith(names)}
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith(names)]:
            del os.environ[name]
        os.environ.update(before)
