"""How good is an encoder, and is a difference between two scores more than chance?

An encoder is any function from texts and their role to vectors (`Encode`). A task is read from
plain files (`load_task`) and scores an encoder (`Task.score`). The answer is a `TaskResult`: the
score of each metric, and the scores of the test items, from which `interval` and
`paired_difference` compute 95 % intervals. `scorer` scores models on every task that a user can
name, public ones included; `compare` compares the stages of a run, or several encoders;
`baselines` makes the causal encoders to compare with; `analysis` looks inside a model, and `report`
writes a page about a run.

Cost: encoding each distinct text of a task once, then seconds. Importing this package needs numpy
alone; `baselines` and `analysis` import torch, public tasks mteb, figures matplotlib.

Others may use the names below, `scorer.make_scorer`, the functions of `compare`,
`baselines.causal_baselines`, `analysis.analyse` and `report.page.write_report`.
"""

from __future__ import annotations

from unmasked.evaluate.bootstrap import Interval, TaskResult, interval, paired_difference
from unmasked.evaluate.tasks.kinds import Task
from unmasked.evaluate.tasks.task_files import load_task
from unmasked.evaluate.tasks.task_vectors import Encode, encode_once

__all__ = [
    "Encode",
    "Interval",
    "Task",
    "TaskResult",
    "encode_once",
    "interval",
    "load_task",
    "paired_difference",
]
