"""What a folder of shards holds, and whether it is what its manifests say."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but locks, which are empty."""
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    return {name: data for name, data in files.items() if not name.endswith(".lock")}


def said(folder: Path, name: str = "_manifest.jsonl") -> list[dict]:
    """The lines of a manifest."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def verified(folder: Path) -> int:
    """How many shards the finished manifests of a folder list; each must have its checksum."""
    count = 0
    for path in folder.glob("_manifest*.jsonl"):
        _, *shards, last = said(folder, path.name)
        assert last["finished"]
        for line in shards:
            data = (folder / line["file"]).read_bytes()
            assert line["bytes"] == len(data), line["file"]
            assert line["sha256"] == hashlib.sha256(data).hexdigest(), line["file"]
        count += len(shards)
    return count
