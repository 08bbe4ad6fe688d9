"""The manifest of a folder of shards: its inputs, its settings, and which shards are complete.

``_manifest.jsonl`` (``_manifest-2-of-4.jsonl`` for the second of four machines) begins with the
settings and the inputs. One line per shard follows, appended and flushed to the disk once the shard
has its final name: file, first row, rows, bytes, SHA-256, a digest of the texts that were read,
every skipped row with its reason, and, if there are any, the number of truncated texts. The last
line says that everything is done. No times are written, so the same work always gives the same
bytes. Programs that read a folder of Parquet files ignore names that begin with ``_``.

Memory: a few numbers per shard; the skipped rows stay on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from unmasked.errors import OutputError
from unmasked.files.writing import locked_by_one, not_written, written_aside

FORMAT = 1
Part = tuple[int, int]  # (i, n): the i-th of n machines, counted from 1
_OURS = ("part-", ".part-", "_manifest", "._manifest", "_ranges", "._ranges")
"""Beginnings of the names of all files in a folder of shards."""


def parse_part(text: str) -> Part:
    """``2/4`` → (2, 4).

    Raises:
        OutputError: the text has another form, or i is not from 1 to n.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part[0] <= part[1]:
        raise OutputError(f"--shard {text}: should be i/n with i from 1 to n. Fix: --shard 1/4.")
    return part


class WholeShard(NamedTuple):
    """A shard that is complete."""

    rows: int  # the number of its vectors
    skipped: int  # the number of rows without a vector
    texts: str  # the digest of all rows that were read
    line: tuple[int, int]  # the place of its line in the manifest: offset and length in bytes
    documents: int  # the number of texts with a vector, or several if texts were divided
    cut: int  # how many of these texts were truncated


