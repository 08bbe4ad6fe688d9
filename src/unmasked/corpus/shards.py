"""One shard: a fixed range of the source's rows in one file, the same bytes whoever writes it.

Shard k holds rows k·S to (k+1)·S - 1 and is encoded in windows counted from its first row. So its
bytes depend neither on where a run was interrupted, nor on the machine, nor on the engine that
writes it; only the device and its number of threads may change the last bits of a number.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from unmasked.corpus.manifest import Part, checksum
from unmasked.corpus.vectors import CALIBRATION, Encoding
from unmasked.corpus.writers import Window, check_columns, make_writer
from unmasked.errors import DataError, OutputError
from unmasked.files.source import Row, Source
from unmasked.files.writing import written_aside

if TYPE_CHECKING:
    from unmasked.compat.llm2vec import LLM2Vec

_NOT_FINITE = "the vector is NaN or infinite"


@dataclass(frozen=True)
class Shards:
    """How a folder is divided, and what happens to rows that have a fault.

    Attributes:
        kind: ``.parquet``, ``.npy`` or ``.safetensors``.
        rows: rows of the source per shard, S.
        window: rows encoded at a time; None chooses by the device.
        part: (i, n) for the i-th of n machines; it writes every n-th shard.
        skip: pass over rows with a fault and list them, instead of raising.
        ranges: .npy file of (2, D) ranges of another run, for int8.
    """

    kind: str = ".parquet"
    rows: int = 32768
    window: int | None = None
    part: Part = (1, 1)
    skip: bool = False
    ranges: Path | None = None


@dataclass(frozen=True)
class CorpusJob:
    """All that the bytes of a shard depend on, besides the model and the device.

    Attributes:
        source: the texts.
        encoding: how they become vectors.
        folder: where the shards go.
        shards: how the folder is divided.
        window: rows encoded at a time.
        width: D, the numbers of a vector before bits are packed.
        ranges: (2, D) ranges of int8.
        counts: rows of each file of the source, if they are known.
    """

    source: Source
    encoding: Encoding
    folder: Path
    shards: Shards
    window: int
    width: int
    ranges: np.ndarray | None = None
    counts: list[int] | None = None

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"part-{shard:06}{self.shards.kind}"


class Encoded(NamedTuple):
    """What was written: the number of vectors, their width D, and the rows that have no vector."""

    rows: int
    width: int
    skipped: int


def check_request(source: Source, encoding: Encoding, shards: Shards) -> None:
    """Refuse columns that the output cannot hold, and ranges that nothing would use."""
    check_columns(source.keep, shards.kind)
    if shards.ranges is not None and encoding.precision != "int8":
        raise OutputError(
            f"--ranges {shards.ranges}: {encoding.precision} has no ranges. "
            "Fix: --precision int8, or no --ranges."
        )


def window_of(device: str) -> int:
    """Rows encoded at a time: enough to sort by length, few enough to see progress."""
    return 2048 if device == "cpu" else 16384


class Stream:
    """The rows of a source, read forward; files that are not needed are not opened.

    Args:
        source: what to read.
        counts: rows of each of its files; without them no file can be passed over.
    """

    def __init__(self, source: Source, counts: list[int] | None = None) -> None:
        self.source = source
        self.starts = None if counts is None else [0, *accumulate(counts)][:-1]
        self.position = 0
        self._rows = source.rows()

    def peek(self, count: int) -> list[Row]:
        """The next rows, which stay the next."""
        head = list(islice(self._rows, count))
        self._rows = chain(head, self._rows)
        return head

    def head(self) -> list[str]:
        """The texts that the ranges of int8 are measured on."""
        return [row.text for row in self.peek(CALIBRATION) if row.fault is None]

    def take(self, start: int, count: int) -> Iterator[Row]:
        """`count` rows from row `start` on; fewer at the end of the source."""
        self._seek(start)
        for row in islice(self._rows, count):
            self.position += 1
            yield row

    def reaches(self, start: int) -> bool:
        """Whether row `start` exists; it is then the next one."""
        self._seek(start)
        return self.position == start and bool(self.peek(1))

    def _seek(self, start: int) -> None:
        if self.starts is not None:
            # The last file that begins at `start` or before: empty ones share their beginning.
            file = bisect_right(self.starts, start) - 1
            if start < self.position or self.starts[file] > self.position:
                self._rows, self.position = self.source.rows(file), self.starts[file]
        for _ in islice(self._rows, start - self.position):
            self.position += 1


class Written(NamedTuple):
    """What went into a file: vectors, digest of the rows read, rows left out with their reasons."""

    rows: int
    texts: str
    skipped: list[dict[str, Any]]


def write_shard(
    job: CorpusJob, model: LLM2Vec, shard: int, rows: Iterable[Row], progress: Callable[[int], None]
) -> dict[str, Any]:
    """Encode a shard into its file; returns its line of the manifest.

    Raises:
        DataError: a row has a fault, and faults are not skipped.
        OutputError: the file cannot be written.
    """
    path, first = job.path(shard), shard * job.shards.rows
    written = write_vectors(job, model, path, rows, first, progress)
    return {
        "shard": shard,
        "file": path.name,
        "first_row": first,
        "rows": written.rows,
        "bytes": path.stat().st_size,
        "sha256": checksum(path),
        "texts": written.texts,
        "skipped": written.skipped,
    }


def write_vectors(
    job: CorpusJob,
    model: LLM2Vec,
    path: Path,
    rows: Iterable[Row],
    first: int,
    progress: Callable[[int], None],
) -> Written:
    """Encode rows, the first of which is number `first`, into one file, whole or not at all."""
    iterator, digest, seen, vectors = iter(rows), Digest(), 0, 0
    skipped: list[dict[str, Any]] = []
    key, types = job.source.layout
    dtype, width = job.encoding.stored_type(job.width)
    keep = list(zip(job.source.keep, types, strict=True))
    # A writer that fails is closed before its file, or pyarrow would complain of it later.
    with (
        written_aside(path) as file,
        closing(make_writer(job.shards.kind, file, dtype, width, key is not None, keep)) as writer,
    ):
        while batch := list(islice(iterator, job.window)):
            digest.add(batch)
            window, faults = _encode_window(job, model, first + seen, batch)
            if len(window.rows):
                writer.write(window)
            vectors += len(window.rows)
            skipped += faults
            seen += len(batch)
            progress(seen)
    return Written(vectors, digest.value(), skipped)


class Digest:
    """A digest of rows, faults included, which tells whether a stream is still the one it was.

    The words of a fault are part of it: other words make folders of older versions refuse to
    continue.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, rows: Iterable[Row]) -> None:
        """Take in the next rows."""
        for row in rows:
            self._hash.update(f"{row.text}\0{row.id}\0{row.fault}\1".encode(errors="replace"))

    def value(self) -> str:
        """The digest of all rows so far, in hexadecimal."""
        return self._hash.hexdigest()


