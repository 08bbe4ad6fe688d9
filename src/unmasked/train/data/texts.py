"""Texts to train on: read once, split, and for MNTP stored as token ids in a file.

Blank lines are skipped, everything else is taken verbatim. MNTP's corpus may be larger than memory:
it is tokenised as it is read, into a memory-mapped file of int32, so that memory holds 16 bytes per
text. The file is written aside and renamed, and a resumed run uses it again, so nothing is read
twice. `datasets` tokenises as fast, but takes 2.6 times the disk and, for each block, 4 times as
long (84 µs, not 22), and drops the incomplete last block of every batch of texts, not of all texts.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any
from unicodedata import normalize

import numpy as np

from unmasked.errors import DataError
from unmasked.files.training_source import training_source
from unmasked.files.writing import written_aside
from unmasked.text.tokens import TextTokenizer
from unmasked.train.data.record import digest_of, sizes_of

_CHUNK = 4096  # texts tokenised at once


def iterate_texts(paths: Sequence[str | Path], limit: int | None = None) -> Iterator[str]:
    """The texts of files, in order, one at a time.

    Args:
        paths: paths as `training_source` takes them.
        limit: maximum number of texts; None for all.

    Raises:
        DataError: a file is missing, of another kind, not UTF-8, or has no text in it.
    """
    if not paths:
        raise DataError("no training text was given. Fix: data=FILE, or 'data=[FILE, FILE]'.")
    sources = map(training_source, paths)
    yield from islice((text for source in sources for _, text, _ in source.records()), limit)


def read_texts(paths: Sequence[str | Path], limit: int | None = None) -> list[str]:
    """The texts of `iterate_texts` as a list."""
    return list(iterate_texts(paths, limit))


def facts_of(paths: Sequence[str | Path], texts: Sequence[str]) -> dict[str, Any]:
    """A summary of the texts that were read, for `record.write_facts`."""
    files = [file for path in paths for file in training_source(path).files]
    return {"source": digest_of(texts), "texts": len(texts), "files": sizes_of(files)}


def split_held_out(texts: Sequence[str], held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """Texts to train on, and up to `held_out` others (at most a tenth); both shuffled."""
    shuffled = list(dict.fromkeys(texts))  # without repetitions, which could be on both sides
    random.Random(seed).shuffle(shuffled)
    count = min(held_out, len(shuffled) // 10)
    return shuffled[count:], shuffled[:count]


def text_key(text: str) -> bytes:
    """A digest of eight bytes; two different texts have the same with a probability of 2^-64."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def key_of(text: str) -> int:
    """`text_key` as a number."""
    return int.from_bytes(text_key(text), "big")


def folded(text: str) -> str:
    """A text in lower case, with single spaces, in Unicode's NFC: copies become equal."""
    return " ".join(normalize("NFC", text).split()).casefold()


