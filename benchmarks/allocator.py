"""Encoding on a CPU while the process keeps freed memory, and with glibc's own settings.

The package sets the first when it loads an encoder (`forward/host/freed_memory.py`). For the
second, the environment has a tunable of glibc that changes nothing: the package then takes the
memory settings for the user's choice, and leaves them alone. Each turn is a new process, because
the settings hold for a whole process; the two take turns, and the median of the ratios counts.

    python -m benchmarks.allocator                   # SmolLM-135M's shape, random weights
    python -m benchmarks.allocator --model nano --texts 384 --dtype float32
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.encode import save_model
from benchmarks.texts import build_mixes, read_sentences
from unmasked import LLM2Vec
from unmasked.checkpoint.location import bundled_path

KEPT, RETURNED = "kept", "returned"
ENVIRONMENT = {KEPT: {}, RETURNED: {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}}
LEAVE_OUT = ("GLIBC_TUNABLES", "LD_PRELOAD")


def encode(options: argparse.Namespace) -> dict[str, float]:
    """Seconds, system seconds, page faults of one encoding, and the peak of the process in MiB."""
    model = LLM2Vec.from_pretrained(options.model, dtype=options.dtype, device="cpu")
    count = model.tokenizer.backend_tokenizer.encode
    sentences, sizes = read_sentences(options.data), {"mixed": options.texts}
    texts = build_mixes(sentences, sizes, lambda text: len(count(text).ids))["mixed"]
    model.encode(texts[: len(texts) // 2])
    before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    model.encode(texts)
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "system": after.ru_stime - before.ru_stime,
        "faults": after.ru_minflt - before.ru_minflt,
        "peak": after.ru_maxrss / 1024,
    }


def in_process(way: str, arguments: Sequence[str]) -> dict[str, float]:
    """The figures of `encode` in a new process."""
    plain = {k: v for k, v in os.environ.items() if k not in LEAVE_OUT and "MALLOC_" not in k}
    command = [sys.executable, "-m", "benchmarks.allocator", "--turn", *arguments]
    made = subprocess.run(
        command, env=plain | ENVIRONMENT[way], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(made.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder or name; by default random weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--data", type=Path, help="folder with text/enwiki_sentences.txt.gz")
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.turn:
        print(json.dumps(encode(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model is None:
            save_model(Path(folder), None, str(bundled_path()))
            model = folder
        given = ["--model", model, "--dtype", options.dtype, "--texts", str(options.texts)]
        given += ["--data", str(options.data)] if options.data else []
        turns: dict[str, list[Any]] = {way: [] for way in ENVIRONMENT}
        for _ in range(options.rounds):
            for way, found in turns.items():
                found.append(in_process(way, given))
    for way, found in turns.items():
        told = {key: median(turn[key] for turn in found) for key in found[0]}
        print(
            f"{way:<10}{told['seconds']:6.2f} s, {told['system']:.2f} s in the system, "
            f"{told['faults']:,.0f} page faults, peak {told['peak']:,.0f} MiB"
        )
    pairs = zip(turns[RETURNED], turns[KEPT], strict=True)
    print(f"kept is {median(a['seconds'] / b['seconds'] for a, b in pairs):.2f} times as fast")


if __name__ == "__main__":
    main()
