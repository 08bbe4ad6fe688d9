"""Writes the files that a test gives to a reader."""

from __future__ import annotations

import gzip
from pathlib import Path


def give(folder: Path, name: str, content: str | bytes) -> str:
    """The path of a new file; a name that ends in .gz has its content compressed."""
    raw = content.encode() if isinstance(content, str) else content
    path = folder / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return str(path)
