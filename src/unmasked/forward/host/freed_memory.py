"""Freed memory stays with the process, so that one forward can use that of the last.

Every forward allocates its hidden states anew. By default the C library of Linux (glibc) returns
large blocks to the operating system when they are freed, and the next forward gets them back as
pages of zeros, with a page fault for every 4 KiB. Encoding texts of mixed lengths on two CPU cores
caused more than 100,000 page faults per second. Without them it was 1.24 times as fast with
SmolLM-135M's shape in bfloat16, and 1.30 times with `nano` in float32; the peak of the memory was
the same (`benchmarks/allocator.py`).

Cost: after its largest forward, the process keeps up to `KEPT` bytes that it does not use.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping

LARGEST_BLOCK = 32 << 20
"""Blocks of more bytes are still returned when they are freed; older versions allow no larger."""

KEPT = 256 << 20
"""Free bytes at the end of the heap that are kept."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h

OWN_CHOICES = (
    "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_",
    "GLIBC_TUNABLES", "LD_PRELOAD",
)  # fmt: skip
"""Environment variables with which a user has chosen how memory is allocated."""


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let this process keep freed memory for the next forward; a second call changes nothing.

    Returns:
        Whether it does so now: False without glibc, and if the user has made a choice.
    """
    if platform.libc_ver()[0] != "glibc" or any(map(environment.get, OWN_CHOICES)):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK) and mallopt(M_TRIM_THRESHOLD, KEPT))
