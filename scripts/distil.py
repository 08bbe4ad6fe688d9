"""What a teacher gives a student of half the layers: the table of the recipe `distil`.

    python scripts/distil.py                    # three seeds, on the encoder of a whole demo
    python scripts/distil.py --share 0.3 --seeds 0
    python scripts/distil.py --tasks DATA/sts/stsb_en_dev.tsv --output docs/results.md

The student is the first three of six layers of the encoder that `unmasked demo` makes: as they are,
trained on the demo's pairs alone, on a teacher's vectors alone, on both, and on the pairs and how
the teacher shares out a query among a batch (the recipe as it is shipped). The teacher is the
demo's encoder, or all its layers after as many steps on the same pairs as the students take. All
students train for the same number of steps on the same rows. Everything is kept in ``--work``,
trained and scored, and the same command continues; more seeds or tasks add to it. Cost: the demo,
9 to 14 minutes of processor time for each student, and twice that for the second teacher.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from unmasked import LLM2Vec, demo
from unmasked.evaluate.compare import headlines
from unmasked.evaluate.scorer import make_scorer
from unmasked.files.writing import write_text
from unmasked.recipe.files import load_recipe
from unmasked.train.callback import Listener
from unmasked.train.run import Run

STUDENTS = {
    "pairs alone": ("teacher=null",),
    "vectors alone": ("teacher.loss=cosine", "teacher.contrastive=0.0"),
    "vectors and pairs": ("teacher.loss=cosine", "teacher.weight=4.0"),
    "scores and pairs": (),
}
"""Settings of the supervised stage that differ from the recipe's."""

FURTHER = ", teacher trained further"
"""End of the name of a student whose teacher was trained further than the demo's encoder."""

NAMES = [*STUDENTS, *(name + FURTHER for name in STUDENTS if name != "pairs alone")]


def make_teacher(folder: Path, share: float) -> Path:
    """The demo's encoder, after a share of its steps, and its data."""
    full = demo.FULL
    size = demo.Size(
        mntp_steps=max(10, round(full.mntp_steps * share)),
        simcse_steps=max(10, round(full.simcse_steps * share)),
        supervised_steps=max(10, round(full.supervised_steps * share)),
    )
    demo.write_data(folder, size)
    Run(demo.demo_recipe(folder, size), folder, listener=Listener(stage=print)).run()
    return folder / "model"


def train_supervised(
    start: Path, folder: Path, share: float, seed: int, settings: Sequence[str]
) -> Path:
    """The encoder of the recipe `distil` on the demo's pairs, from the demo's encoder.

    Args:
        start: the demo's encoder.
        folder: where the run is kept.
        share: of the recipe's steps.
        seed: of the run.
        settings: what differs from the recipe, in full names.
    """
    steps = max(10, round(300 * share))
    own = [f"model.base={start}", "evaluate.tasks=[]", f"seed={seed}"]
    own += [f"supervised.data={start.parent / 'data' / 'pairs.jsonl'}", f"supervised.steps={steps}"]
    own += [f"supervised.warmup_steps={steps // 10}", *settings]
    Run(load_recipe("distil", own), folder).run()
    return folder / "model"


def train_further(start: Path, work: Path, share: float) -> Path:
    """All layers of the demo's encoder after the students' steps on the students' pairs."""
    print("teacher trained further", flush=True)
    settings = ["model.layers=null", "supervised.teacher=null"]
    return train_supervised(start, work / "further-teacher", share, 0, settings)


def train_student(
    name: str, start: Path, teacher: Path, work: Path, seed: int, share: float
) -> Path:
    """The encoder of one student, by its name."""
    print(f"{name}, seed {seed}", flush=True)
    settings = (f"teacher.model={teacher}", *STUDENTS[name.removesuffix(FURTHER)])
    changed = [f"supervised.{setting}" for setting in settings]
    folder = work / f"seed-{seed}" / name.replace(",", "").replace(" ", "-")
    return train_supervised(start, folder, share, seed, changed)


class KeptScores:
    """Main scores of encoders, each computed once and kept in a file.

    Args:
        file: where they are kept.
        tasks: task files.
    """

    def __init__(self, file: Path, tasks: Sequence[Path | str]) -> None:
        self.file, self.tasks = file, list(map(str, tasks))
        self.known: dict[str, dict[str, float]] = {}
        if file.is_file():
            self.known = json.loads(file.read_text(encoding="utf-8"))

    def of(self, name: str, load: Callable[[], LLM2Vec]) -> dict[str, float]:
        """The main score of each task, times 100, of an encoder that is loaded if it has to be."""
        known = self.known.setdefault(name, {})
        missing = [task for task in self.tasks if task not in known]
        encoder = load() if missing else None
        for task in missing:
            (result,) = make_scorer([task])(encoder)
            (metric,) = headlines([f"{result.name}.{key}" for key in result.scores])
            known[task] = 100 * result.scores[metric.removeprefix(f"{result.name}.")]
            print(f"{name}: {task} {known[task]:.2f}", flush=True)
            write_text(self.file, json.dumps(self.known, indent=1) + "\n")
        return {Path(task).stem: known[task] for task in self.tasks}


def cell(values: Sequence[float]) -> str:
    """The mean, and the standard deviation of several."""
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


def show(file: Path | None, mark: str, lines: Sequence[str]) -> None:
    """Print a table, and put it between ``<!-- MARK -->`` and its end in a page."""
    print("\n" + "\n".join(lines))
    if file is not None:
        begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
        before, rest = file.read_text(encoding="utf-8").split(begin)
        write_text(file, before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1])


def main() -> None:
    """Train what is not trained yet, score what is not scored yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/distil-table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--share", type=float, default=1.0, help="Share of all numbers of steps.")
    parser.add_argument("--tasks", nargs="*", default=[], help="Task files beside the demo's.")
    parser.add_argument("--output", type=Path, help="Page that the table is put into.")
    asked = parser.parse_args()
    start = make_teacher(asked.work / "teacher", asked.share)
    tasks = [start.parent / "data" / demo.TASK, *asked.tasks]
    scores = KeptScores(asked.work / "scores.json", tasks)
    whole = scores.of("teacher", partial(LLM2Vec.from_pretrained, start))
    half = scores.of("its first half", partial(LLM2Vec.from_pretrained, start, layers=3))
    rows = {"teacher, all layers": [whole], "its first half, as it is": [half]}
    further, best = start, whole
    if any(name.endswith(FURTHER) for name in asked.only):
        further = train_further(start, asked.work, asked.share)
        best = scores.of("further teacher", partial(LLM2Vec.from_pretrained, further))
        rows["teacher trained further, all layers"] = [best]
    for seed in asked.seeds:
        for name in asked.only:
            teacher = further if name.endswith(FURTHER) else start
            folder = train_student(name, start, teacher, asked.work, seed, asked.share)
            found = scores.of(f"{name}, seed {seed}", partial(LLM2Vec.from_pretrained, folder))
            rows.setdefault(name, []).append(found)
    lines = [f"| encoder | {' | '.join(whole)} | average | of its teacher |"]
    lines.append("|---" * (len(whole) + 3) + "|")
    for name, seeds in rows.items():
        averages = [mean(found.values()) for found in seeds]
        cells = [cell([found[task] for found in seeds]) for task in whole]
        own = best if "trained further" in name else whole
        share = f"{100 * mean(averages) / mean(own.values()):.1f} %"
        share = "" if name == "pairs alone" else share
        lines.append(f"| {name} | {' | '.join(cells)} | {cell(averages)} | {share} |")
    show(asked.output, "distil", lines)


if __name__ == "__main__":
    main()
