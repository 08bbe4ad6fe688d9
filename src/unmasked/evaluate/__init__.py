"""Measures an encoder: tasks from local files, and how sure a difference between two scores is.

Everything here takes a callable from texts to vectors, so it measures any encoder, and needs
numpy alone: importing it costs no torch.
"""

from __future__ import annotations

from unmasked.evaluate.bootstrap import Interval, TaskResult, interval, paired_difference
from unmasked.evaluate.tasks.files import load_task
from unmasked.evaluate.tasks.kinds import Task, evaluate
from unmasked.evaluate.tasks.vectors import Encode, encode_once, search

__all__ = [
    "Encode",
    "Interval",
    "Task",
    "TaskResult",
    "encode_once",
    "evaluate",
    "interval",
    "load_task",
    "paired_difference",
    "search",
]
