"""Many devices: which process writes, which ones wait, and what they share.

``torchrun`` and ``accelerate launch`` start the same command once per device and give each process
its rank. All processes train; the first one also scores, prints and writes. On one device these
functions return constants or do nothing.
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
"""How long the other processes wait for the first one, which may be scoring."""


def world() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process scores, prints and writes."""
    return rank() == 0


def join() -> None:
    """Form a group with the other processes; does nothing in a single process."""
    if world() == 1:
        return
    disable_fsdp_ram_efficient_loading()
    if not distributed.is_initialized():
        PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
        atexit.register(leave)


def leave() -> None:
    """Leave the group of processes; otherwise gloo may abort or hang a process as it exits.

    A sharded model refers to the group, too. If it were the last to do so, its destructor would end
    the group while holding the GIL, for which gloo's threads wait. So it is collected first.
    """
    gc.collect()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def wait() -> None:
    """Wait until every process has called this function."""
    if distributed.is_initialized():
        distributed.barrier()


def most(number: int, device: torch.device) -> int:
    """The maximum of a number over all processes, each of which must call this function."""
    if not distributed.is_initialized():
        return number
    maximum = torch.tensor(number, device=device)
    distributed.all_reduce(maximum, distributed.ReduceOp.MAX)
    return int(maximum.item())


def mean(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The means of scalars over all processes, each of which must give the same names."""
    names = sorted(values)
    sums = torch.stack([values[name].double().to(device) for name in names])
    distributed.all_reduce(sums)
    return dict(zip(names, sums / world(), strict=True))


def rows_per_device(batch_size: int, key: str) -> int:
    """A device's share of a batch, so that a recipe takes the same steps on any number of devices.

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


def micro_batch(rows: int, limit: int) -> int:
    """The largest divisor of `rows` that is at most `limit`."""
    return next(size for size in range(max(1, min(rows, limit)), 0, -1) if rows % size == 0)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where `getrusage` would include the peak of the parent process
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, else kibibytes


# Sharded weights (FSDP2)


def check_sharding(wanted: bool, key: str) -> None:
    """Refuse FSDP where there are no devices to shard the weights among.

    Args:
        wanted: whether the recipe requires FSDP; `accelerate launch --use_fsdp` does, too.
        key: the setting of the recipe, for the error.

    Raises:
        RecipeError: there is one process, or several on CPUs, where accelerate does not shard.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if world() == 1:
        obstacle = "one process" if wanted else ""
    else:
        on_cpus = PartialState().distributed_type == DistributedType.MULTI_CPU
        obstacle = "no accelerator" if on_cpus and (wanted or launched) else ""
    if obstacle:
        raise RecipeError(
            "FSDP shards weights among the processes of several accelerators, but there is "
            f"{obstacle} here. Fix: leave out {key} and --use_fsdp, or run it on a machine that "
            "has several."
        )


def prepare_sharding(trainer: Any, model: nn.Module, name: str) -> None:
    """If a trainer shards weights (FSDP2), make it do so layer by layer.

    accelerate looks for the names of the layer classes on the model that it trains, which here is a
    module around the transformer; without them, each forward would gather all weights at once.
    State is gathered on the first process, so that a checkpoint does not depend on the number of
    devices. Every process loads all weights first, because the mask is proved before sharding.

    Args:
        trainer: a transformers `Trainer`.
        model: the trunk that it trains.
        name: the stage's name, for errors.

    Raises:
        RecipeError: FSDP1, FSDP's own activation checkpointing, or weights of 4 bits.
    """
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise RecipeError(
            f"{name}: FSDP{plugin.fsdp_version} is set, but only FSDP2 is supported. "
            "Fix: accelerate launch --use_fsdp --fsdp_version 2, or "
            f"{name}.trainer.fsdp_config.version=2."
        )
    if plugin.activation_checkpointing:  # accelerate gives it preserve_rng_state=False
        raise RecipeError(
            f"{name}: FSDP's activation checkpointing recomputes a layer with different dropout, "
            "so gradients would be wrong. Fix: leave it out, and set "
            f"{name}.gradient_checkpointing=true."
        )
    if not all(p.is_floating_point() for p in model.parameters()):
        raise RecipeError(
            f"{name}.lora.method qlora: FSDP cannot shard weights of 4 bits, so every device would "
            "have all of them. Fix: accelerate launch --multi_gpu, or "
            f"{name}.lora.method=lora."
        )
    plugin.auto_wrap_policy = plugin.auto_wrap_policy or transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or _layers(model)
    plugin.cpu_ram_efficient_loading = False
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")


def _layers(model: nn.Module) -> list[str]:
    """Names of the classes of a trunk's layers: the `ModuleList` with the most weights.

    For the text decoders among 158 families these are the layers that transformers names itself.
    If the largest list belongs to another modality (phi4_multimodal, git), that list is used.
    """

    def weights(modules: nn.ModuleList) -> int:
        return sum(p.numel() for p in modules.parameters())

    lists = [m for m in bare(model).modules() if isinstance(m, nn.ModuleList)]
    return sorted({type(layer).__name__ for layer in max(lists, key=weights, default=())})


@contextmanager
def own_environment() -> Iterator[None]:
    """Undo what accelerate writes to the environment about FSDP, so that it affects one stage."""
    names = ("ACCELERATE_USE_FSDP", "FSDP_")
    before = {name: value for name, value in os.environ.items() if name.startswith(names)}
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith(names)]:
            del os.environ[name]
        os.environ.update(before)
