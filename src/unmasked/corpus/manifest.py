"""The record of a folder of shards: what it was made of and how, and which shards are whole.

``_manifest.jsonl`` (``_manifest-2-of-4.jsonl`` for the second of four machines) begins with the
settings and the inputs. Then comes a line for each shard, appended and flushed to the disk once the
shard is in its place: file, first row, rows, bytes, SHA-256, a digest of the texts read, and every
row skipped with its reason. The last line says that all of it is done. There is no time in it, so
the same work always gives the same bytes. What reads a folder of Parquet passes over names that
begin with ``_``.

Memory: a few numbers a shard; the skipped rows stay on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmasked.errors import OutputError
from unmasked.files.writing import not_written, written_aside

FORMAT = 1
_DIVIDE = "name another folder, or divide the work with --shard 1/2 and --shard 2/2"
Part = tuple[int, int]
"""(i, n): the i-th of n machines, from 1."""


def manifest_name(part: Part) -> str:
    """The file of one machine's manifest."""
    return "_manifest.jsonl" if part == (1, 1) else f"_manifest-{part[0]}-of-{part[1]}.jsonl"


@dataclass(frozen=True)
class Done:
    """A shard that is whole.

    Attributes:
        rows: vectors in it.
        skipped: rows of the source that have none.
        texts: digest of what was read.
        line: where its line stands in the manifest, and how long it is, in bytes.
    """

    rows: int
    skipped: int
    texts: str
    line: tuple[int, int]


