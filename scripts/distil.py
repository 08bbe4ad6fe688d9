"""What a teacher gives a student of half the layers: the table of the recipe `distil`.

    python scripts/distil.py                    # three seeds, on the encoder of a whole demo
    python scripts/distil.py --share 0.3 --seeds 0
    python scripts/distil.py --tasks DATA/sts/stsb_en_dev.tsv --output docs/results.md

The teacher is the encoder that `unmasked demo` makes. The student is its first three of six layers:
as they are, trained on the demo's pairs alone, on the teacher's vectors alone, on both, and on the
pairs and how the teacher shares out a query among a batch (the recipe as it is shipped). All train
for the same number of steps on the same rows. Everything is kept in ``--work``, trained and scored,
and the same command continues; more seeds or tasks add to it. Cost: the demo, and 9 to 14 minutes
of processor time for each student.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
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


def students(
    teacher: Path, work: Path, seed: int, share: float, names: Sequence[str] = tuple(STUDENTS)
) -> Iterator[tuple[str, Path]]:
    """Name and folder of the encoder of each student, as soon as it is trained."""
    data, steps = teacher.parent / "data" / "pairs.jsonl", max(10, round(300 * share))
    own = [f"model.base={teacher}", "evaluate.tasks=[]", f"seed={seed}", f"supervised.data={data}"]
    own += [f"supervised.steps={steps}", f"supervised.warmup_steps={steps // 10}"]
    for name in names:
        settings = (f"teacher.model={teacher}", *STUDENTS[name])
        changed = [f"supervised.{setting}" for setting in settings]
        folder = work / f"seed-{seed}" / name.replace(" ", "-")
        print(f"{name}, seed {seed}", flush=True)
        Run(load_recipe("distil", [*own, *changed]), folder).run()
        yield name, folder / "model"


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
    parser.add_argument("--only", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--share", type=float, default=1.0, help="Share of all numbers of steps.")
    parser.add_argument("--tasks", nargs="*", default=[], help="Task files beside the demo's.")
    parser.add_argument("--output", type=Path, help="Page that the table is put into.")
    asked = parser.parse_args()
    teacher = make_teacher(asked.work / "teacher", asked.share)
    tasks = [teacher.parent / "data" / demo.TASK, *asked.tasks]
    scores = KeptScores(asked.work / "scores.json", tasks)
    whole = scores.of("teacher", partial(LLM2Vec.from_pretrained, teacher))
    half = scores.of("its first half", partial(LLM2Vec.from_pretrained, teacher, layers=3))
    rows = {"teacher, all layers": [whole], "its first half, as it is": [half]}
    for seed in asked.seeds:
        for name, folder in students(teacher, asked.work, seed, asked.share, asked.only):
            found = scores.of(f"{name}, seed {seed}", partial(LLM2Vec.from_pretrained, folder))
            rows.setdefault(name, []).append(found)
    best = mean(whole.values())
    lines = [f"| encoder | {' | '.join(whole)} | average | of the teacher |"]
    lines.append("|---" * (len(whole) + 3) + "|")
    for name, seeds in rows.items():
        averages = [mean(found.values()) for found in seeds]
        cells = [cell([found[task] for found in seeds]) for task in whole]
        share = f"{100 * mean(averages) / best:.1f} %"
        lines.append(f"| {name} | {' | '.join(cells)} | {cell(averages)} | {share} |")
    show(asked.output, "distil", lines)


if __name__ == "__main__":
    main()
