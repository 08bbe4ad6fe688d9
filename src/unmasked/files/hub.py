"""Streams data sets of the Hugging Face hub by their name; nothing is downloaded to disk first.

Cost: importing `datasets` when a data set is read; every pass over it goes through the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from unmasked.errors import DataError

HUB = "hf:"  # the prefix of data sets on the hub: ``hf:OWNER/NAME``, ``hf:OWNER/NAME:SUBSET:SPLIT``


def hub_parts(path: str) -> tuple[str, ...]:
    """Name, subset and split of ``hf:NAME:SUBSET:SPLIT``; those that are not given are empty."""
    return (*path.removeprefix(HUB).split(":"), "", "")[:3]


def hub_rows(path: str) -> Any:
    """A data set of the hub, streamed: a ``datasets.IterableDataset``."""
    from datasets import load_dataset

    word, subset, split = hub_parts(path)
    with named_hub_errors(path):
        return load_dataset(word, subset or None, split=split or "train", streaming=True)


@contextmanager
def named_hub_errors(path: str) -> Iterator[None]:
    """Turn an error of `datasets` in the block into a `DataError` that names the data set."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # bases of the errors of `datasets`
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: cannot be read as a Hugging Face data set: {error}. "
            "Fix: check its name, subset and split; a file needs its suffix."
        ) from error