@dataclass
class Manifest:
    """The manifest of one machine; `locked` opens it."""

    folder: Path
    part: Part
    header: dict[str, Any] = field(default_factory=dict)
    """Settings and inputs; empty before `begin`."""
    done: dict[int, WholeShard] = field(default_factory=dict)
    """The shards that are complete, by number."""
    finished: bool = False  # whether the last line says that everything is done
    replacing: bool = False
    """Whether the folder still has what `clear` deletes, the output of an earlier call."""

    @property
    def path(self) -> Path:
        """The file."""
        place, machines = self.part
        name = "_manifest" if machines == 1 else f"_manifest-{place}-of-{machines}"
        return self.folder / f"{name}.jsonl"

    def clear(self) -> None:
        """Delete what ``--overwrite`` replaces; called once nothing can be refused any more."""
        for path in self.folder.iterdir() if self.replacing else ():
            if path.suffix != ".lock":
                path.unlink()
        self.replacing = False

    def read(self) -> None:
        """Read what an earlier run wrote, and drop an incomplete last line.

        Raises:
            OutputError: the file is not a manifest.
        """
        start = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):  # the run was killed while it wrote the line
                    break
                self._take(line, start)
                start += len(line)
        if start < self.path.stat().st_size:
            os.truncate(self.path, start)

    def _take(self, line: bytes, start: int) -> None:
        entry = manifest_entry(self.path, line, first=start == 0)
        # A shard after the line that says so was lost and written again: finishing comes after it.
        self.finished = "finished" in entry
        if start == 0:
            self.header = entry
        elif not self.finished:
            file = self.folder / entry["file"]
            if file.is_file() and file.stat().st_size == entry["bytes"]:
                self._keep(entry, (start, len(line)))

    def _keep(self, entry: dict[str, Any], line: tuple[int, int]) -> None:
        skipped = len(entry["skipped"])
        rows, cut = entry["rows"], entry.get("cut", 0)
        documents = entry.get("documents", rows)
        self.done[entry["shard"]] = WholeShard(rows, skipped, entry["texts"], line, documents, cut)

    def begin(self, settings: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
        """Write the first line, or compare it with the one that is there.

        A manifest of this machine without a complete shard is not compared but replaced, so that
        settings may be changed after a run that failed at once.

        Raises:
            OutputError: the folder was begun with other settings or inputs, or is divided
                differently.
        """
        header = {"format": FORMAT, "settings": settings, "inputs": inputs}
        for path in sorted(self.folder.glob("_manifest*.jsonl")):
            if path != self.path or self.done:
                with path.open("rb") as file:
                    there = manifest_entry(path, file.readline() or b"{}", first=True)
                _compare(self.folder, there, header)
        if not self.done:
            place, machines = self.part
            # Shards that have their final name but no line, as the run was killed in between.
            for path in self.folder.glob("part-*"):
                if path.stem[5:].isdecimal() and int(path.stem[5:]) % machines == place - 1:
                    path.unlink()
            with written_aside(self.path) as file:
                file.write(json_line(header))
            self.header, self.finished = header, False

    def add(self, entry: dict[str, Any]) -> None:
        """Record a shard that has its final name."""
        line = json_line(entry)
        try:
            with self.path.open("ab") as file:
                start = file.tell()
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise not_written(self.path, error) from error
        self._keep(entry, (start, len(line)))

    def finish(self) -> None:
        """Sort the lines by shard and write the last one."""
        with self.path.open("rb") as old, written_aside(self.path) as file:
            file.write(json_line(self.header))
            for _, done in sorted(self.done.items()):
                start, length = done.line
                old.seek(start)
                file.write(old.read(length))
            rows, skipped, cut = map(self.total, ("rows", "skipped", "cut"))
            last = {"finished": True, "rows": rows, "skipped": skipped}
            file.write(json_line(last | ({"cut": cut} if cut else {})))
        self.finished = True

    def total(self, of: str) -> int:
        """The sum of one of the numbers of `WholeShard` over all complete shards."""
        return sum(int(getattr(done, of)) for done in self.done.values())


@contextmanager
def locked(folder: Path, part: Part, overwrite: bool = False) -> Iterator[Manifest]:
    """The manifest of a folder, which is created if needed and locked against other processes.

    With `overwrite`, what is in the folder is not read, and stays until `Manifest.clear`. A new
    folder is removed again if an error comes before anything is written to it.

    Raises:
        OutputError: another process writes to the folder, or other files are in it.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file. Fix: name a folder, or end the name in .npy.")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    strangers = sorted(p.name for p in folder.iterdir() if not p.name.startswith(_OURS))
    if strangers:
        raise OutputError(
            f"{folder} has other files in it ({', '.join(strangers[:3])}). Fix: name a new folder."
        )
    manifest = Manifest(folder, part, replacing=overwrite)
    taken = (
        f"{folder}: another process is writing to it. Fix: wait for it, name another folder, or "
        "divide the work with --shard 1/2 and --shard 2/2."
    )
    try:
        with ExitStack() as locks:
            locks.enter_context(locked_by_one(folder / f".{manifest.path.name}.lock", taken))
            if overwrite:  # no other machine may be writing to it
                for other in folder.glob("._manifest-*.lock"):
                    locks.enter_context(locked_by_one(other, taken))
            elif manifest.path.is_file():
                manifest.read()
            yield manifest
    except BaseException:
        if made:
            _remove_if_unused(folder)
        raise


def _remove_if_unused(folder: Path) -> None:
    """Remove a folder that has nothing but locks in it, so that a refused call leaves nothing."""
    files = list(folder.iterdir())
    if all(file.suffix == ".lock" for file in files):
        with suppress(OSError):  # another process may have begun in it
            for file in files:
                file.unlink()
            folder.rmdir()


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_line(entry: dict[str, Any]) -> bytes:
    """An entry as a line of JSON; the name of a file need not be valid Unicode."""
    return json.dumps(entry, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


_NUMBERS, _NAMES = ("shard", "first_row", "rows", "bytes"), ("file", "texts")
_SHARD = dict.fromkeys(_NUMBERS, int) | dict.fromkeys(_NAMES, str) | {"skipped": list}


def manifest_entry(path: Path, line: bytes, first: bool = False) -> dict[str, Any]:
    """A line of a manifest: of settings and inputs if it is the first, of a shard, or the last.

    Raises:
        OutputError: the line is none of these, or another version of this package wrote it.
    """
    try:
        entry = json.loads(line)
    except ValueError:  # half a line, or no text
        entry = None
    if first and isinstance(entry, dict) and entry.get("format") != FORMAT:
        version = entry.get("format")
        raise OutputError(f"{path}: unknown format {version!r}. Fix: name another folder.")
    if first:
        good = _has(entry, {"settings": dict, "inputs": list})
        good = good and all(_has(given, {"file": str}) for given in entry["inputs"])
    else:
        good = isinstance(entry, dict) and ("finished" in entry or _has(entry, _SHARD))
        faults = entry.get("skipped", []) if good and "shard" in entry else []
        good = good and all(_has(fault, {"row": int}) for fault in faults)
    if not good:
        raise OutputError(f"{path} is not a manifest. Fix: name another folder.")
    known: dict[str, Any] = entry
    return known


def _has(entry: Any, kinds: Mapping[str, type]) -> bool:
    """Whether an object of JSON has some keys with values of these types."""
    return isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in kinds.items())


def _compare(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse a header that differs from the one that is in the folder."""
    here = json.loads(json_line(here))  # so that both sides have lists and no tuples
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
            "Fix: give the same settings and inputs, another folder, or --overwrite."
        )


def _changed_inputs(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> str:
    before, after = ({entry["file"]: entry for entry in entries} for entries in (old, new))
    parts = {
        "gone": [name for name in before if name not in after],
        "new": [name for name in after if name not in before],
        "changed": [name for name in after if name in before and after[name] != before[name]],
    }
    said = [f"{word}: {', '.join(names[:3])}" for word, names in parts.items() if names]
    return f"inputs {'; '.join(said) or 'in another order'}"
