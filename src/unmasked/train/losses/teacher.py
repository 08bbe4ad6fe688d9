"""Distillation: learning a better model's vectors, or its scores of queries and documents.

Five losses on the vectors that the contrastive loss has computed anyway, so that a teacher costs no
forward of the student. Where possible they are sentence-transformers' losses: on vectors (MSE,
cosine), on scores of the rows (margin-MSE, Hofstätter et al., arXiv 2010.02666; KL, Lin et al.,
arXiv 2010.11386), and on the order of pairs (CoSENT). A teacher with a vector of every text gives
more: scores between a query and every document of the whole batch, on all devices. For those, KL
and margin-MSE are written out here, with the same formulas.

Shapes: B rows of this device, K hard negatives, R = (2 + K) B texts, C documents of all devices, D
and W numbers of the student's and the teacher's vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CoSENTLoss,
    DistillKLDivLoss,
    EmbedDistillLoss,
    MarginMSELoss,
)
from sentence_transformers.util import pairwise_cos_sim
from torch import Tensor, nn
from torch.nn.functional import kl_div, mse_loss, normalize

from unmasked.recipe.teaching import Teacher

Gather = Callable[[Tensor], Tensor]
"""From the documents of this device to those of all devices; gradients flow back."""


class TeacherLoss(nn.Module):
    """The distillation loss of a batch, the mean over the rows of this device.

    Args:
        model: the student.
        settings: which loss, and how scores are read.
    """

    def __init__(self, model: SentenceTransformer, settings: Teacher) -> None:
        super().__init__()
        self.settings = settings
        heat = settings.temperature
        made: dict[str, Callable[[], Any]] = {
            "cosine": lambda: EmbedDistillLoss(model, distance_metric="cosine"),
            "mse": lambda: EmbedDistillLoss(model, distance_metric="mse"),
            "kl": lambda: DistillKLDivLoss(model, pairwise_cos_sim, temperature=heat),
            "margin_mse": lambda: MarginMSELoss(model, pairwise_cos_sim),
            "cosent": lambda: CoSENTLoss(model),
        }
        stock = made[settings.loss]()
        stock.model = None  # it is only given vectors, so the student need not be a submodule
        self.stock = stock

    def forward(
        self, vectors: Tensor, taught: Tensor, rows: int, own: Tensor, gather: Gather
    ) -> Tensor:
        """Scalar loss.

        Args:
            vectors: (R, D) student's vectors of queries, positives and each rank of negatives.
            taught: (R, W) teacher's vectors in the same order, or its (B, 1 + K) scores.
            rows: B.
            own: (B,) position of each query's positive among the C documents.
            gather: maps (R - B, ...) to (C, ...).
        """
        kind = self.settings.loss
        if kind in ("cosine", "mse"):
            # A narrower teacher is compared with the leading numbers of the student's vectors.
            width = min(vectors.shape[1], taught.shape[1])
            return self.stock.compute_loss_from_embeddings([vectors[:, :width]], [taught])  # type: ignore[no-any-return]
        if self.settings.model is not None and kind != "cosent":
            return self._whole_batch(vectors, taught, rows, own, gather)
        queries, *documents = vectors.split(rows)
        if self.settings.model is not None:  # CoSENT: vectors become (B, 1 + K) scores
            asked, *answers = taught.split(rows)
            taught = torch.stack([pairwise_cos_sim(asked, a) for a in answers], dim=1)
        scores = taught / self.settings.scale
        if kind == "cosent":
            pairs = [queries.repeat(len(documents), 1), torch.cat(documents)]  # ((1 + K) B, D) each
            return self.stock.compute_loss_from_embeddings(pairs, scores.T.flatten())  # type: ignore[no-any-return]
        loss: Tensor = self.stock.compute_loss_from_embeddings([queries, *documents], scores)
        # The stock KL loss is multiplied by the squared temperature. That is undone, so that the
        # temperature does not change the loss's weight.
        return loss / self.settings.temperature**2 if kind == "kl" else loss

    def _whole_batch(
        self, vectors: Tensor, taught: Tensor, rows: int, own: Tensor, gather: Gather
    ) -> Tensor:
        """KL or margin-MSE on a query's cosines to the documents of all rows and devices."""
        student, teacher = (
            normalize(side[:rows], dim=1) @ gather(normalize(side[rows:], dim=1)).T
            for side in (vectors, taught)
        )  # (B, C) each
        if self.settings.loss == "kl":
            heat = self.settings.temperature
            shares = (teacher / heat).softmax(dim=1)
            return kl_div((student / heat).log_softmax(dim=1), shares, reduction="batchmean")
        ours, theirs = (side.gather(1, own[:, None]) - side for side in (student, teacher))
        return mse_loss(ours, theirs)
