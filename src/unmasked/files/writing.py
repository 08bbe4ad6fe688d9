"""Files that are whole or not there: written aside, flushed to the disk, then renamed.

Whatever is killed and however full the disk is, a file that is there is a whole one. Cost: one
fsync a file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from unmasked.errors import OutputError


def aside_of(path: Path) -> Path:
    """Where a file is written before it is renamed.

    The name is fixed, so what a killed process left behind is written over by the next one.
    """
    return path.with_name(f".{path.name}.aside")


@contextmanager
def written_aside(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` that takes its place, safely on disk, when the block ends well.

    Raises:
        OutputError: the disk is full, or the file grew too large for it.
    """
    aside = aside_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if isinstance(error, OutputError) or error.filename not in (None, str(aside), str(path)):
            raise  # the fault of something read meanwhile
        raise not_written(path, error) from error
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file of text, in UTF-8; raises what `written_aside` does."""
    with written_aside(path) as file:
        file.write(text.encode())


def not_written(path: Path, error: OSError) -> OutputError:
    """What is said when a write fails."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = " Fix: make room, and run the same command again." if full else ""
    return OutputError(f"{path} cannot be written: {error.strerror or error}.{fix}")


def _sync_folder(folder: Path) -> None:
    """Make the renames in a folder survive a loss of power, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
