"""Metrics to Weights & Biases or trackio, by name in the recipe; the callbacks are transformers'.

``metrics.jsonl`` and TensorBoard need no name. The project is ``unmasked`` (or ``WANDB_PROJECT``),
each stage is a run of its own, RUN-STAGE.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from unmasked.errors import MissingExtraError
from unmasked.train import devices


def require_trackers(names: Sequence[str]) -> None:
    """Refuse what is not installed, before anything is done.

    Raises:
        MissingExtraError: names the package.
    """
    for name in names:
        if find_spec(name) is None:
            raise MissingExtraError(name, name)


def tracker_callbacks(names: Sequence[str]) -> list[Any]:
    """Callbacks of a `Trainer`."""
    os.environ.setdefault("WANDB_PROJECT", "unmasked")
    return [made() for made in get_reporting_integration_callbacks(list(names))]


def finish_trackers(names: Sequence[str]) -> None:
    """End the run of a stage, so that the next one begins its own."""
    if "wandb" in names and devices.is_first():
        import_module("wandb").finish()
