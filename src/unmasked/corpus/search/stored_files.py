"""Opens what `unmasked encode` wrote: vectors that stay on the disk, and the columns beside them.

.npy and .safetensors files are memory-mapped. A Parquet file has its vectors in pages, so they are
copied into a temporary file without a name, as large as the vectors, which is mapped. Of the other
columns, those that a search shows (ids, files, positions of passages, texts) are read into memory.
The settings say which these are: a column of ``--keep`` may have any name.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from unmasked.corpus.manifest import manifest_entry
from unmasked.corpus.stored_vectors import ranges_of, read_ranges, skipped_of
from unmasked.corpus.writers import SAID
from unmasked.errors import DataError, OutputError, first_line
from unmasked.files.writing import not_written

_PRECISIONS = {"<f4": "float32", "<f2": "float16", "|i1": "int8", "|u1": "binary"}
_BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, EOFError)
"""What reading a file may raise whose content is of another kind."""
VECTOR_FILES = (".npy", ".safetensors", ".parquet")


@dataclass
class StoredVectors:
    """The vectors of a folder or a file, N in all."""

    name: str  # the folder or file
    blocks: list[np.ndarray]  # arrays (n, W) in order, on the disk or in memory
    precision: str  # the precision of the stored numbers, as `Encoding.precision`
    width: int  # D, the dimensions of a vector before bits are packed
    columns: Any
    """What is shown of each vector: a pyarrow table of N rows, its columns named as the fields of
    `looking.Hit`, or only the row numbers as an array (N,)."""
    ranges: np.ndarray | None = None  # (2, D) ranges of int8
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings that they were made with: all that a manifest has, some that a file has, or
    none."""
    inputs: list[dict[str, Any]] = field(default_factory=list)
    """The files that they were made from, if there is a manifest."""
    norms: np.ndarray | None = None  # (N,) their lengths, after the first search

    def __len__(self) -> int:
        return sum(map(len, self.blocks))

    def parts(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """The vectors, at most `rows` at a time, each part with the place of its first vector."""
        place = 0
        for block in self.blocks:
            for start in range(0, len(block), rows):
                yield place + start, block[start : start + rows]
            place += len(block)

    def gather(self, places: np.ndarray) -> np.ndarray:
        """The stored vectors at some places, (n, W)."""
        ends = np.cumsum([len(block) for block in self.blocks])
        owners = np.searchsorted(ends, places, side="right")
        # `place - ends[block]` is negative, so it counts from the end of the block.
        return np.stack([self.blocks[b][p - ends[b]] for b, p in zip(owners, places, strict=True)])

    def cells(self, place: int) -> dict[str, Any]:
        """The columns of the vector at a place: its row, and id, file and position if known."""
        if isinstance(self.columns, np.ndarray):
            return {"row": int(self.columns[place])}
        return {name: self.columns[name][place].as_py() for name in self.columns.column_names}


def are_vectors(path: Path) -> bool:
    """Whether a path has vectors and not texts."""
    if path.is_dir():
        return any(path.glob("_manifest*.jsonl"))
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return "vector" in pq.read_schema(path).names
        except (pa.ArrowException, OSError):  # reading it as texts says what is wrong with it
            return False
    return path.suffix in VECTOR_FILES


def open_vectors(path: str | Path) -> StoredVectors:
    """Open a folder of shards, or one file of vectors.

    Raises:
        DataError: the path has no vectors, is not finished, or is damaged.
        OutputError: there is no space for the copy of the vectors of Parquet files.
    """
    path = Path(path)
    if not path.exists():
        fix = f"unmasked encode MODEL TEXTS -o {shlex.quote(str(path))}"
        raise DataError(f"{path} does not exist. Fix: {fix}")
    if path.is_dir():
        return _folder(path)
    ranges, listed = ranges_of(path), skipped_of(path)
    if not ranges.is_file():  # earlier versions named it after the stem, and the list as well
        ranges = path.with_suffix(".ranges.npy")
    if not listed.is_file():
        listed = path.with_suffix(".skipped.jsonl")
    skipped: list[int] = []
    if listed.is_file() and path.suffix != ".parquet":  # which has the numbers of its rows
        try:
            skipped = [int(json.loads(line)["row"]) for line in listed.read_bytes().splitlines()]
        except (ValueError, KeyError, TypeError) as error:
            fix = "encode the texts again"
            raise DataError(f"{listed} is no list of skipped rows. Fix: {fix}.") from error
    return _opened(str(path), [path], [(0, skipped)], ranges, _said(path), [])


def _said(path: Path) -> dict[str, Any]:
    """The settings in the metadata of a file; {} if there are none, as in files of others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    said: Any = {}
    try:
        if path.suffix == ".parquet":
            said = json.loads((pq.read_schema(path).metadata or {}).get(SAID.encode(), b"{}"))
        elif path.suffix == ".safetensors":
            said = json.loads(_header(path)[0].get("__metadata__", {}).get(SAID, "{}"))
    except (pa.ArrowException, OSError, *_BROKEN):
        pass  # opening the vectors tells what is wrong with the file
    return said if isinstance(said, dict) else {}


def _folder(path: Path) -> StoredVectors:
    header: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    for manifest in sorted(path.glob("_manifest*.jsonl")):
        written = manifest.read_bytes().splitlines(keepends=True)
        # Not the last one if a run was killed, or is still active, while writing it.
        whole = enumerate(line for line in written if line.endswith(b"\n"))
        lines = [manifest_entry(manifest, line, first=i == 0) for i, line in whole]
        header = lines[0] if lines else {}
        entries += [line for line in lines[1:] if "shard" in line]
        if not lines or "finished" not in lines[-1]:
            shards = f"{len({entry['shard'] for entry in entries})} shards are there"
            fix = "run the unmasked encode command that began it again"
            raise DataError(f"{path}: {manifest.name} is not finished, {shards}. Fix: {fix}.")
    machines = header.get("settings", {}).get("machines", 1)
    for place in range(1, machines + 1) if machines > 1 else ():
        if not (path / f"_manifest-{place}-of-{machines}.jsonl").is_file():
            given = (
                f"{path} is not finished, the shards of machine {place} of {machines} are missing"
            )
            fix = f"run its unmasked encode command with --shard {place}/{machines}"
            raise DataError(f"{given}. Fix: {fix}.")
    entries.sort(key=lambda entry: int(entry["shard"]))
    if not entries:
        fix = f"unmasked encode MODEL TEXTS -o {shlex.quote(str(path))}"
        raise DataError(f"{path} holds no vectors. Fix: {fix}")
    files = [path / entry["file"] for entry in entries]
    rows = [(e["first_row"], [fault["row"] for fault in e["skipped"]]) for e in entries]
    settings, inputs = header.get("settings", {}), header.get("inputs", [])
    return _opened(str(path), files, rows, path / "_ranges.npy", settings, inputs)


def _opened(
    name: str,
    files: Sequence[Path],
    rows: Sequence[tuple[int, list[int]]],
    ranges: Path,
    settings: dict[str, Any],
    inputs: list[dict[str, Any]],
) -> StoredVectors:
    """The vectors of files; `rows` has the first row of each file and its rows without a vector."""
    columns: Any
    if files[0].suffix == ".parquet":
        blocks, columns = _parquet(files, settings)
    else:
        try:
            blocks = [_npy(f) if f.suffix == ".npy" else _safetensors(f) for f in files]
            columns = np.concatenate(
                [_numbers(*place, len(b)) for place, b in zip(rows, blocks, strict=True)]
            )
        except (OSError, *_BROKEN) as error:
            raise _not_stored(f"{name} cannot be opened as vectors: {first_line(error)}") from error
    kind, shape = blocks[0].dtype.str, blocks[0].shape
    if kind not in _PRECISIONS or len(shape) != 2:
        allowed = "(N, D) float32, float16, int8 or bits"
        raise _not_stored(f"{name} holds {kind} of shape {shape}. Allowed: {allowed}")
    precision = _PRECISIONS[kind]
    packed = shape[1] * (8 if precision == "binary" else 1)
    given = settings.get("dimensions", packed)
    width = given if isinstance(given, int) and packed - 8 < given <= packed else packed
    known = read_ranges(ranges, width) if precision == "int8" else None
    return StoredVectors(name, blocks, precision, width, columns, known, settings, inputs)


def _not_stored(found: str) -> DataError:
    return DataError(f"{found.rstrip('.')}. Fix: give the complete output of unmasked encode.")


def _numbers(first: int, skipped: Sequence[int], count: int) -> np.ndarray:
    """The row numbers of `count` vectors from row `first` on, without the skipped rows."""
    numbers = np.arange(first, first + count + len(skipped))
    return numbers[~np.isin(numbers, skipped)]


def _npy(path: Path) -> np.ndarray:
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(mapped, np.ndarray):  # a .npz file under another name
        raise ValueError("it holds several arrays")
    return mapped


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a .safetensors file, and where its numbers begin, in bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        return dict(json.loads(file.read(length))), 8 + length


def _safetensors(path: Path) -> np.ndarray:
    header, start = _header(path)
    said = header["vectors"]
    kinds = {"F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1"}
    begin = start + said["data_offsets"][0]
    return _mapped(path, np.dtype(kinds[said["dtype"]]), tuple(said["shape"]), begin)


def _shown(schema: Any, settings: Mapping[str, Any]) -> dict[str, str]:
    """The columns that a search shows, each with its name in a hit.

    Files of versions that wrote no settings have only names and types of columns to go by.
    """
    import pyarrow as pa

    there = schema.names
    if "text_column" not in settings:
        numbers = {"row", "begin", "end"} if {"begin", "end"} <= set(there) else {"row"}
        return {
            name: name
            for name, kind in zip(there, schema.types, strict=True)
            if (name in numbers and pa.types.is_integer(kind))
            or (name in ("id", "file", "text") and pa.types.is_string(kind))
        }
    chunks, text = settings.get("chunk"), settings["text_column"]
    place = ("begin", "end") if chunks else ()
    files = ("file",) if settings.get("file_column") else ()
    shown = {name: name for name in ("row", "id", *place, *files) if name in there}
    return shown | ({text: "text"} if text in settings.get("keep", ()) and text in there else {})


def _parquet(files: Sequence[Path], settings: Mapping[str, Any]) -> tuple[list[np.ndarray], Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables, shapes = [], []
    copy: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as its mapping)
    try:
        for path in files:
            with pq.ParquetFile(path) as file:
                kind = file.schema_arrow.field("vector").type
                shown = _shown(file.schema_arrow, settings)
                if not pa.types.is_integer(file.schema_arrow.field("row").type):
                    raise ValueError("its column 'row' has no numbers of rows")
                for group in range(file.num_row_groups):
                    column = file.read_row_group(group, ["vector"]).column("vector")
                    for chunk in column.chunks:
                        if chunk.null_count:
                            raise ValueError("a vector is null")
                        _append(copy, chunk.flatten().to_numpy())
                tables.append(file.read(list(shown)).select(list(shown)))
                tables[-1] = tables[-1].rename_columns(list(shown.values()))
                dtype = np.dtype(kind.value_type.to_pandas_dtype())
                shapes.append((file.metadata.num_rows, kind.list_size))
    except OutputError:
        raise
    except (OSError, pa.ArrowException, *_BROKEN) as error:
        raise _not_stored(f"{path} cannot be opened as vectors: {first_line(error)}") from error
    rows = sum(count for count, _ in shapes)
    return [_mapped(copy, dtype, (rows, shapes[0][1]), 0)], pa.concat_tables(tables)


def _append(copy: IO[bytes], numbers: np.ndarray) -> None:
    try:
        copy.write(numbers.data)
        copy.flush()
    except OSError as error:
        raise not_written(Path(tempfile.gettempdir()), error) from error


def _mapped(
    file: Path | IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...], begin: int
) -> np.ndarray:
    """A memory-mapped array; an empty array, which cannot be mapped, is in memory."""
    if not np.prod(shape):
        return np.empty(shape, dtype)
    return np.memmap(file, dtype, mode="r", offset=begin, shape=shape)
