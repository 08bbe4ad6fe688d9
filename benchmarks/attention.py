"""Attention on a CPU in bfloat16: SDPA against two matrix products, for texts of several lengths.

`forward/packing/dense.py` chooses between them by the length of the texts (`LONG`) and by whether
the CPU has matrix units (AMX). Both run in turns; the shortest of all rounds is printed, because
whatever else the machine does only adds to it. Heads are those of SmolLM-135M.

    python -m benchmarks.attention
"""

from __future__ import annotations

import argparse
import time
from unittest import mock

import torch

from unmasked.forward.packing import dense
from unmasked.forward.precision import has_amx

SHAPES = ((1, 48), (2, 64), (1, 96), (2, 125), (8, 125), (1, 250), (1, 512), (1, 1024), (1, 2048))
"""(texts, tokens of each)"""
HEADS, SHARED, WIDTH = 9, 3, 64


def seconds(inputs: tuple[torch.Tensor, ...], sdpa: bool, repeats: int = 5) -> float:
    """Mean seconds of one call that SDPA computes, or matrix products."""
    with mock.patch.multiple(dense, has_amx=lambda: sdpa, LONG=1):
        began = time.perf_counter()
        for _ in range(repeats):
            dense.attend(*inputs, None, dense.Extras())
        return (time.perf_counter() - began) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    print(f"AMX: {has_amx()}; threads: {torch.get_num_threads()}; LONG: {dense.LONG}")
    print("texts  tokens  products ms  SDPA ms  products / SDPA")
    for texts, tokens in SHAPES:
        # As in a packed batch: (texts, tokens, heads, width) in memory, then transposed.
        inputs = tuple(
            torch.randn(texts, tokens, heads, WIDTH, dtype=torch.bfloat16).transpose(1, 2)
            for heads in (HEADS, SHARED, SHARED)
        )
        times: dict[bool, list[float]] = {True: [], False: []}
        with torch.inference_mode():
            for _ in range(rounds + 1):  # the first round warms up
                for sdpa, taken in times.items():
                    taken.append(seconds(inputs, sdpa))
        fast, slow = (1000 * min(times[sdpa][1:]) for sdpa in (True, False))
        print(f"{texts:5}  {tokens:6}  {slow:11.3f}  {fast:7.3f}  {slow / fast:15.2f}")


if __name__ == "__main__":
    main()
