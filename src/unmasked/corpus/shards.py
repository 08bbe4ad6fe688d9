"""Encodes one shard, a fixed range of the source's rows, into one file.

Shard k holds rows k·S to (k+1)·S - 1 and is encoded in windows counted from its first row. So its
bytes do not depend on where a run was interrupted, or on the machine or engine that writes it; only
the device and its number of threads may change the last bits of a number.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from unmasked.corpus.manifest import Part, checksum
from unmasked.corpus.stored_vectors import CALIBRATION, Encoding, read_ranges
from unmasked.corpus.writers import make_writer
from unmasked.errors import OutputError
from unmasked.files.content import Fault
from unmasked.files.source import Row, Source
from unmasked.files.writing import written_aside
from unmasked.text.passages import Passage

if TYPE_CHECKING:
    from unmasked.model import TextEncoder

Skipped = list[dict[str, Any]]
"""Rows without a vector: their number, file, line and reason, as the manifest lists them."""
new_digest = partial(hashlib.blake2b, digest_size=16)
_PLACE = ("begin", "end")
"""Columns of passages: the position of a passage in its document, in characters."""
_NOT_FINITE: Fault = (
    "the vector is NaN or infinite",
    "--dtype float32 or bfloat16 (float16 overflows), --precision float32, or correct the text",
)


@dataclass(frozen=True)
class Shards:
    """How the output is divided, and what happens to rows with a fault."""

    kind: str = ".parquet"  # ``.parquet``, ``.npy`` or ``.safetensors``
    rows: int = 32768  # rows of the source per shard, S
    window: int | None = None  # rows encoded at a time; by default it depends on the device
    part: Part = (1, 1)  # (i, n) for the i-th of n machines, each of which writes every n-th shard
    skip: bool = False  # list rows with a fault and leave them out, instead of raising an error
    ranges: Path | None = None  # .npy file with the (2, D) ranges of another run, for int8

    def check(self, keep: Sequence[str], encoding: Encoding) -> None:
        """Refuse what needs no model: columns that cannot be stored, sizes, ranges without int8."""
        encoding.check_options()
        if (chunks := encoding.chunks) is not None and self.kind != ".parquet":
            needs = "and a passage needs its document and place"
            fix = "Fix: .parquet, or no --chunk."
            raise OutputError(f"{self.kind} holds vectors only, {needs}. {fix}")
        if keep and self.kind != ".parquet":
            raise OutputError(f"{self.kind} holds vectors only. Fix: .parquet, or no --keep.")
        own = {"row", "id", "vector", *(_PLACE if chunks else ())} & set(keep)
        if own or len(set(keep)) < len(keep):
            why = f"'{own.pop()}' is a column of the output already" if own else "one is repeated"
            raise OutputError(f"--keep {','.join(keep)}: {why}. Fix: leave it out.")
        if self.ranges is not None and encoding.precision != "int8":
            given = f"--ranges {self.ranges}: {encoding.precision} has no ranges"
            raise OutputError(f"{given}. Fix: --precision int8, or no --ranges.")
        if self.ranges is not None:
            read_ranges(self.ranges)

    def window_on(self, device: str, chunks: bool = False) -> int:
        """Rows encoded at a time: enough to sort by length, few enough to show progress."""
        if self.window:
            return self.window
        rows = 2048 if device == "cpu" else 16384
        return rows // 16 if chunks else rows  # a document is many passages


@dataclass(frozen=True)
class CorpusJob:
    """Everything that the bytes of a shard depend on, apart from the model and the device."""

    source: Source
    encoding: Encoding
    folder: Path  # where the shards are written
    shards: Shards  # this and the first two as in `encode_folder`
    window: int  # rows encoded at a time
    width: int  # D, the dimensions of a vector before bits are packed
    ranges: np.ndarray | None = None  # (2, D) ranges for int8
    said: dict[str, Any] | None = None
    """Settings that the file has in its metadata; a folder has them in its manifest."""

    @property
    def with_files(self) -> bool:
        """Whether a column names the row's file in a folder; for whole files, the id is that."""
        folder = self.source.on_disk and self.source.root.is_dir() and not self.source.whole
        return folder and self.shards.kind == ".parquet" and "file" not in self.source.keep

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"part-{shard:06}{self.shards.kind}"


