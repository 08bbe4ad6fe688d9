"""Published figures of a recipe: what others measured, for a run to put its own scores beside.

A figure belongs to a base, to what was trained, and to the tasks it is a mean of. So it names all
three, and where it was published. Cost: nothing worth a number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from unmasked.recipe.values import number, one_or_more

BENCHMARKS = "benchmarks"
"""The folder of a run that holds the scores of published benchmarks, a folder each."""
TRAINED = "+"
"""Between the stages that a figure was published for: ``mntp+simcse``."""
_UNTRAINED = ("causal_mean", "causal_weighted_mean", "causal_last_token", "bidirectional")


def _known(scores: dict[str, float]) -> dict[str, float]:
    for name in scores:
        stages = name.split(TRAINED)
        in_order = ["mntp", "simcse", "supervised"]
        ordered = [stage for stage in in_order if stage in stages] == stages
        if name not in _UNTRAINED and not ordered:
            raise ValueError(
                f"'{name}' should be one of {', '.join(_UNTRAINED)}, or the stages that were "
                f"trained, in their order: mntp, {TRAINED.join(in_order[:2])}, ..."
            )
    return scores


Name = Annotated[str, Field(min_length=1)]
Score = Annotated[float, Field(ge=0, le=100), BeforeValidator(number)]


class Anchor(BaseModel):
    """What was published for a base on one benchmark, stage by stage."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    benchmark: Name
    """Name of the benchmark in tables; folders are called after it."""
    base: Name
    """Base that was scored. With another ``model.base`` the figures are left out."""
    tasks: Annotated[list[Name], Field(min_length=1), BeforeValidator(one_or_more)]
    """Tasks, as in ``evaluate.tasks``, whose main scores the figure is the mean of."""
    scores: Annotated[dict[str, Score], Field(min_length=1), AfterValidator(_known)]
    """What was trained and the mean score times 100: ``bidirectional``, ``mntp``, ``mntp+simcse``;
    ``causal_weighted_mean`` and the like for the decoder as it was."""
    source: Name
    """Where the figures were published."""

    @property
    def folder(self) -> str:
        """Where a run keeps its own scores on this benchmark, inside its folder."""
        return f"{BENCHMARKS}/{re.sub(r'[^a-z0-9]+', '-', self.benchmark.lower()).strip('-')}"

    def of_stages(self, stages: Sequence[str]) -> dict[str, float]:
        """The figures that a run of these stages can be held to, by the names of its encoders.

        Args:
            stages: names of the stages that a recipe runs, in their order.

        Returns:
            Encoder → published score times 100, in the order in which a run makes the encoders.
        """
        names = {name: name for name in _UNTRAINED}
        for end, stage in enumerate(stages, start=1):
            names[stage] = TRAINED.join(stages[:end])
        return {ours: self.scores[name] for ours, name in names.items() if name in self.scores}
