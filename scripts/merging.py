"""Merged encoders beside their parts, on the domain of one and on general tasks: a table.

    python scripts/merging.py --data DATA
    python scripts/merging.py --data DATA --output docs/results.md

One part is the encoder of a demo, which knows docstrings. The other begins where the demo's last
stage began and learns from NLI triplets instead, English and Korean. Both are merged by half,
linearly and along the sphere, and with 0.7 of the first. The seed is that of the second part.
Everything is kept in ``--work``, trained and scored, and the same command continues. Cost: the
demo, four minutes of processor time for each seed, and two for each encoder that is scored.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import mean

from distil import KeptScores, cell, make_teacher, show

from unmasked import LLM2Vec, demo
from unmasked.recipe.files import load_recipe
from unmasked.train.blending import merge_encoders
from unmasked.train.run import Run

GENERAL = (
    "sts/stsb_en_dev.tsv",
    "sts/stsb_ko_dev.tsv",
    "retrieval/cranfield",
    "classification/banking77_test.tsv",
)
PAIRS = ("nli_en.jsonl", "nli_ko.jsonl")
STEPS = 100
MERGED: dict[str, tuple[list[float] | None, str]] = {
    "merged, linear": (None, "linear"),
    "merged, slerp": (None, "slerp"),
    "merged, linear, 0.7 to 0.3": ([0.7, 0.3], "linear"),
}
"""Weights and method of each."""


def sentences(first: Path, data: Path, work: Path, seed: int, share: float) -> Path:
    """The folder of the encoder that has learned from NLI triplets."""
    start, steps = work / "start", max(10, round(STEPS * share))
    if not start.is_dir():
        stages = [first.parent / name for name in ("mntp", "simcse")]
        LLM2Vec.from_pretrained("nano", stages, max_length=256, dtype="float32").save(start)
    pairs = ", ".join(str(data / "pairs" / name) for name in PAIRS)
    settings = [f"model.base={start}", "mntp=null", "simcse=null", f"seed={seed}"]
    settings += [f"supervised.data=[{pairs}]", f"supervised.steps={steps}"]
    folder = work / f"seed-{seed}" / "sentences"
    print(f"sentences, seed {seed}", flush=True)
    Run(load_recipe("nano-supervised", settings), folder).run()
    return folder / "model"


def main() -> None:
    """Train what is not trained yet, score what is not scored yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="The development data.")
    parser.add_argument("--work", type=Path, default=Path("runs/merging-table"))
    parser.add_argument("--demo", type=Path, help="Run folder of a demo that is there.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=1.0, help="Share of all numbers of steps.")
    parser.add_argument("--output", type=Path, help="Page that the table is put into.")
    asked = parser.parse_args()
    first = make_teacher(asked.demo or asked.work / "demo", asked.share)
    own = first.parent / "data" / demo.TASK
    scores = KeptScores(asked.work / "scores.json", [own, *(asked.data / t for t in GENERAL)])
    known = scores.of("docstrings", partial(LLM2Vec.from_pretrained, first))
    rows = {"docstrings": [known]}
    for seed in asked.seeds:
        second = sentences(first, asked.data, asked.work, seed, asked.share)
        found = scores.of(f"sentences, seed {seed}", partial(LLM2Vec.from_pretrained, second))
        rows.setdefault("sentences", []).append(found)
        for name, how in MERGED.items():
            merged = partial(merge_encoders, [first, second], *how, dtype="auto")
            rows.setdefault(name, []).append(scores.of(f"{name}, seed {seed}", merged))
    lines = [f"| encoder | {' | '.join(known)} | general | average |"]
    lines.append("|---" * (len(known) + 3) + "|")
    for name, seeds in rows.items():
        columns = [[found[task] for found in seeds] for task in known]
        general = [mean(list(found.values())[1:]) for found in seeds]
        both = [mean(pair) for pair in zip(columns[0], general, strict=True)]
        cells = map(cell, (*columns, general, both))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    show(asked.output, "merging", lines)


if __name__ == "__main__":
    main()
