"""What mining keeps on the disk while it is at work: rows, vectors, and what was found.

Every file is whole or not there, so that the same command goes on behind the last one. Vectors
count for the texts and the model that they were made of, which `facts.json` names; other texts
begin anew.

Cost: 4 bytes for each number of a vector. Memory: 48 bytes for each row, and the shards in use.

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
"""Vectors of a file, and of a block of the search."""
FACTS = "facts.json"
Progress = Callable[[str, int, int], object]
"""Told what is being done, how much of it is done, and how much there is."""


class Distinct(NamedTuple):
    """The distinct ones among R texts: where each stands first (N,), and which one each is (R,)."""

    first: np.ndarray
    place: np.ndarray


def distinct_keys(keys: np.ndarray) -> Distinct:
    """The distinct ones of R keys, in the order of their first appearance."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return Distinct(first[order], rank[inverse])


def keys_of(texts: Dataset, change: Callable[[str], str] = lambda text: text) -> np.ndarray:
    """The numbers (R,) of texts; equal for texts that are equal after a change."""
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
    """Go on with what lies in a folder, or clear it where it was made of something else.

    Args:
        folder: with the texts that were just stored.
        facts: ``vectors``, what the vectors depend on; ``band``, what the search also does.
        tell: told what was thrown away.
    """
    file = folder / FACTS
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if before is not None and before != facts:
        same = before["vectors"] == facts["vectors"]
        what = "settings: its vectors are used again" if same else "texts or model: begun anew"
        tell(f"{folder} is of other {what}")
        for old in folder.glob("band-*" if same else "*.npy"):
            old.unlink()
    write_text(file, json.dumps(facts) + "\n")


def clear_away(folder: Path) -> None:
    """Remove the folder."""
    shutil.rmtree(folder, ignore_errors=True)


class NumberedArrays:
    """Arrays of up to `SHARD` rows each, as numbered .npy files, each made once.

    Args:
        folder: where they lie.
        name: what their names begin with.
        count: N, the rows of all.
    """

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self.folder, self.name, self.count = folder, name, count

    def __len__(self) -> int:
        return -(-self.count // SHARD)

    def make(
        self, compute: Callable[[int, int], np.ndarray], progress: Callable[[int], object]
    ) -> None:
        """Make those that are not there.

        Args:
            compute: from the first row and the one behind the last to the array.
            progress: told how many rows are done.
        """
        for number in range(len(self)):
            begin, end = number * SHARD, min((number + 1) * SHARD, self.count)
            if not self._file(number).is_file():
                with written_aside(self._file(number)) as file:
                    np.save(file, compute(begin, end))
            progress(end)

    def load(self, number: int) -> np.ndarray:
        """One of them, mapped from its file."""
        shard: np.ndarray = np.load(self._file(number), mmap_mode="r")
        return shard

    def gather(self, places: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows at some places, in their order."""
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