@dataclass(frozen=True)
class TokenFile:
    """N tokens of D texts, each beginning with its own BOS, in the order they were read.

    Attributes:
        ids: (N,) int32, memory-mapped.
        ends: (D + 1,) borders between texts: text i is ``ids[ends[i] : ends[i + 1]]``.
        keys: (D,) numbers of the texts, which are equal for equal texts.
        source: a digest of the texts and the tokenizer; the same for copies of the files.
        files: the size in bytes of each file that was read.
    """

    ids: np.ndarray
    ends: np.ndarray
    keys: np.ndarray
    source: str
    files: dict[str, int]

    def split(self, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """As `split_held_out`, but numbers of texts: those to train on, and the held-out ones."""
        _, first = np.unique(self.keys, return_index=True)  # the first of equal texts
        shuffled = np.random.default_rng(seed).permutation(np.sort(first))
        count = min(held_out, len(shuffled) // 10)
        return shuffled[count:], shuffled[:count]


def token_file(
    paths: Sequence[str | Path], limit: int | None, tokens: TextTokenizer, folder: Path
) -> TokenFile:
    """The token file of some texts, which is made if the folder does not have it.

    Its name is a digest of the files (name, size and time), the limit and the tokenizer: files that
    were only copied are read again, and give the same `TokenFile.source`.

    Raises:
        DataError: as `iterate_texts`.
    """
    facts: list[object] = [limit, tokens.backend.to_str()]
    sources = [training_source(path) for path in paths]
    for source in sources:
        facts.append(source.column)
        for given in source.files:
            found = Path(given).stat() if source.on_disk else None
            facts.append([given, found and [found.st_size, found.st_mtime_ns]])
    name = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
    ids, index = folder / f"{name}.bin", folder / f"{name}.npz"
    if not index.is_file():
        with written_aside(ids) as file:
            ends, keys = _write_ids(file, iterate_texts(paths, limit), tokens)
        with written_aside(index) as file:  # written last: if it exists, both files are complete
            np.savez(file, ends=np.asarray(ends), keys=np.asarray(keys))
    with np.load(index) as arrays:
        ends, keys = arrays["ends"], arrays["keys"]
    mapped = np.memmap(ids, dtype=np.int32, mode="r", shape=(int(ends[-1]),))
    files = sizes_of([given for source in sources for given in source.files])
    digest = hashlib.blake2b(tokens.backend.to_str().encode(), digest_size=16)
    for array_read in (ends, keys):
        digest.update(np.ascontiguousarray(array_read).data)
    return TokenFile(mapped, ends, keys, digest.hexdigest(), files)


def _write_ids(
    file: IO[bytes], texts: Iterator[str], tokens: TextTokenizer
) -> tuple[array[int], array[int]]:
    ends, keys = array("q", [0]), array("Q")
    while chunk := list(islice(texts, _CHUNK)):
        rows = [np.asarray(row.ids, np.int32) for row in tokens(chunk, max_length=1 << 30)]
        file.write(np.concatenate(rows).data)  # `tofile` would not report a full disk
        for text, row in zip(chunk, rows, strict=True):
            ends.append(ends[-1] + len(row))
            keys.append(key_of(text))
    return ends, keys


class Blocks:
    """Texts concatenated in some order and cut into blocks of T tokens, without padding.

    Args:
        file: the texts.
        order: numbers of the texts, in the order in which they are concatenated.
        length: T.
        held_out: whether they are the held-out texts; changes only the error message.

    Attributes:
        dropped: number of tokens of the incomplete last block, which is not used.

    Raises:
        DataError: all texts together do not fill one block.
    """

    def __init__(
        self, file: TokenFile, order: np.ndarray, length: int, held_out: bool = False
    ) -> None:
        self.length = length
        self._ids = np.asarray(file.ids)
        self._from = file.ends[order]  # where each text begins in the file
        sizes = file.ends[order + 1] - self._from
        self._at = np.concatenate([[0], np.cumsum(sizes)])  # where it begins when concatenated
        total = int(self._at[-1])
        self._count, self.dropped = divmod(total, length)
        if self._count == 0:
            name, fix = ("held-out", ", or held_out=0") if held_out else ("training", "")
            raise DataError(
                f"the {name} text has {total} tokens, less than one block of {length}. "
                f"Fix: more text, or a smaller block_length{fix}."
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        """(T,) int64 ids of a block."""
        places, text = self._places(index)
        in_file: np.ndarray = self._from[text] + places - self._at[text]
        return np.asarray(self._ids[in_file], np.int64)

    def begins(self, index: int) -> np.ndarray:
        """(T,) bool, True at the first token of each text, or part of a text, in a block."""
        places, text = self._places(index)
        found: np.ndarray = places == self._at[text]
        found[0] = True
        return found

    def _places(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(T,) positions of a block's tokens in the concatenation, and (T,) the text of each."""
        places = np.arange(index * self.length, (index + 1) * self.length)
        return places, np.searchsorted(self._at, places, side="right") - 1
