"""Learning from a better model: its vectors, or the scores it gives to queries and documents.

Five losses on the vectors that the contrastive loss has computed anyway, so that a teacher costs no
forward of the student. Where they fit they are those of sentence-transformers: vectors (MSE,
cosine), scores of the rows (margin-MSE, Hofstätter et al., arXiv 2010.02666; KL, Lin et al., arXiv
2010.11386), and the order of pairs (CoSENT). A teacher that has a vector of every text says more:
how near a query is to each document of the whole batch, on all devices. For that there are a few
lines of our own, with the same two formulas.

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
"""The documents of all devices, from those of this one; with the gradient."""


class TeacherLoss(nn.Module):
    """The loss of what a teacher says of a batch, the mean over the rows of this device.

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
        stock.model = None  # it is given vectors; the student is not a part of it
        self.stock = stock

    def forward(
        self, vectors: Tensor, taught: Tensor, rows: int, own: Tensor, gather: Gather
    ) -> Tensor:
        """Scalar loss.

        Args:
            vectors: (R, D) of queries, positives and each rank of negatives.
            taught: (R, W) vectors in the same order, or (B, 1 + K) scores.
            rows: B.
            own: (B,) place of each query's positive among the C documents.
            gather: gives (C, ...) of (R - B, ...).
        """
        kind = self.settings.loss
        if kind in ("cosine", "mse"):
            width = min(vectors.shape[1], taught.shape[1])  # of a narrower teacher
            return self.stock.compute_loss_from_embeddings([vectors[:, :width]], [taught])  # type: ignore[no-any-return]
        if self.settings.model is not None and kind != "cosent":
            return self._whole_batch(vectors, taught, rows, own, gather)
        queries, *documents = vectors.split(rows)
        if self.settings.model is not None:
            asked, *answers = taught.split(rows)
            taught = torch.stack([pairwise_cos_sim(asked, a) for a in answers], dim=1)
        scores = taught / self.settings.scale
        if kind == "cosent":
            every = [queries.repeat(len(documents), 1), torch.cat(documents)]
            return self.stock.compute_loss_from_embeddings(every, scores.T.flatten())  # type: ignore[no-any-return]
        loss: Tensor = self.stock.compute_loss_from_embeddings([queries, *documents], scores)
        # That loss is multiplied by the square of the temperature, which the weight should not be.
        return loss / self.settings.temperature**2 if kind == "kl" else loss

    def _whole_batch(
        self, vectors: Tensor, taught: Tensor, rows: int, own: Tensor, gather: Gather
    ) -> Tensor:
        """KL or margin-MSE of a query's cosines to the documents of all rows and devices."""
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
