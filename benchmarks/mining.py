"""Mining of many pairs: time, memory, and what a kill leaves, with a model that costs nothing.

A random model of one layer and width 32, so that what is measured is the rows, the vectors on the
disk and the search. Each size runs in a process of its own: unbroken, then killed at a share of
that time and continued, to the same bytes. ``--part`` stops a size that is too large for a whole
search after so many seconds, continues it, and stops it again: its memory is seen by then.

    python -m benchmarks.mining                       # 100 thousand pairs
    python -m benchmarks.mining --rows 1000000 --part 600
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.memory import WORDS, make_model, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--part", type=float, help="seconds of each of two parts of a run")
    parser.add_argument("--killed", type=float, default=0.5, help="share of the unbroken time")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # what each process is given
    given = parser.parse_args()
    if given.one:
        mine_pairs(*map(Path, given.one))
        return
    print("| pairs | | seconds | peak, MiB | reached |\n|---|---|---|---|---|")
    for rows in given.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_model(folder / "model")
            write_pairs(folder / "pairs.jsonl", rows)
            measure(folder, rows, given.part, given.killed)


def measure(folder: Path, rows: int, part: float | None, killed: float) -> None:
    """One size, a line of the table for each process."""
    if part is not None:
        show(rows, "stopped", *run(folder, "part.jsonl", part))
        show(rows, "continued, and stopped", *run(folder, "part.jsonl", part))
        return
    seconds, facts = run(folder, "whole.jsonl")
    show(rows, "unbroken", seconds, facts)
    show(rows, "killed", *run(folder, "again.jsonl", killed * seconds))
    show(rows, "continued", *run(folder, "again.jsonl"))
    same = (folder / "whole.jsonl").read_bytes() == (folder / "again.jsonl").read_bytes()
    size = (folder / "whole.jsonl").stat().st_size
    print(f"\n{'the same' if same else 'OTHER'} {size:,} bytes", flush=True)


def run(folder: Path, output: str, most: float | None = None) -> tuple[float, dict]:
    """Mine in a process, killed after so many seconds; the seconds, and what it said last."""
    command = [sys.executable, "-m", "benchmarks.mining", "--one", str(folder), output]
    begun, said = time.monotonic(), folder / "said.txt"
    with said.open("w") as file:
        process = subprocess.Popen(command, stdout=file)
        try:
            assert process.wait(most) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    lines = [line for line in said.read_text().split("\n")[:-1] if line.startswith("{")]
    return time.monotonic() - begun, json.loads(lines[-1]) if lines else {}


def show(rows: int, what: str, seconds: float, facts: dict) -> None:
    reached, mib = facts.get("reached", "nothing"), facts.get("peak", 0)
    print(f"| {rows:,} | {what} | {seconds:,.0f} | {mib:,.0f} | {reached} |", flush=True)


def write_pairs(path: Path, rows: int) -> None:
    """Different queries and documents of 4 to 12 words."""
    with path.open("w") as file:
        for row in range(rows):
            digits = f"{row // 10000 % 100} {row // 100 % 100} {row % 100}"
            more = " ".join(WORDS[row % 7 : row % 7 + row % 9])
            pair = {"query": f"what {digits} {more}", "positive": f"{more} of {digits}"}
            file.write(json.dumps(pair) + "\n")


def mine_pairs(folder: Path, output: Path) -> None:
    """One run, in this process; says now and then as JSON how far it is."""
    from unmasked import LLM2Vec
    from unmasked.recipe.schema import Pairs
    from unmasked.train.mining.mining import mine

    told = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > 1:
            told = time.monotonic()
            say(f"{what} {done:,} of {total:,}")

    model = LLM2Vec.from_pretrained(folder / "model", device="cpu")
    found = mine(model, Pairs(path=str(folder / "pairs.jsonl")), folder / output, progress=tell)
    say(f"{found.negatives:,} negatives")


def say(reached: str) -> None:
    print(json.dumps({"reached": reached, "peak": peak()}), flush=True)


if __name__ == "__main__":
    main()
