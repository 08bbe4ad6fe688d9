"""Data sets of the Hugging Face hub by their name, streamed: nothing is copied to the disk first.

Cost: importing `datasets` when one is read; every reading passes over the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from unmasked.errors import DataError

HUB = "hf:"
"""Before the name of a Hugging Face data set: ``hf:OWNER/NAME``, ``hf:OWNER/NAME:SUBSET:SPLIT``."""


def hub_parts(path: str) -> tuple[str, ...]:
    """Name, subset and split of ``hf:NAME:SUBSET:SPLIT``, empty where they are not given."""
    return (*path.removeprefix(HUB).split(":"), "", "")[:3]


def hub_rows(path: str) -> Any:
    """A data set of the hub, streamed: a ``datasets.IterableDataset``.

    Raises:
        DataError: it cannot be read.
    """
    from datasets import load_dataset

    word, subset, split = hub_parts(path)
    with told_of_hub(path):
        return load_dataset(word, subset or None, split=split or "train", streaming=True)


@contextmanager
def told_of_hub(path: str) -> Iterator[None]:
    """Say of which data set an error of the block is.

    Raises:
        DataError: in place of whatever `datasets` raises.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # its own are of many kinds, below these
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: cannot be read as a Hugging Face data set: {error}. "
            "Fix: check its name, subset and split; a file needs its suffix."
        ) from error
