"""The settings below ``supervised.teacher``: how the supervised stage learns from a better model.

Cost: negligible.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, model_validator

from unmasked.recipe.values import STRICT, NotNegative, Positive

SCORES = ("margin_mse", "kl", "cosent")
"""Losses that learn the scores of a query and its documents; the others learn vectors."""


class Teacher(BaseModel):
    """A better model to learn from, in addition to the pairs or instead of them."""

    model_config = STRICT

    model: str | None = None
    """Encoder whose vectors, or their cosines, are learned: hub name or folder. They are computed
    once, before training, and kept in the run folder while the stage trains. None reads them from
    the rows: ``scores`` (of each positive, then of each negative), ``score`` (of a pair, or the
    margin of a triplet), or ``vectors`` (of the query, each positive, each negative)."""
    loss: Literal["cosine", "mse", "kl", "margin_mse", "cosent"] = "cosine"
    """``cosine`` and ``mse`` learn vectors. ``kl`` learns the teacher's distribution over the
    documents of a query (with ``model``: of the whole batch), ``margin_mse`` by how much it prefers
    the positive to each negative (arXiv 2010.02666), ``cosent`` the order of all scores of a
    batch."""
    weight: NotNegative = 1.0
    """Factor of the teacher's loss."""
    contrastive: NotNegative = 1.0
    """Factor of the contrastive loss; 0 learns from the teacher alone."""
    temperature: Positive = 0.05
    """For ``kl``, the scores of teacher and student are divided by this number before the softmax.
    The scores of a cross-encoder are not cosines and need ``scale`` too."""
    scale: Positive = 1.0
    """The scores of the rows are divided by this number, to make them as large as cosines."""
    projection: Literal["none", "pca"] = "none"
    """For a teacher with another vector dimension. ``pca`` projects its vectors to the dimension of
    the student; a teacher with fewer dimensions is learned by as many leading dimensions of the
    student."""

    @model_validator(mode="after")
    def _some_loss(self) -> Teacher:
        if not (self.weight or self.contrastive):
            raise ValueError("weight and contrastive are both 0, so nothing is learned")
        if self.loss == "cosent" and self.contrastive:
            raise ValueError(
                "cosent learns from pairs that match to a degree, and the contrastive loss takes "
                "every pair as a match. Fix: contrastive: 0"
            )
        unread = {"temperature": self.loss != "kl", "projection": self.loss in SCORES}
        unread["scale"] = self.model is not None or self.loss not in ("kl", "margin_mse")
        for name, is_unread in unread.items():
            given, default = getattr(self, name), type(self).model_fields[name].default
            if is_unread and given != default:
                said = f"{name} {given} has no effect on the loss {self.loss}"
                of = " of a model" if self.model else ""
                raise ValueError(f"{said}{of}. Fix: {name}: {default}")
        return self

    @property
    def wants(self) -> Literal["scores", "vectors"] | None:
        """What the rows must contain; None if a model computes it."""
        if self.model is not None:
            return None
        return "scores" if self.loss in SCORES else "vectors"


def named_teacher(value: object) -> object:
    """Turn the name of an encoder into the settings of a teacher, with defaults for the others."""
    return {"model": value} if isinstance(value, str) else value
