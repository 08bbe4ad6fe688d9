"""Checkpoints: they contain the trained weights only, and an incomplete one does not count.

The trainer writes a checkpoint into a folder named after its step; when everything is on the disk,
a marker is written as the last file. After a kill, or on a full disk, the folder has no marker and
is removed, and the previous checkpoint is untouched. A checkpoint contains the trained weights (an
adapter of a few MB, or all of them), optimiser, scheduler, random state and the callback's sums.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import nn
from transformers.trainer import OPTIMIZER_NAME_BIN
from transformers.utils import SAFE_WEIGHTS_NAME

from unmasked.errors import OutputError, RecipeError, first_line
from unmasked.files.writing import flush, write_text

COMPLETE = "complete"
"""The marker, written last."""


class Checkpoint(NamedTuple):
    """A complete checkpoint of a stage, and the step after which it was saved."""

    step: int
    path: Path


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a stage; None if there is none."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max((Checkpoint(int(p.name.rsplit("-", 1)[1]), p) for p in found), default=None)


def remove_incomplete(folder: Path) -> bool:
    """Remove checkpoints that a kill or a full disk left incomplete; True if there was one."""
    incomplete = [p for p in folder.glob("checkpoint-*") if not (p / COMPLETE).is_file()]
    for path in incomplete:
        shutil.rmtree(path, ignore_errors=True)
    return bool(incomplete)


def complete(path: Path) -> None:
    """Flush a checkpoint to the disk, mark it as complete, and remove the older ones."""
    flush(*path.iterdir())
    write_text(path / COMPLETE, "")  # flushes the folder, too
    for older in path.parent.glob("checkpoint-*"):
        if older != path:
            (older / COMPLETE).unlink(missing_ok=True)  # first: a kill may interrupt the removal
            shutil.rmtree(older, ignore_errors=True)


@contextmanager
def told_if_unsaved(folder: Path) -> Iterator[None]:
    """Within the block, turn a failure to write a checkpoint into an error that users can mend.

    Any exception that leaves an incomplete checkpoint behind counts as such a failure: on a full
    disk torch's writer raises a RuntimeError, and safetensors an error type of its own.

    Raises:
        OutputError: a checkpoint could not be written; says from which one the run will continue.
    """
    try:
        yield
    except Exception as error:
        refused = str(getattr(error, "filename", "")).startswith(str(folder / "checkpoint-"))
        if not (remove_incomplete(folder) or refused):
            raise
        last = last_checkpoint(folder)
        kept = f"The one of step {last.step} is whole" if last else "There is none before it"
        reason = first_line(error)
        if reason.startswith("[enforce fail"):  # torch names a line of its source and two numbers
            reason = "the file was cut short"
        raise OutputError(
            f"a checkpoint could not be written to {folder} ({reason}). {kept}. "
            "Fix: make room on the disk and run the same command."
        ) from error


@contextmanager
def trained_weights_only(model: nn.Module) -> Iterator[None]:
    """Within the block, the state dict of a model has only the weights that are trained.

    A trainer saves and loads the state dict, also when the weights are sharded among devices. A
    weight that two modules share, such as a tied head, is in it once.
    """

    def trained() -> set[str]:  # `named_parameters` names a shared weight once
        return {name for name, weight in model.named_parameters() if weight.requires_grad}

    def keep_trained(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        kept = {prefix + name for name in trained()}
        for name in list(state):
            if name in kept:
                state[name] = state[name].contiguous()  # safetensors refuses other tensors
            else:
                del state[name]

    def forget_frozen(_: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = trained() & set(keys.missing_keys)

    hooks = [
        model.register_state_dict_post_hook(keep_trained),
        model.register_load_state_dict_post_hook(forget_frozen),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def load(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the weights of a checkpoint; to be called in a block of `trained_weights_only`."""
    model.load_state_dict(load_file(checkpoint.path / SAFE_WEIGHTS_NAME))


def check_optimizer(trainer: Any, checkpoint: Path) -> None:
    """Refuse a checkpoint with FSDP when resuming without it, and the reverse.

    With FSDP the optimiser's state refers to parameters by name, without it by number.

    Raises:
        RecipeError: the checkpoint was made with the other setting.
    """
    with_fsdp = (checkpoint / OPTIMIZER_NAME_BIN).exists()
    if with_fsdp != trainer.is_fsdp_enabled:
        raise RecipeError(
            f"{checkpoint} was made {'with' if with_fsdp else 'without'} weights sharded among "
            "devices (FSDP). Fix: start the run as before, on any number of devices, or remove "
            f"{checkpoint} to begin this stage again."
        )
