"""Records what a stage has read, so that it only continues on the same texts.

``data.json`` in the stage's folder has the number of texts, a digest of them and the size of each
file. An interrupted run that continued on other texts would end with weights that belong to no data
set, so it is refused with an error that says what has changed.

Cost: a digest of every text, about a second per million.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from unmasked.errors import DataError
from unmasked.files.hub import HUB
from unmasked.files.writing import write_text
from unmasked.train.checkpoints import last_checkpoint

FACTS = "data.json"
_MOST = 5  # maximum number of files that an error names


def digest_of(items: Iterable[object]) -> str:
    """A digest of texts, or of rows of texts, and of their order."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()


def sizes_of(files: Sequence[str]) -> dict[str, int]:
    """The size in bytes of every file, without data sets on the hub."""
    return {file: Path(file).stat().st_size for file in files if not file.startswith(HUB)}


def read_facts(folder: Path) -> dict[str, Any]:
    """What a stage has read; empty if it has read nothing yet."""
    file = folder / FACTS
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write what a stage has read, after comparing it with what an interrupted one had read.

    Args:
        folder: the stage's folder.
        facts: at least ``source``, a digest of the texts; ``texts``, their number; and ``files``,
            the size of each file. Others are recorded, too.

    Raises:
        DataError: the stage has a checkpoint that was made with other texts, and says what has
            changed; or by a version of this package that recorded them in another way.
    """
    file, before = folder / FACTS, read_facts(folder)
    if last_checkpoint(folder) is not None and before:
        if len(before["source"]) != len(facts["source"]):
            raise DataError(
                f"an earlier version of this package made the last checkpoint of {folder.name}. It "
                f"recorded the texts in another way, so {file} does not show whether they have "
                "changed. Fix: continue with that version, or choose another output folder."
            )
        if before["source"] != facts["source"]:
            raise DataError(
                f"the texts of {folder.name} have changed since its last checkpoint: "
                f"{'; '.join(_differences(before, facts))}. "
                "Fix: put them back to continue, or choose another output folder."
            )
    write_text(file, json.dumps(facts, indent=2) + "\n")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What has changed, as far as it is known: the number of texts, and which files."""
    old, new = before.get("texts"), now["texts"]
    said = [f"{new:,} texts, but others"]
    if old not in (None, new):
        said = [f"{old:,} texts then, {new:,} now"]
    sizes, files = before.get("files", {}), now["files"]
    for name in dict.fromkeys((*sizes, *files)):
        if name not in files:
            said.append(f"{name} is gone")
        elif name not in sizes:
            said.append(f"{name} is new")
        elif sizes[name] != files[name]:
            said.append(f"{name} had {sizes[name]:,} bytes and has {files[name]:,}")
    more = len(said) - 1 - _MOST
    return said if more <= 0 else [*said[: _MOST + 1], f"and {more:,} files more"]