class Encoded(NamedTuple):
    """What was written: the number of vectors, their width D, and the rows without a vector.

    `cut` is the number of texts that were longer than the model's input and so were truncated.
    """

    rows: int
    width: int
    skipped: int
    cut: int = 0


class Stream:
    """The rows of a source, read forward; files that are not needed are not opened.

    `counts` are the numbers of rows of the files; without them no file can be passed over.
    """

    def __init__(self, source: Source, counts: list[int] | None = None) -> None:
        self.source, self.counts, self.position = source, counts, 0
        self._starts = None if counts is None else [0, *accumulate(counts)][:-1]
        self._rows = source.rows()

    def head(self) -> list[str]:
        """The texts that the ranges of int8 are measured on; the stream does not advance."""
        return [row.text for row in self._peek(CALIBRATION) if row.fault is None]

    def reaches(self, start: int) -> bool:
        """Whether row `start` exists; moves there."""
        self._seek(start)
        return self.position == start and bool(self._peek(1))

    def take(self, start: int, count: int) -> Iterator[Row]:
        """`count` rows from row `start` on; fewer at the end of the source."""
        self._seek(start)
        for row in islice(self._rows, count):
            self.position += 1
            yield row

    def _peek(self, count: int) -> list[Row]:
        rows = list(islice(self._rows, count))
        self._rows = chain(rows, self._rows)
        return rows

    def _seek(self, start: int) -> None:
        if self._starts is not None:
            # The last file that begins at or before `start`; an empty file begins where the next
            # one does.
            file = bisect_right(self._starts, start) - 1
            if start < self.position or self._starts[file] > self.position:
                self._rows, self.position = self.source.rows(file), self._starts[file]
        for _ in islice(self._rows, start - self.position):
            self.position += 1


