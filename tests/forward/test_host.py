"""Memory that a forward frees is used by the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from unmasked.forward.host import freed_memory

FORWARDS = """
import os, resource, sys
import torch
from unmasked.forward.host.freed_memory import keep_freed_memory

def faults(forwards):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(forwards):
        states = [torch.ones(16 << 18) for _ in range(4)]  # 16 MiB each
        del states
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(2)
print(faults(5))
assert keep_freed_memory({})
faults(2)
print(faults(5))
"""

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="needs glibc, whose settings these are"
)


@needs_glibc
def test_a_forward_gets_the_memory_of_the_last_one_without_page_faults():
    made = subprocess.run(
        [sys.executable, "-c", FORWARDS], capture_output=True, text=True, check=True
    )
    returned, kept = map(int, made.stdout.split())
    assert kept < 500 < returned, (returned, kept)


@pytest.fixture
def settings(monkeypatch) -> list[tuple[int, int]]:
    """What was set; nothing is changed."""
    calls: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, name: int, value: int) -> int:
            calls.append((name, value))
            return 1

    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: Library())
    return calls


def test_the_choice_of_the_user_stays(settings):
    assert not freed_memory.keep_freed_memory({"MALLOC_TRIM_THRESHOLD_": "131072"})
    assert not freed_memory.keep_freed_memory({"LD_PRELOAD": "libjemalloc.so.2"})
    assert settings == []


def test_another_c_library_is_left_alone(settings, monkeypatch):
    monkeypatch.setattr(freed_memory.platform, "libc_ver", lambda: ("", ""))
    assert not freed_memory.keep_freed_memory({})
    assert settings == []


@needs_glibc
def test_every_encoder_sets_it(settings, tiny_decoder):
    from unmasked import LLM2Vec

    LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    assert len(settings) == 2
