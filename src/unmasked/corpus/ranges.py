"""The ranges of int8: measured once, saved, the same for every shard of a folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from unmasked.corpus.encoding import CALIBRATION
from unmasked.corpus.engines import Engine
from unmasked.corpus.manifest import Part
from unmasked.corpus.shards import Job, Stream
from unmasked.errors import DataError, OutputError
from unmasked.files.writing import written_aside

RANGES = "_ranges.npy"


def head_texts(stream: Stream) -> list[str]:
    """The texts that ranges are measured on."""
    return [row.text for row in stream.peek(CALIBRATION) if row.fault is None]


def shared_ranges(
    job: Job, engine: Engine, stream: Stream, part: Part, chosen: Path | None
) -> np.ndarray:
    """The ranges in the folder; whoever comes first puts them there."""
    path = job.folder / RANGES
    given = None if chosen is None else read_ranges(chosen, job.width)
    mine = job.folder / f"._ranges-{part[0]}-of-{part[1]}.npy"
    mine.unlink(missing_ok=True)  # of a run that was killed
    if not path.is_file():
        ranges = given
        if ranges is None:
            texts = head_texts(stream)
            ranges = engine.ask(lambda model: job.encoding.calibrate(model, texts, job.window))
        _save_first(path, ranges, mine)
    there = read_ranges(path, job.width)
    if given is not None and not np.array_equal(given, there):
        raise OutputError(f"{path} holds other ranges than {chosen}. Fix: a new folder.")
    return there


def read_ranges(path: Path, width: int) -> np.ndarray:
    """Those of a file; `DataError` if it holds something else."""
    try:
        ranges = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} holds no ranges ({error}). Fix: _ranges.npy of a run.") from error
    if ranges.shape != (2, width) or ranges.dtype.kind != "f" or not np.isfinite(ranges).all():
        given = f"{ranges.dtype} of shape {ranges.shape}"
        raise DataError(f"{path} is {given}. Fix: (2, {width}) numbers, lowest and highest.")
    return np.ascontiguousarray(ranges, dtype="<f4")


def save_ranges(path: Path, ranges: np.ndarray) -> None:
    """Write them, whole."""
    with written_aside(path) as file:
        np.save(file, ranges)


def _save_first(path: Path, ranges: np.ndarray, mine: Path) -> None:
    """Write them, unless another machine puts its own there meanwhile."""
    save_ranges(mine, ranges)
    try:
        os.link(mine, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        mine.replace(path)
    mine.unlink(missing_ok=True)
