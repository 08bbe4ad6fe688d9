"""The command line in a process of its own, and what it left on the disk."""

from __future__ import annotations

import sys
from pathlib import Path

COMMAND = [sys.executable, "-m", "unmasked"]


def listing(folder: Path) -> dict[str, int]:
    """Every file below a folder, and when it was written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}
