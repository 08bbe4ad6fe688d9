"""What the supervised stage learns from a better model: the settings below ``supervised.teacher``.

Cost: nothing worth a number.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, model_validator

from unmasked.recipe.values import STRICT, NotNegative, Positive

SCORES = ("margin_mse", "kl", "cosent")
"""Losses that learn scores of a query and its documents; the others learn vectors."""


class Teacher(BaseModel):
    """A better model to learn from, beside the pairs or in their place."""

    model_config = STRICT

    model: str | None = None
    """Encoder whose vectors, or their cosines, are learned: hub name or folder. They are computed
    once, before training, and kept in the run folder while the stage trains. None reads what the
    rows say: ``scores`` (of each positive, then of each negative), ``score`` (of a pair, or the
    margin of a triplet), or ``vectors`` (of the query, each positive, each negative)."""
    loss: Literal["cosine", "mse", "kl", "margin_mse", "cosent"] = "cosine"
    """``cosine`` and ``mse`` learn vectors. ``kl`` learns how the teacher shares out a query among
    its documents (with ``model``: among those of the whole batch), ``margin_mse`` by how much it
    prefers the positive to each negative (arXiv 2010.02666), ``cosent`` the order of all scores of
    a batch."""
    weight: NotNegative = 1.0
    """What the teacher's loss is multiplied by."""
    contrastive: NotNegative = 1.0
    """What the contrastive loss is multiplied by; 0 learns from the teacher alone."""
    temperature: Positive = 0.05
    """For ``kl``, both sides' scores are divided by this number before the softmax; scores of a
    cross-encoder, which are no cosines, want ``scale`` beside it."""
    scale: Positive = 1.0
    """Scores of the rows are divided by this number, to be of the size of cosines."""
    projection: Literal["none", "pca"] = "none"
    """For a teacher whose vectors have another width. ``pca`` keeps the directions in which they
    are largest, as many as the student has numbers; a narrower teacher is learned by as many
    leading numbers of the student."""

    @model_validator(mode="after")
    def _weighed(self) -> Teacher:
        if not (self.weight or self.contrastive):
            raise ValueError("weight and contrastive are both 0, so nothing is learned")
        if self.loss == "cosent" and self.contrastive:
            raise ValueError(
                "cosent learns from pairs that match more or less, and the contrastive loss takes "
                "every pair as a match. Fix: contrastive: 0"
            )
        return self

    @property
    def wants(self) -> Literal["scores", "vectors"] | None:
        """What the rows must have; None where a model says it."""
        if self.model is not None:
            return None
        return "scores" if self.loss in SCORES else "vectors"


def named_teacher(value: object) -> object:
    """The name of an encoder stands for a teacher whose other settings have their defaults."""
    return {"model": value} if isinstance(value, str) else value
