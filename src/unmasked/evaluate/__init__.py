"""How good is an encoder, and is a difference between two scores more than chance?

An encoder is whatever turns texts and their role into vectors (`Encode`); a task is read from plain
files (`load_task`) and scores it (`Task.score`); the answer is a `TaskResult`, the score of each
metric with what each test item scored, from which `interval` and `paired_difference` draw 95 %
intervals. `scorer` scores models on everything that a user can name, public tasks included;
`compare` puts the stages of a run or several encoders side by side; `baselines` makes the causal
encoders to beat; `analysis` looks inside a model, and `report` draws what a run did.

Cost: encoding each distinct text of a task once, then seconds. Importing this page needs numpy
alone; `baselines` and `analysis` import torch, public tasks mteb, figures matplotlib.

For others: the names below, `scorer.make_scorer`, the functions of `compare`,
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
