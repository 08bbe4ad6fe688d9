"""Encoding speed of this checkout against another one, in one run.

Two processes, each with its own checkout's code, encode the same texts in turns, so that what the
machine does beside them hits both. Two runs one after the other moved by a third on a shared
machine where turns agreed within a twentieth. Weights are random, of SmolLM-135M's shape.

    git worktree add ../before HEAD~10
    python -m benchmarks.checkouts ../before
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from subprocess import PIPE

WORKER = """
import sys, tempfile, time
from pathlib import Path
said, sys.stdout = sys.stdout, sys.stderr
from benchmarks.encode import LLM2Vec, bundled_path, save_model
from benchmarks.texts import build_mixes, read_sentences
mix, count, data = sys.argv[1], int(sys.argv[2]), sys.argv[3]
folder = Path(tempfile.mkdtemp()) / "encoder"
save_model(folder, None, str(bundled_path()))
model = LLM2Vec.from_pretrained(folder, dtype="auto")
sentences = read_sentences(Path(data) if data else None)
texts = build_mixes(sentences, {mix: count}, lambda text: len(model.tokenizer.tokenize(text)))[mix]
model.encode(texts)
print("ready", file=said, flush=True)
for _ in sys.stdin:
    begun = time.perf_counter()
    model.encode(texts)
    print(time.perf_counter() - begun, file=said, flush=True)
"""


class Checkout:
    """A process that encodes with the code of a folder each time it is told to."""

    def __init__(self, folder: Path, arguments: list[str], stack: ExitStack) -> None:
        paths = os.pathsep.join([str(folder), str(folder / "src")])
        self.process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", WORKER, *arguments],
                cwd=folder, env=os.environ | {"PYTHONPATH": paths}, stdin=PIPE, stdout=PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self._ask, self._answer = self.process.stdin, self.process.stdout
        self.seconds: list[float] = []
        if not self._answer.readline():
            raise SystemExit(f"{folder} cannot be run. Fix: name the root of a checkout.")

    def encode(self) -> None:
        """One turn."""
        self._ask.write("go\n")
        self._ask.flush()
        self.seconds.append(float(self._answer.readline()))


def main() -> None:
    """Take turns, and print the median of each and of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("--mix", default="short", choices=["short", "passages", "mixed"])
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--data", default="", help="folder with text/enwiki_sentences.txt.gz")
    options = parser.parse_args()
    given = [options.mix, str(options.texts), options.data and str(Path(options.data).resolve())]
    with ExitStack() as stack:
        roots = options.other.resolve(), Path(__file__).resolve().parents[1]
        sides = [Checkout(root, given, stack) for root in roots]
        for number in range(options.rounds):
            for side in sides if number % 2 else reversed(sides):
                side.encode()
        other, own = (side.seconds for side in sides)
        ratio = median(theirs / ours for theirs, ours in zip(other, own, strict=True))
        print(f"{options.mix}: {median(other):.3f} s there, {median(own):.3f} s here, ", end="")
        print(f"here {ratio:.2f} times as fast (median of {options.rounds} rounds)")
        for side in sides:
            side.process.kill()


if __name__ == "__main__":
    main()
