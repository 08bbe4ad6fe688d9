"""The work folder of mining: rows, vectors and search results on the disk.

Every file is written aside and renamed, so that the same command continues after the last complete
one. `facts.json` names the texts and the model that the vectors belong to; with other texts or
another model they are deleted.

Cost: 4 bytes of disk for each number of a vector; 48 bytes of memory per row, and the shards in
use.

Shapes: R rows, N distinct texts, D width.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset

from unmasked.files.writing import write_text, written_aside
from unmasked.train.data.record import digest_of
from unmasked.train.data.texts import key_of

SHARD = 4096
"""Vectors per file, and per block of the search."""
FACTS = "facts.json"
Progress = Callable[[str, int, int], object]
"""Called with the name of a task, how much of it is done, and how much there is."""


class Distinct(NamedTuple):
    """The N distinct texts among R: ``texts[first]``; text i is the ``place[i]``-th of them."""

    first: np.ndarray
    place: np.ndarray


def distinct_keys(keys: np.ndarray) -> Distinct:
    """The distinct keys among R, in the order of their first appearance."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)  # sorted by key
    order = np.argsort(first)
    rank = np.empty_like(order)  # of each key by its first appearance
    rank[order] = np.arange(len(order))
    return Distinct(first[order], rank[inverse])


def keys_of(texts: Dataset, change: Callable[[str], str] = lambda text: text) -> np.ndarray:
    """(R,) numbers of texts, which are equal for texts that `change` makes equal."""
    keys = array("Q")
    for part in texts.iter(SHARD):
        keys.extend(key_of(change(text)) for text in part["text"])
    return np.frombuffer(keys, dtype=np.uint64)


def store_texts(texts: Iterable[str], file: Path) -> str:
    """Write texts to an Arrow file with a column ``text``; returns a digest of them."""
    schema, digests = pa.schema([("text", pa.string())]), list[str]()
    remaining = iter(texts)
    with written_aside(file) as out, pa.ipc.new_stream(out, schema) as writer:
        while chunk := list(islice(remaining, SHARD)):
            writer.write_batch(pa.record_batch([pa.array(chunk, pa.string())], schema=schema))
            digests.append(digest_of(chunk))
    return digest_of(digests)


def begin(folder: Path, facts: dict[str, Any], tell: Callable[[str], object]) -> None:
    """Keep the results in a folder that are still valid, and delete the others.

    Args:
        folder: the work folder, in which the texts have just been stored.
        facts: ``vectors``, which determines the vectors; ``band``, which with them determines the
            search results.
        tell: called with a line about what was deleted.
    """
    file = folder / FACTS
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if before is not None and before != facts:
        same = before["vectors"] == facts["vectors"]
        change = "settings: its vectors are used again" if same else "texts or model: it is cleared"
        tell(f"{folder} was made with other {change}")
        for old in folder.glob("band-*" if same else "*.npy"):
            old.unlink()
    write_text(file, json.dumps(facts) + "\n")


def clear_away(folder: Path) -> None:
    """Remove the folder."""
    shutil.rmtree(folder, ignore_errors=True)


class NumberedArrays:
    """An array of N rows, stored as numbered .npy files of up to `SHARD` rows each.

    Args:
        folder: the folder of the files.
        name: the beginning of their names.
        count: N.
    """

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self.folder, self.name, self.count = folder, name, count

    def __len__(self) -> int:
        return -(-self.count // SHARD)

    def make(
        self, compute: Callable[[int, int], np.ndarray], progress: Callable[[int], object]
    ) -> None:
        """Compute and write the files that do not exist yet.

        Args:
            compute: returns the rows from ``begin`` up to ``end``, which is not included.
            progress: called with the number of rows that are done.
        """
        for number in range(len(self)):
            begin, end = number * SHARD, min((number + 1) * SHARD, self.count)
            if not self._file(number).is_file():
                with written_aside(self._file(number)) as file:
                    np.save(file, compute(begin, end))
            progress(end)

    def load(self, number: int) -> np.ndarray:
        """The rows of one file, memory-mapped."""
        shard: np.ndarray = np.load(self._file(number), mmap_mode="r")
        return shard

    def gather(self, places: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows at the given places, in the order of the places."""
        places = np.asarray(places)
        first = self.load(0)
        found = np.empty((len(places), *first.shape[1:]), first.dtype)
        shards = places // SHARD
        for number in np.unique(shards):
            there = shards == number
            found[there] = self.load(int(number))[places[there] % SHARD]
        return found

    def _file(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:06}.npy"
