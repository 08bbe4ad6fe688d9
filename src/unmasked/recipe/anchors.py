"""Published figures of a recipe, with which a run compares its own scores.

A figure belongs to a base, to the stages that were trained, and to the tasks it is a mean of. So it
names all three, and where it was published. Cost: negligible.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from unmasked.recipe.values import STRICT, number, one_or_more

BENCHMARKS = "benchmarks"
"""The folder of a run for the scores on published benchmarks, one subfolder for each."""
TRAINED = "+"  # joins the stages for which a figure was published: ``mntp+simcse``
_UNTRAINED = ("causal_mean", "causal_weighted_mean", "causal_last_token", "bidirectional")


def _check_names(scores: dict[str, float]) -> dict[str, float]:
    for name in scores:
        stages = name.split(TRAINED)
        all_stages = ["mntp", "simcse", "supervised"]
        in_order = [stage for stage in all_stages if stage in stages] == stages
        if name not in _UNTRAINED and not in_order:
            raise ValueError(
                f"'{name}' should be one of {', '.join(_UNTRAINED)}, or the stages that were "
                f"trained, in their order: mntp, {TRAINED.join(all_stages[:2])}, ..."
            )
    return scores


Name = Annotated[str, Field(min_length=1)]
Score = Annotated[float, Field(ge=0, le=100), BeforeValidator(number)]


class Anchor(BaseModel):
    """The published figures of a base on one benchmark, stage by stage."""

    model_config = STRICT

    benchmark: Name
    """Name of the benchmark in tables and folder names."""
    base: Name
    """Base that was scored. With another ``model.base`` the figures are left out."""
    tasks: Annotated[list[Name], Field(min_length=1), BeforeValidator(one_or_more)]
    """Tasks, as in ``evaluate.tasks``; a figure is the mean of their main scores."""
    scores: Annotated[dict[str, Score], Field(min_length=1), AfterValidator(_check_names)]
    """Mean score times 100 for each encoder: ``bidirectional``, ``mntp``, ``mntp+simcse``, or
    ``causal_weighted_mean`` and the like for the unchanged decoder."""
    source: Name
    """Where the figures were published."""

    @property
    def folder(self) -> str:
        """The subfolder of a run folder for its own scores on this benchmark."""
        return f"{BENCHMARKS}/{re.sub(r'[^a-z0-9]+', '-', self.benchmark.lower()).strip('-')}"

    def of_stages(self, stages: Sequence[str]) -> dict[str, float]:
        """The figures to compare a run of these stages with, by the names of its encoders.

        Args:
            stages: names of the stages that a recipe runs, in their order.

        Returns:
            Encoder → published score times 100, in the order in which a run makes the encoders.
        """
        published = {name: name for name in _UNTRAINED}  # our name → the published one
        for end, stage in enumerate(stages, start=1):
            published[stage] = TRAINED.join(stages[:end])
        return {ours: self.scores[name] for ours, name in published.items() if name in self.scores}
