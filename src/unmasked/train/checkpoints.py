"""Checkpoints on disk: whole or absent.

One is written aside, flushed and renamed, so a folder that has its name has everything in it, and a
kill or a full disk leaves the one before it as it was.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

PROGRESS = "progress.json"
"""In a checkpoint: the sums of a logging interval that was still open."""
ASIDE = "checkpoint.tmp"
"""Folder in which one is written."""


class Checkpoint(NamedTuple):
    """A saved state of a stage, and the step it was saved after."""

    step: int
    path: Path


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of an interrupted stage; one that has its name is whole."""
    found = [
        Checkpoint(int(path.name.rsplit("-", 1)[1]), path)
        for path in folder.glob("checkpoint-*")
        if (path / PROGRESS).is_file()
    ]
    return max(found, default=None)


def put_in_place(written: Path, place: Path) -> None:
    """Flush a finished checkpoint to the disk, give it its name, and remove the older ones."""
    for file in [*written.iterdir(), written]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    shutil.rmtree(place, ignore_errors=True)
    written.replace(place)
    shutil.rmtree(written.parent, ignore_errors=True)
    for older in place.parent.glob("checkpoint-*"):
        if older != place:
            shutil.rmtree(older, ignore_errors=True)


def unsaved(folder: Path, step: int, error: Exception) -> str:
    """What to tell when a checkpoint could not be written."""
    last = last_checkpoint(folder)
    kept = f"the checkpoint of step {last.step} is whole" if last else "there is none before it"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"the checkpoint of step {step} could not be written to {folder} ({reason}); {kept}. "
        "Fix: make room on the disk and run the same command."
    )
