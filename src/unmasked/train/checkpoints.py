"""Checkpoints: what is trained and nothing else, and whole or not counted.

The trainer writes one into a folder named after its step; when everything is on the disk, a marker
is written as the last file. So a kill or a full disk leaves a folder without the marker, which is
removed, and the checkpoint before it as it was. A checkpoint holds the weights that are trained
(the adapter, a few MB, or all of them), optimiser, scheduler, random state and the callback's sums.
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
    """A whole checkpoint of a stage, and the step it was saved after."""

    step: int
    path: Path


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a stage."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max((Checkpoint(int(p.name.rsplit("-", 1)[1]), p) for p in found), default=None)


def remove_incomplete(folder: Path) -> bool:
    """Remove what a kill or a full disk left behind; tells whether there was anything."""
    left = [p for p in folder.glob("checkpoint-*") if not (p / COMPLETE).is_file()]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return bool(left)


def complete(path: Path) -> None:
    """Flush a checkpoint to the disk, mark it as whole, and remove the older ones."""
    flush(*path.iterdir())
    write_text(path / COMPLETE, "")  # flushes the folder, too
    for older in path.parent.glob("checkpoint-*"):
        if older != path:
            (older / COMPLETE).unlink(missing_ok=True)  # a kill may come before the rest is gone
            shutil.rmtree(older, ignore_errors=True)


@contextmanager
def told_if_unsaved(folder: Path) -> Iterator[None]:
    """Turn a checkpoint of the block that cannot be written into an error the user can mend.

    Whatever is raised while a checkpoint is begun and not complete is such a failure: on a full
    disk torch's writer raises a RuntimeError, and safetensors an error of its own.

    Raises:
        OutputError: says which checkpoint is whole.
    """
    try:
        yield
    except Exception as error:
        refused = str(getattr(error, "filename", "")).startswith(str(folder / "checkpoint-"))
        if not (remove_incomplete(folder) or refused):
            raise
        last = last_checkpoint(folder)
        kept = f"That of step {last.step} is whole" if last else "There is none before it"
        reason = first_line(error)
        if reason.startswith("[enforce fail"):  # a place in torch's source, and two numbers
            reason = "the file was cut short"
        raise OutputError(
            f"a checkpoint could not be written to {folder} ({reason}). {kept}. "
            "Fix: make room on the disk and run the same command."
        ) from error


@contextmanager
def trained_weights_only(model: nn.Module) -> Iterator[None]:
    """In the block, the state dict of a model has the weights that are trained, each once.

    That is what a trainer saves and loads, however many devices share the weights.
    """

    def trained() -> set[str]:  # a weight that two modules share, such as a tied head, has one name
        return {name for name, weight in model.named_parameters() if weight.requires_grad}

    def keep_trained(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        kept = {prefix + name for name in trained()}
        for name in list(state):
            if name in kept:
                state[name] = state[name].contiguous()  # safetensors writes no other
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
    """Put the weights of a checkpoint into the model, in a block of `trained_weights_only`."""
    model.load_state_dict(load_file(checkpoint.path / SAFE_WEIGHTS_NAME))


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
