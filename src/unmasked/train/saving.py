"""What a stage trains, on disk and back: the adapter, or every weight where there is none.

Weights that are shared among devices (FSDP2) are gathered to be written, so that what lies on disk
is the same for any number of devices, and cut again into the shards of whoever reads it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import OPTIMIZER_NAME_BIN, SCHEDULER_NAME

from unmasked.checkpoint import adapters
from unmasked.errors import RecipeError

FULL_NAME = "model.safetensors"


def gather(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, whole and on the CPU, by the names it is saved under.

    Every process must ask, as each has a part of sharded weights; the first alone gets an answer.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    if isinstance(model, PeftModel):
        return adapters.adapter_state(model, state)
    once = {id(value): name for name, value in model.state_dict(keep_vars=True).items()}
    return {name: state[name].contiguous() for name in once.values() if name in state}


def save(model: nn.Module, folder: str | Path, state: dict[str, Tensor]) -> None:
    """Write what `gather` gave."""
    if isinstance(model, PeftModel):
        adapters.save_adapter(model, folder, state)
    else:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(state, str(Path(folder) / FULL_NAME), metadata={"format": "pt"})


def load(model: nn.Module, folder: str | Path) -> None:
    """Read what `save` wrote into the same kind of model, sharded or not."""
    if isinstance(model, PeftModel):
        state = load_file(str(Path(folder) / adapters.WEIGHTS_NAME))
        held = adapters.adapter_state(model)
        adapters.load_adapter_state(model, _placed(state, held), str(folder))
    else:
        fill(model, load_file(str(Path(folder) / FULL_NAME)))


def fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put what was gathered from a model without an adapter into one like it, sharded or not."""
    held = model.state_dict()  # names that share a weight are in `state` but once
    model.load_state_dict(held | _placed(state, held))


def _placed(state: dict[str, Tensor], held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole weights, cut as those that a model holds."""
    return {
        name: distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
        if isinstance(like := held.get(name), DTensor)
        else value
        for name, value in state.items()
    }


def unfilled_copy(model: nn.Module) -> nn.Module:
    """The same model with weights of its own, on the CPU and of any value, for `fill`."""
    apart = {id(p): nn.Parameter(torch.empty_like(p, device="cpu")) for p in model.parameters()}
    return copy.deepcopy(model, apart)


def save_optimizer(trainer: Any, folder: str) -> None:
    """Optimiser and scheduler of a `Trainer` with sharded weights, as it reads them itself.

    It would also write the whole model beside them.
    """
    plugin = trainer.accelerator.state.fsdp_plugin
    save_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, trainer.model, folder)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), Path(folder) / SCHEDULER_NAME)


def check_optimizer(trainer: Any, checkpoint: Path) -> None:
    """Refuse an optimiser that was saved by name where one is read by number, or the other way.

    Raises:
        RecipeError: weights were shared before and are not now, or are now and were not.
    """
    before = (checkpoint / OPTIMIZER_NAME_BIN).exists()
    if before != trainer.is_fsdp_enabled:
        raise RecipeError(
            f"{checkpoint} was made {'with' if before else 'without'} weights shared among devices "
            f"(FSDP). Fix: start the run as before, on any number of devices, or remove "
            f"{checkpoint} to begin this stage again."
        )