@dataclass
class Manifest:
    """One machine's record; use `locked` to get one.

    Attributes:
        folder: where the shards are.
        part: whose record.
        header: settings and inputs; empty before `begin`.
        done: shard → what is known of it.
        finished: whether its last line says so.
    """

    folder: Path
    part: Part
    header: dict[str, Any] = field(default_factory=dict)
    done: dict[int, Done] = field(default_factory=dict)
    finished: bool = False

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / manifest_name(self.part)

    def read(self) -> None:
        """Take up what an earlier run left; a last line cut short is dropped.

        Raises:
            OutputError: the file is no manifest.
        """
        if not self.path.is_file():
            return
        start = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._take(line, start)
                start += len(line)
        if start < self.path.stat().st_size:
            os.truncate(self.path, start)

    def _take(self, line: bytes, start: int) -> None:
        try:
            said = json.loads(line)
        except ValueError as error:
            raise OutputError(f"{self.path} is not a manifest. Fix: another folder.") from error
        if start == 0:
            if said.get("format") != FORMAT:
                raise OutputError(
                    f"{self.path}: unknown format {said.get('format')!r}. Fix: another folder."
                )
            self.header = said
        elif "finished" in said:
            self.finished = True
        else:
            file = self.folder / said["file"]
            if file.is_file() and file.stat().st_size == said["bytes"]:
                skipped, texts = len(said["skipped"]), said["texts"]
                self.done[said["shard"]] = Done(said["rows"], skipped, texts, (start, len(line)))

    def begin(self, settings: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
        """Write the first line, or compare it with the one that is there.

        What has no whole shard yet binds nobody: a run that failed at once may be changed.

        Raises:
            OutputError: the folder holds the work of other settings, inputs or another division.
        """
        header = {"format": FORMAT, "settings": settings, "inputs": inputs}
        for path in sorted(self.folder.glob("_manifest*.jsonl")):
            if path != self.path or self.done:
                with path.open("rb") as file:
                    _compare(self.folder, json.loads(file.readline() or b"{}"), header)
        if not self.done:
            place, machines = self.part
            for path in self.folder.glob("part-*"):  # renamed, and killed before it was recorded
                if path.stem[5:].isdecimal() and int(path.stem[5:]) % machines == place - 1:
                    path.unlink()
            with written_aside(self.path) as file:
                file.write(_line(header))
            self.header, self.finished = header, False

    def add(self, entry: dict[str, Any]) -> None:
        """Record a shard that is in its place."""
        line = _line(entry)
        try:
            with self.path.open("ab") as file:
                start = file.tell()
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise not_written(self.path, error) from error
        self.done[entry["shard"]] = Done(
            entry["rows"], len(entry["skipped"]), entry["texts"], (start, len(line))
        )

    def finish(self) -> None:
        """Put the lines in order and write the last one."""
        with self.path.open("rb") as old, written_aside(self.path) as file:
            file.write(_line(self.header))
            for shard in sorted(self.done):
                start, length = self.done[shard].line
                old.seek(start)
                file.write(old.read(length))
            file.write(_line({"finished": True, "rows": self.rows, "skipped": self.skipped}))
        self.finished = True

    @property
    def rows(self) -> int:
        """Vectors in whole shards."""
        return sum(done.rows for done in self.done.values())

    @property
    def skipped(self) -> int:
        """Rows of whole shards that have no vector."""
        return sum(done.skipped for done in self.done.values())


@contextmanager
def locked(folder: Path, part: Part, overwrite: bool = False) -> Iterator[Manifest]:
    """The manifest of a folder, which is made, and which no other process has meanwhile.

    Raises:
        OutputError: another process writes to it, or it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file. Fix: name a folder, or end the name in .npy.")
    strangers = [] if not folder.is_dir() else [p.name for p in folder.iterdir() if not _ours(p)]
    if strangers:
        raise OutputError(
            f"{folder} holds other things ({', '.join(sorted(strangers)[:3])}). "
            "Fix: name a new folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        locks.enter_context(_lock(folder / f".{manifest_name(part)}.lock"))
        if overwrite:
            for other in folder.glob("._manifest-*.lock"):
                locks.enter_context(_lock(other))
            for path in folder.iterdir():
                if path.suffix != ".lock":
                    path.unlink()
        manifest = Manifest(folder, part)
        manifest.read()
        yield manifest


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Keep other processes from writing the same file; nothing is left behind.

    Raises:
        OutputError: another process writes to it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f".{output.name}.lock")
    with _lock(path, output, "or name another file"):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def _lock(path: Path, output: Path | None = None, fix: str = _DIVIDE) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"{output or path.parent}: another process is writing to it. Fix: wait for it, {fix}."
        ) from error
    try:
        yield
    finally:
        lock.release()


def verify(folder: str | Path) -> int:
    """Check every shard of a folder against its checksum; how many there are.

    Raises:
        OutputError: a shard is missing or differs, or the work is not finished.
    """
    folder, count = Path(folder), 0
    manifests = sorted(folder.glob("_manifest*.jsonl"))
    for path in manifests:
        finished = False
        with path.open("rb") as file:
            for line in file:
                said = json.loads(line)
                finished = finished or "finished" in said
                if "shard" in said:
                    count += 1
                    shard = folder / said["file"]
                    if not shard.is_file() or checksum(shard) != said["sha256"]:
                        raise OutputError(f"{shard} is not what {path.name} says it is.")
        if not finished:
            raise OutputError(f"{path} is not finished. Fix: run the same command again.")
    if not manifests:
        raise OutputError(f"{folder} has no manifest.")
    return count


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _ours(path: Path) -> bool:
    return path.name.startswith(
        ("part-", ".part-", "_manifest", "._manifest", "_ranges", "._ranges")
    )


def _line(said: dict[str, Any]) -> bytes:
    return json.dumps(said, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _compare(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    # Through JSON, so that a tuple is a list and a number a number on both sides.
    here = json.loads(_line(here))
    old, new = there.get("settings", {}), here["settings"]
    differing = [
        f"{key}: {json.dumps(old.get(key))} there, {json.dumps(new.get(key))} now"
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key)
    ]
    if not differing and there.get("inputs") != here["inputs"]:
        differing = [_changed_inputs(there.get("inputs", []), here["inputs"])]
    if differing:
        raise OutputError(
            f"{folder} was begun with something else; {'; '.join(differing)}. "
            "Fix: the same settings and inputs, another folder, or --overwrite."
        )


def _changed_inputs(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> str:
    before, after = ({entry["file"]: entry for entry in entries} for entries in (old, new))
    gone = [name for name in before if name not in after]
    added = [name for name in after if name not in before]
    changed = [name for name in after if name in before and after[name] != before[name]]
    parts = [("gone", gone), ("new", added), ("changed", changed)]
    said = [f"{word}: {', '.join(names[:3])}" for word, names in parts if names]
    return f"inputs {'; '.join(said) or 'in another order'}"
