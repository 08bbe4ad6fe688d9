"""The command line in a process of its own, what it loaded, and what it left on the disk."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-m", "unmasked"]
HEAVY = {"torch", "transformers", "sentence_transformers", "peft", "datasets", "accelerate"}


def heavy_modules_after(code: str) -> set[str]:
    """The heavy libraries that a fresh interpreter has loaded once ``code`` has run."""
    report = "\nimport sys; print('loaded:', *sorted(n for n in sys.modules if '.' not in n))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
    )
    *_, last = done.stdout.splitlines()
    assert last.startswith("loaded:")
    return HEAVY & set(last.split())


def hear_interrupts() -> None:
    """For `preexec_fn`: a shell starts what it runs in the background deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def listing(folder: Path) -> dict[str, int]:
    """Every file below a folder, and when it was written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}
