"""Atomic writes: files and folders are written under another name, flushed to disk, then renamed.

A process may be killed and a disk may fill up at any time; a file with its final name is complete.

Cost: one `fsync` per file.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from unmasked.errors import OutputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EEXIST, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)


def is_special(path: Path) -> bool:
    """Whether something is there that is neither a file nor a folder, such as a pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


def aside_of(path: Path) -> Path:
    """The name that a file has until it is complete.

    It is always the same, so the next process overwrites the file that a killed process left.
    """
    return path.with_name(f".{path.name}.aside")


@contextmanager
def written_aside(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` that is flushed to disk and renamed to it when the block succeeds.

    A link is followed, as by `open`. A pipe or a device, such as ``/dev/stdout``, is written to:
    renaming would replace it by a file.

    Raises:
        OutputError: the disk is full, the file grew too large, or `path` cannot be written.
    """
    if is_special(path):
        with path.open("wb") as file:
            yield file
        return
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    aside = aside_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        flush(path.parent)
    except OSError as error:
        if isinstance(error, OutputError) or error.filename not in (None, str(aside), str(path)):
            raise  # an error of another file, which the block reads
        raise not_written(path, error) from error
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text, completely or not at all; raises what `written_aside` raises."""
    with written_aside(path) as file:
        file.write(text.encode())


@contextmanager
def folder_aside(
    path: Path, *, aside: Path | None = None, last: Collection[str] = ()
) -> Iterator[Path]:
    """A new folder whose files are flushed to disk and moved to `path` when the block succeeds.

    If `path` does not exist, the new folder is renamed to it. If it does, every new file replaces
    the file of the same name, one after the other, and all other files stay.

    Args:
        path: the folder to create or to update.
        aside: the folder to write in, which is emptied first. By default it is beside `path` and
            has a name that no other process uses.
        last: names of files that are moved after all others, so that their presence shows that
            everything is there.

    Raises:
        OutputError: `path` is a file or cannot be written, or the disk is full.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file. Fix: name a folder.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if aside is None:
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        else:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    except OSError as error:
        raise not_written(path, error) from error
    try:
        aside.chmod(0o755)  # mkdtemp's folders are private
        yield aside
        flush(*aside.rglob("*"), aside)
        if not path.exists():
            aside.replace(path)
        else:
            for item in sorted(aside.rglob("*"), key=lambda item: (item.name in last, item)):
                place = path / item.relative_to(aside)
                place.mkdir(exist_ok=True) if item.is_dir() else item.replace(place)
        flush(path, path.parent)
    except OSError as error:
        ours = error.filename is None or str(error.filename).startswith((str(aside), str(path)))
        if error.errno not in _FULL and not (error.errno in _DENIED and ours):
            raise
        raise not_written(path, error) from error
    except Exception as error:
        # safetensors and others, which are written in other languages, raise their own errors.
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise not_written(path, full) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def flush(*paths: Path) -> None:
    """Flush files and the entries of folders to disk, on systems that can open both by path."""
    for path in paths if os.name == "posix" else ():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def not_written(path: Path, error: OSError) -> OutputError:
    """The error for a write that failed, with a fix by its cause."""
    fix = "name another place"
    if error.errno in _FULL:
        fix = "make room, and run the same command again"
    elif error.errno in _DENIED:
        fix = "name a place that you may write to"
    return OutputError(f"{path} cannot be written: {error.strerror or error}. Fix: {fix}.")


@contextmanager
def folder_for_one(path: Path, lock: str) -> Iterator[None]:
    """Lock a folder for this process during the block; `lock` is the name of the file in it.

    A folder that is created for this, and stays empty, is removed afterwards.

    Raises:
        OutputError: another process holds it.
    """
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    taken = f"another run is at work in {path}. Fix: wait for it, or choose another output folder."
    with locked_by_one(path / lock, taken):
        try:
            yield
        finally:
            if made and {item.name for item in path.iterdir()} == {lock}:
                shutil.rmtree(path)


def locked_by_one(lock: Path, taken: str) -> AbstractContextManager[object]:
    """Hold a lock file during a block; raises `OutputError(taken)` if another process holds it."""
    try:
        return FileLock(lock).acquire(timeout=0)
    except Timeout as error:
        raise OutputError(taken) from error
