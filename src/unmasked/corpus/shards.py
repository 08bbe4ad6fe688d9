"""One shard: a fixed stretch of the source's rows in one file, the same bytes whoever writes it.

Shard k holds rows k·S to (k+1)·S - 1 and is encoded in windows counted from its first row. So it
does not matter where a run was interrupted, which machine takes which shard, or which engine runs
it; only the device and its number of threads may change the last bits of a float.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unmasked.corpus.encoding import Encoding
from unmasked.corpus.manifest import checksum
from unmasked.corpus.writers import Window, make_writer
from unmasked.errors import DataError
from unmasked.files.source import Row, Source
from unmasked.files.writing import written_aside

if TYPE_CHECKING:
    from unmasked.compat.llm2vec import LLM2Vec


@dataclass(frozen=True)
class Job:
    """All that the bytes of a shard depend on, beside the model and the device.

    Attributes:
        source: the texts.
        encoding: how they become vectors.
        folder: where shards go.
        kind: their suffix.
        shard_rows: rows of the source in a shard, S.
        window: rows encoded at a time.
        skip: pass over rows with a fault, and list them, instead of raising.
        width: D, before bits are packed.
        ranges: (2, D) of int8.
        counts: rows of each file of the source, where they are known.
    """

    source: Source
    encoding: Encoding
    folder: Path
    kind: str
    shard_rows: int
    window: int
    skip: bool
    width: int
    ranges: np.ndarray | None = None
    counts: list[int] | None = None

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"part-{shard:06}{self.kind}"


class Stream:
    """The rows of a source, read forward; files that are not needed are not opened.

    Args:
        source: what to read.
        counts: rows of each of its files; without them nothing can be left out.
    """

    def __init__(self, source: Source, counts: list[int] | None = None) -> None:
        self.source = source
        self.starts = None if counts is None else [0, *accumulate(counts)]
        self.position = 0
        self._rows: Iterator[Row] | None = None

    def peek(self, count: int) -> list[Row]:
        """The next rows, which stay the next."""
        rows = self._rows or self.source.rows()
        head = list(islice(rows, count))
        self._rows = chain(head, rows)
        return head

    def take(self, start: int, count: int) -> Iterator[Row]:
        """`count` rows from `start` on, fewer at the end."""
        self._seek(start)
        assert self._rows is not None
        for row in islice(self._rows, count):
            self.position += 1
            yield row

    def reaches(self, start: int) -> bool:
        """Whether there is a row number `start`, which is then the next."""
        self._seek(start)
        return self.position == start and bool(self.peek(1))

    def _seek(self, start: int) -> None:
        if self.starts is not None:
            begins = [at for at in self.starts[:-1] if at <= start]
            if self._rows is None or start < self.position or begins[-1] > self.position:
                # The last of the files that begin there: empty ones share their beginning.
                self._rows, self.position = self.source.rows(len(begins) - 1), begins[-1]
        elif self._rows is None:
            self._rows = self.source.rows()
        assert self._rows is not None
        for _ in islice(self._rows, start - self.position):
            self.position += 1


def write_shard(
    job: Job, model: LLM2Vec, shard: int, rows: Iterable[Row], progress: Callable[[int], None]
) -> dict[str, Any]:
    """Encode a shard into its file; its line of the manifest.

    Raises:
        DataError: a row has a fault, and `job.skip` is off.
        OutputError: it cannot be written.
    """
    path, first = job.path(shard), shard * job.shard_rows
    done = write_file(job, model, path, rows, first, progress)
    return {
        "shard": shard,
        "file": path.name,
        "first_row": first,
        "rows": done.rows,
        "bytes": path.stat().st_size,
        "sha256": checksum(path),
        "texts": done.texts,
        "skipped": done.skipped,
    }


@dataclass
class Written:
    """What went into a file: vectors, digest of the rows read, rows left out."""

    rows: int
    texts: str
    skipped: list[dict[str, Any]]


def write_file(
    job: Job,
    model: LLM2Vec,
    path: Path,
    rows: Iterable[Row],
    first: int,
    progress: Callable[[int], None],
) -> Written:
    """Encode rows, the first of which is number `first`, into one file."""
    iterator, digest, seen = iter(rows), Digest(), 0
    written = Written(0, "", [])
    key, types = job.source.layout
    dtype, width = job.encoding.stored_type(job.width)
    keep = list(zip(job.source.keep, types, strict=True))
    with written_aside(path) as file:
        writer = make_writer(job.kind, file, dtype, width, key is not None, keep)
        try:
            while batch := list(islice(iterator, job.window)):
                digest.add(batch)
                numbered = list(enumerate(batch, start=first + seen))
                window, faults = encode_window(job, model, numbered)
                if len(window.rows):
                    writer.write(window)
                written.rows += len(window.rows)
                written.skipped += faults
                seen += len(batch)
                progress(seen)
            writer.close()
        except BaseException:
            writer.abandon()
            raise
    written.texts = digest.value()
    return written


def encode_window(
    job: Job, model: LLM2Vec, numbered: list[tuple[int, Row]]
) -> tuple[Window, list[dict[str, Any]]]:
    """The vectors of the good rows, and the others, named.

    Raises:
        DataError: there are others, and `job.skip` is off.
    """
    source, faults, good = job.source, [], []
    for number, row in numbered:
        if row.fault is None:
            good.append((number, row))
        elif job.skip:
            faults.append(_skipped(source, number, row, row.fault[0]))
        else:
            raise source.error(row)
    vectors = job.encoding(model, [row.text for _, row in good])
    finite = np.isfinite(vectors).all(axis=1)
    stored = job.encoding.store(np.where(finite[:, None], vectors, 0), job.ranges)
    finite &= np.isfinite(stored).all(axis=1)
    if not finite.all():
        if not job.skip:
            bad = good[int(np.flatnonzero(~finite)[0])][1]
            raise DataError(
                f"{source.where(bad)}: the vector is NaN or infinite. Fix: --dtype float32 or "
                "bfloat16 (float16 overflows), --precision float32, or mend the text."
            )
        pairs = zip(finite, good, strict=True)
        faults += [
            _skipped(source, number, row, "the vector is NaN or infinite")
            for fine, (number, row) in pairs
            if not fine
        ]
        good = [pair for fine, pair in zip(finite, good, strict=True) if fine]
        faults.sort(key=lambda fault: int(fault["row"]))
    return Window(
        [number for number, _ in good],
        [row.id for _, row in good],
        [row.kept for _, row in good],
        np.ascontiguousarray(stored[finite]),
    ), faults


def _skipped(source: Source, number: int, row: Row, reason: str) -> dict[str, Any]:
    name = source.names[row.file] if source.on_disk else source.name
    return {"row": number, "file": name, "line": row.number, "reason": reason}


class Digest:
    """Of the rows of a shard, faults included: is a stream still the one it was?"""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, rows: Iterable[Row]) -> None:
        """The next rows."""
        for row in rows:
            self._hash.update(f"{row.text}\0{row.id}\0{row.fault}\1".encode(errors="replace"))

    def value(self) -> str:
        """In hexadecimal."""
        return self._hash.hexdigest()
