"""What is refused before any work is done, and what the source is made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from unmasked.corpus.manifest import Manifest, Part, checksum
from unmasked.corpus.writers import OUTPUTS
from unmasked.errors import DataError, OutputError
from unmasked.files.source import Source


def parse_part(text: str) -> Part:
    """``2/4`` → (2, 4).

    Raises:
        OutputError: it is something else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part[0] <= part[1]:
        raise OutputError(f"--shard {text}: should be i/n with i from 1 to n, such as 1/4.")
    return part


def check_output(path: Path, overwrite: bool = False) -> None:
    """Refuse an output file that exists or is of an unknown kind, before any work is done.

    Raises:
        OutputError: it exists (and `overwrite` is False), is a folder, or has another suffix.
    """
    if path.suffix not in OUTPUTS:
        raise OutputError(
            f"{path}: unknown kind of output. Allowed: {', '.join(OUTPUTS)}; or a folder, "
            "a name without a suffix or with a / behind."
        )
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Fix: name a file in it.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists. Fix: another name, or --overwrite.")


def survey(
    source: Source, skip: bool, manifest: Manifest, needs_counts: bool
) -> tuple[list[dict[str, Any]], list[int] | None]:
    """What the source is, for the manifest, and how many rows each file has, if that can be known.

    Files are read twice, for their digests and to check every row: a fault in the last line should
    not come to light after days of encoding. A run that continues reads them once.
    """
    if not source.on_disk:
        if needs_counts and not source.again:
            raise DataError("standard input cannot be shared among workers. Fix: give a file.")
        return [{"file": source.files[0]}], source.survey(skip) if needs_counts else None
    inputs: list[dict[str, Any]] = [
        {"file": name, "bytes": Path(file).stat().st_size, "sha256": checksum(Path(file))}
        for name, file in zip(source.names, source.files, strict=True)
    ]
    known = [dict(entry) for entry in manifest.header.get("inputs", [])]
    counts = [entry.pop("rows", 0) for entry in known]
    if known != inputs:
        counts = source.survey(skip)
    for entry, rows in zip(inputs, counts, strict=True):
        entry["rows"] = rows
    return inputs, counts


def check_keep(source: Source, kind: str) -> None:
    """Refuse columns that the output cannot hold."""
    if source.keep and kind != ".parquet":
        raise OutputError(f"{kind} holds vectors only. Fix: .parquet, or no --keep.")
    own = {"row", "id", "vector"} & set(source.keep)
    if own or len(set(source.keep)) < len(source.keep):
        word = f"'{own.pop()}' is a column of the output already" if own else "a column is repeated"
        raise OutputError(f"--keep {','.join(source.keep)}: {word}. Fix: leave it out.")


def check_ranges(ranges: Path | None, precision: str) -> None:
    """Refuse ranges that nothing would use."""
    if ranges is not None and precision != "int8":
        raise OutputError(
            f"--ranges {ranges}: {precision} has no ranges. Fix: --precision int8, or no --ranges."
        )


def check_apart(source: Source, folder: Path) -> None:
    """Refuse to write into the folder that is read, whose files would change the next reading."""
    root = Path(source.path).resolve()
    if source.on_disk and root.is_dir() and folder.resolve().is_relative_to(root):
        raise OutputError(f"{folder} is in the folder that is read. Fix: a folder outside it.")
