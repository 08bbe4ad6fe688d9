"""What `unmasked encode` wrote, opened again: vectors that stay on the disk, and what each is of.

.npy and .safetensors are mapped as they lie. A Parquet file has its vectors in pages, so they are
copied once into a temporary file that nobody else sees, as large as the vectors, and mapped there.
What stands beside the vectors (ids, files, spans) is read into memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from unmasked.corpus.stored_vectors import read_ranges
from unmasked.errors import DataError, first_line
from unmasked.files.writing import not_written

_PRECISIONS = {"<f4": "float32", "<f2": "float16", "|i1": "int8", "|u1": "binary"}
VECTOR_FILES = (".npy", ".safetensors", ".parquet")


@dataclass
class StoredVectors:
    """Vectors of a folder or a file, N in all.

    Attributes:
        name: what they were opened from.
        blocks: arrays (n, W) in order, on the disk or in memory.
        precision: the kind of their numbers, as `Encoding.precision`.
        width: D, the numbers of a vector before bits are packed.
        columns: what each is of: a pyarrow table of N rows, or their row numbers (N,) alone.
        ranges: (2, D) ranges of int8.
        settings: how they were made, where a manifest says it.
        inputs: what they were made of, as the manifest lists it.
        norms: (N,) their lengths, once a search has measured them.
    """

    name: str
    blocks: list[np.ndarray]
    precision: str
    width: int
    columns: Any
    ranges: np.ndarray | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    norms: np.ndarray | None = None

    def __len__(self) -> int:
        return sum(map(len, self.blocks))

    def parts(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """The vectors, at most `rows` at a time, each part with the place of its first one."""
        place = 0
        for block in self.blocks:
            for start in range(0, len(block), rows):
                yield place + start, block[start : start + rows]
            place += len(block)

    def gather(self, places: np.ndarray) -> np.ndarray:
        """The stored vectors at some places, (n, W)."""
        ends = np.cumsum([len(block) for block in self.blocks])
        of = np.searchsorted(ends, places, side="right")
        found = [self.blocks[b][p - ends[b]] for b, p in zip(of, places, strict=True)]
        return np.stack(found)  # a negative place counts from the end of its block

    def cells(self, place: int) -> dict[str, Any]:
        """What the vector at a place is of: its row, and id, file and span where they are known."""
        if isinstance(self.columns, np.ndarray):
            return {"row": int(self.columns[place])}
        return {name: self.columns[name][place].as_py() for name in self.columns.column_names}


def are_vectors(path: Path) -> bool:
    """Whether a path holds vectors, and not texts."""
    if path.is_dir():
        return any(path.glob("_manifest*.jsonl"))
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet as pq

        return "vector" in pq.read_schema(path).names
    return path.suffix in VECTOR_FILES


def open_vectors(path: str | Path) -> StoredVectors:
    """Open a folder of shards, or one file of vectors.

    Raises:
        DataError: it holds no vectors, is not finished, or is damaged.
        OutputError: there is no room for the copy of the vectors of Parquet files.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist. Fix: unmasked encode MODEL TEXTS -o {path}")
    if path.is_dir():
        return _folder(path)
    ranges = path.with_suffix(".ranges.npy")
    listed = path.with_suffix(".skipped.jsonl")
    skipped = []
    if listed.is_file():
        skipped = [json.loads(line)["row"] for line in listed.read_bytes().splitlines()]
    return _opened(str(path), [path], [(0, skipped)], ranges, {}, [])


def _folder(path: Path) -> StoredVectors:
    header: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    for manifest in sorted(path.glob("_manifest*.jsonl")):
        lines = [json.loads(line) for line in manifest.read_bytes().splitlines()]
        header = lines[0]
        entries += [line for line in lines[1:] if "shard" in line]
        if "finished" not in lines[-1]:
            raise DataError(
                f"{path}: {manifest.name} is not finished, {len(lines) - 1} shards are there. Fix: "
                "the unmasked encode command that began it, once more."
            )
    entries.sort(key=lambda entry: int(entry["shard"]))
    if not entries:
        raise DataError(f"{path} holds no vectors. Fix: unmasked encode MODEL TEXTS -o {path}")
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
    """The vectors of files, of which each begins at a row and lacks some."""
    columns: Any
    if files[0].suffix == ".parquet":
        blocks, columns = _parquet(files)
    else:
        try:
            blocks = [_npy(f) if f.suffix == ".npy" else _safetensors(f) for f in files]
        except (OSError, ValueError, KeyError) as error:
            raise _not_stored(f"{name} cannot be opened as vectors: {first_line(error)}") from error
        columns = np.concatenate(
            [
                _numbers(first, skipped, len(b))
                for (first, skipped), b in zip(rows, blocks, strict=True)
            ]
        )
    kind, shape = blocks[0].dtype.str, blocks[0].shape
    if kind not in _PRECISIONS or len(shape) != 2:
        allowed = "(N, D) float32, float16, int8 or bits"
        raise _not_stored(f"{name} holds {kind} of shape {shape}. Allowed: {allowed}")
    precision = _PRECISIONS[kind]
    packed = shape[1] * (8 if precision == "binary" else 1)
    width = int(settings.get("dimensions", packed))
    known = read_ranges(ranges, width) if precision == "int8" else None
    return StoredVectors(name, blocks, precision, width, columns, known, settings, inputs)


def _not_stored(found: str) -> DataError:
    return DataError(f"{found.rstrip('.')}. Fix: give what unmasked encode wrote, whole.")


def _numbers(first: int, skipped: Sequence[int], count: int) -> np.ndarray:
    """The row numbers of `count` vectors from row `first` on, without those that were skipped."""
    numbers = np.arange(first, first + count + len(skipped))
    return numbers[~np.isin(numbers, skipped)]


def _npy(path: Path) -> np.ndarray:
    mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _safetensors(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        said = json.loads(file.read(length))["vectors"]
    kinds = {"F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1"}
    begin = 8 + length + said["data_offsets"][0]
    return _mapped(path, np.dtype(kinds[said["dtype"]]), tuple(said["shape"]), begin)


def _parquet(files: Sequence[Path]) -> tuple[list[np.ndarray], Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables, shapes = [], []
    copy: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as what is mapped)
    try:
        for path in files:
            with pq.ParquetFile(path) as file:
                kind = file.schema_arrow.field("vector").type
                for group in range(file.num_row_groups):
                    column = file.read_row_group(group, ["vector"]).column("vector")
                    for chunk in column.chunks:
                        copy.write(chunk.flatten().to_numpy().data)
                names = [name for name in file.schema_arrow.names if name != "vector"]
                tables.append(file.read(names))
                dtype = np.dtype(kind.value_type.to_pandas_dtype())
                shapes.append((file.metadata.num_rows, kind.list_size))
        copy.flush()
    except OSError as error:
        raise not_written(Path(tempfile.gettempdir()), error) from error
    except (pa.ArrowException, KeyError, AttributeError) as error:
        raise _not_stored(f"{path} holds no vectors of one width: {first_line(error)}") from error
    rows = sum(count for count, _ in shapes)
    return [_mapped(copy, dtype, (rows, shapes[0][1]), 0)], pa.concat_tables(tables)


def _mapped(
    file: Path | IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...], begin: int
) -> np.ndarray:
    """An array on the disk; an empty one cannot be mapped."""
    if not np.prod(shape):
        return np.empty(shape, dtype)
    return np.memmap(file, dtype, mode="r", offset=begin, shape=shape)