def _encode_window(
    job: CorpusJob, model: LLM2Vec, first: int, rows: list[Row]
) -> tuple[Window, list[dict[str, Any]]]:
    """The vectors of the good rows, and the others with their reasons.

    Raises:
        DataError: there are others, and faults are not skipped.
    """
    good, skipped = [], []
    for number, row in enumerate(rows, start=first):
        if row.fault is None:
            good.append((number, row))
        elif job.shards.skip:
            skipped.append(_skipped(job.source, number, row, row.fault[0]))
        else:
            raise job.source.error(row)
    vectors = job.encoding(model, [row.text for _, row in good])  # (N, D)
    finite = np.isfinite(vectors).all(axis=1)
    stored = job.encoding.store(np.where(finite[:, None], vectors, 0), job.ranges)
    finite &= np.isfinite(stored).all(axis=1)  # float16 overflows
    for number, row in (pair for pair, fine in zip(good, finite, strict=True) if not fine):
        if not job.shards.skip:
            raise DataError(
                f"{job.source.where(row)}: {_NOT_FINITE}. Fix: --dtype float32 or bfloat16 "
                "(float16 overflows), --precision float32, or correct the text."
            )
        skipped.append(_skipped(job.source, number, row, _NOT_FINITE))
    good = [pair for pair, fine in zip(good, finite, strict=True) if fine]
    window = Window(
        [number for number, _ in good],
        [row.id for _, row in good],
        [row.kept for _, row in good],
        np.ascontiguousarray(stored[finite]),
    )
    return window, sorted(skipped, key=lambda fault: int(fault["row"]))


def _skipped(source: Source, number: int, row: Row, reason: str) -> dict[str, Any]:
    name = source.names[row.file] if source.on_disk else source.name
    return {"row": number, "file": name, "line": row.number, "reason": reason}