def write_shard(
    job: CorpusJob, model: TextEncoder, shard: int, stream: Stream, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Encode a shard into its file, and return its entry of the manifest."""
    path, first = job.path(shard), shard * job.shards.rows
    rows = stream.take(first, job.shards.rows)
    done = write_vectors(job, model, path, rows, first, progress)
    return {
        "shard": shard,
        "file": path.name,
        "first_row": first,
        "rows": done.vectors,
        **({} if job.encoding.chunks is None else {"documents": done.texts}),
        "bytes": path.stat().st_size,
        "sha256": checksum(path),
        "texts": done.digest,
        "skipped": done.skipped,
        **({"cut": done.cut} if done.cut else {}),
    }


class Written(NamedTuple):
    """The numbers of vectors and of texts in a file, and the digest of all rows that were read.

    `skipped` are the rows without a vector; `cut` is the number of texts that were truncated.
    """

    vectors: int
    texts: int
    digest: str
    skipped: Skipped
    cut: int


def write_vectors(
    job: CorpusJob,
    model: TextEncoder,
    path: Path,
    rows: Iterator[Row],
    first: int,
    progress: Callable[[int], None],
) -> Written:
    """Encode rows, of which the first is number `first`, into a file, completely or not at all."""
    digest, written, seen = new_digest(), 0, 0
    skipped: Skipped = []
    columns, stored = _columns(job), job.encoding.stored_type(job.width)
    read: deque[RowWindow] = deque()  # windows that were read and are not written yet

    def texts() -> Iterator[list[str]]:
        """The texts of each window; a thread reads ahead while earlier windows are encoded."""
        start = first
        while window := list(islice(rows, job.window)):
            add_rows(digest, window)
            read.append(RowWindow(job, start, window))
            start += len(window)
            yield [row.text for _, row in read[-1].good]

    before = model.backbone.texts_cut
    with (
        written_aside(path) as file,
        # Closed before its file, also after an error: pyarrow's writer writes when it is closed.
        closing(make_writer(job.shards.kind, file, *stored, columns, job.said)) as writer,
        closing(job.encoding(model, texts())) as encoded,  # ends its threads
    ):
        for passages, computed in encoded:
            window = read.popleft()
            good, vectors = window.stored(passages, computed)
            if good:
                cells = (_cells(job, number, row, passage) for number, row, passage in good)
                writer.write(list(zip(*cells, strict=True)), vectors)  # rows become columns
            written += len(good)
            skipped += window.skipped
            seen += window.rows
            progress(seen)
    cut = model.backbone.texts_cut - before
    return Written(written, seen - len(skipped), digest.hexdigest(), skipped, cut)


def _columns(job: CorpusJob) -> list[tuple[str, str]]:
    """Names and types of the columns beside the vector."""
    key, types = job.source.layout
    ids = [] if key is None else [("id", "string")]
    place = [] if job.encoding.chunks is None else [(name, "int64") for name in _PLACE]
    files = [("file", "string")] if job.with_files else []
    return [("row", "int64"), *ids, *place, *files, *zip(job.source.keep, types, strict=True)]


def _cells(job: CorpusJob, number: int, row: Row, passage: Passage) -> list[object]:
    """The values of `_columns` for one vector."""
    ids = [] if job.source.layout[0] is None else [row.id]
    place = [] if job.encoding.chunks is None else [passage.begin, passage.end]
    files = [job.source.names[row.file]] if job.with_files else []
    return [number, *ids, *place, *files, *row.kept]


class RowWindow:
    """Rows of a corpus that are encoded together, counted from `first`.

    Raises:
        DataError: a row has a fault, and faults are not skipped.
    """

    def __init__(self, job: CorpusJob, first: int, rows: list[Row]) -> None:
        self.job, self.rows = job, len(rows)
        self.skipped: Skipped = []  # the rows without a vector
        self.good: list[tuple[int, Row]] = []  # number and row of those without a fault
        for number, row in enumerate(rows, start=first):
            if row.fault is None:
                self.good.append((number, row))
            else:
                self._skip(number, row)

    def stored(
        self, passages: Sequence[Passage], vectors: np.ndarray
    ) -> tuple[list[tuple[int, Row, Passage]], np.ndarray]:
        """Number, row and passage of each finite vector, and the vectors as they are stored.

        Takes the P passages of the texts in `good`, and their (P, D) vectors. A document with a
        passage whose vector is not finite is left out as a whole.
        """
        finite = np.isfinite(vectors).all(axis=1)
        stored = self.job.encoding.store(np.where(finite[:, None], vectors, 0), self.job.ranges)
        finite &= np.isfinite(stored).all(axis=1)  # float16 may overflow
        owners = np.array([passage.document for passage in passages], dtype=np.int64)  # (P,)
        bad = np.unique(owners[~finite])
        for i in bad:
            self._skip(self.good[i][0], self.good[i][1]._replace(fault=_NOT_FINITE))
        self.skipped.sort(key=itemgetter("row"))
        kept = ~np.isin(owners, bad)
        chosen = (passages[int(i)] for i in np.flatnonzero(kept))
        cells = [(*self.good[passage.document], passage) for passage in chosen]
        return cells, np.ascontiguousarray(stored[kept])

    def _skip(self, number: int, row: Row) -> None:
        source = self.job.source
        if not self.job.shards.skip:
            raise source.error(row)
        assert row.fault is not None
        name = source.names[row.file] if source.on_disk else source.name
        fault = {"row": number, "file": name, "line": row.number, "reason": row.fault[0]}
        self.skipped.append(fault)


def add_rows(digest: hashlib.blake2b, rows: Iterable[Row]) -> None:
    """Add rows to a digest, which shows later whether a stream still has the same rows.

    The wording of faults is part of it: if a version words a fault differently, it refuses to
    resume a stream with such rows that an older version began.
    """
    for row in rows:
        digest.update(f"{row.text}\0{row.id}\0{row.fault}\1".encode(errors="replace"))
