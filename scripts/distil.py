"""What a teacher gives a student of half the layers: the table of the recipe `distil`.

    python scripts/distil.py                    # three seeds, on the encoder of a whole demo
    python scripts/distil.py --share 0.3 --seeds 0

The teacher is the encoder that `unmasked demo` makes. The student is its first three of six layers:
as they are, trained on the demo's pairs alone, on the teacher alone (the recipe as it is shipped),
and on both. All train for the same number of steps on the same rows. Everything is kept in
``--work``, and the same command continues. Cost: the demo, and some two minutes of processor time
for each student.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from unmasked import demo
from unmasked.evaluate.compare import headlines
from unmasked.evaluate.scorer import make_scorer
from unmasked.recipe.files import load_recipe
from unmasked.train.callback import Listener
from unmasked.train.run import Run

STUDENTS = {
    "pairs alone": ("teacher=null",),
    "teacher alone": (),
    "teacher and pairs": ("teacher.contrastive=1.0", "teacher.weight=4.0"),
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


def students(teacher: Path, work: Path, seed: int, share: float) -> dict[str, Path]:
    """The folder of the encoder of each student."""
    data, steps = teacher.parent / "data" / "pairs.jsonl", max(10, round(300 * share))
    own = [f"model.base={teacher}", "evaluate.tasks=[]", f"seed={seed}", f"supervised.data={data}"]
    own += [f"supervised.steps={steps}", f"supervised.warmup_steps={steps // 10}"]
    found = {}
    for name, settings in STUDENTS.items():
        changed = [f"supervised.{setting}" for setting in (f"teacher.model={teacher}", *settings)]
        folder = work / f"seed-{seed}" / name.replace(" ", "-")
        print(f"{name}, seed {seed}", flush=True)
        Run(load_recipe("distil", [*own, *changed]), folder).run()
        found[name] = folder / "model"
    return found


def main() -> None:
    """Train what is not trained yet, and print the table."""
    from unmasked import LLM2Vec

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/distil-table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=1.0, help="Share of all numbers of steps.")
    parser.add_argument("--tasks", nargs="*", default=[], help="Task files beside the demo's.")
    asked = parser.parse_args()
    teacher = make_teacher(asked.work / "teacher", asked.share)
    score = make_scorer([teacher.parent / "data" / demo.TASK, *asked.tasks])
    every = [students(teacher, asked.work, seed, asked.share) for seed in asked.seeds]

    def measured(encoder: LLM2Vec) -> dict[str, float]:
        results = score(encoder)
        scores = {f"{r.name}.{key}": value for r in results for key, value in r.scores.items()}
        return {name: scores[name] for name in headlines(scores)}

    rows = {"teacher, all layers": [measured(LLM2Vec.from_pretrained(teacher))]}
    rows["its first half, as it is"] = [measured(LLM2Vec.from_pretrained(teacher, layers=3))]
    for name in STUDENTS:
        rows[name] = [measured(LLM2Vec.from_pretrained(found[name])) for found in every]
    columns = list(rows["teacher, all layers"][0])
    best = mean(rows["teacher, all layers"][0].values())
    print(f"\n| encoder | {' | '.join(columns)} | average | of the teacher |")
    print(f"|---|{'---|' * (len(columns) + 2)}")
    for name, seeds in rows.items():
        scores = [mean(found[column] for found in seeds) for column in columns]
        cells = " | ".join(f"{100 * score:.2f}" for score in (*scores, mean(scores)))
        print(f"| {name} | {cells} | {100 * mean(scores) / best:.1f} % |")


if __name__ == "__main__":
    main()
