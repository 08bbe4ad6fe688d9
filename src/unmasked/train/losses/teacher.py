"""Distillation: learning a better model's vectors, or its scores of queries and documents.

Five losses on the vectors that the contrastive loss has computed anyway, so that a teacher costs no
forward of the student. On vectors (MSE, cosine) and on the order of pairs (CoSENT) they are
sentence-transformers' losses. On scores, margin-MSE (Hofstätter et al., arXiv 2010.02666) and KL
(Lin et al., arXiv 2010.11386) are written out here with its formulas, because rows may have
different numbers of documents. A teacher with a vector of every text gives more: scores between a
query and every document of the whole batch, on all devices.

Shapes: B rows of this device, K hard negatives, R = (2 + K) B texts, C documents of all devices, D
and W numbers of the student's and the teacher's vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, EmbedDistillLoss
from sentence_transformers.util import check_teacher_targets, pairwise_cos_sim
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
        self.checked = False  # whether the teacher's scores suit the temperature
        stock: Any = CoSENTLoss(model)
        if settings.loss in ("cosine", "mse"):
            stock = EmbedDistillLoss(model, distance_metric=settings.loss)
        stock.model = None  # it is only given vectors, so the student need not be a submodule
        self.stock = stock

    def forward(
        self, vectors: Tensor, taught: Tensor, own: Tensor, gather: Gather, repeated: Tensor
    ) -> Tensor:
        """Scalar loss.

        Args:
            vectors: (R, D) student's vectors of queries, positives and each rank of negatives.
            taught: (R, W) teacher's vectors in the same order, or its (B, 1 + K) scores.
            own: (B,) position of each query's positive among the C documents.
            gather: maps (R - B, ...) to (C, ...).
            repeated: (devices, 1 + K, B) which of the C documents only fill the place of a missing
                negative; they count in no loss.
        """
        kind, rows, of_model = self.settings.loss, len(own), self.settings.model is not None
        rank = int(own[0]) // repeated[0].numel()
        kept = ~repeated[rank].flatten()[: len(vectors) - rows]  # documents of this device
        if kind in ("cosine", "mse"):
            # A narrower teacher is compared with the leading numbers of the student's vectors.
            width, texts = taught.shape[1], torch.cat([kept.new_ones(rows), kept])
            loss: Tensor = self.stock.compute_loss_from_embeddings(
                [vectors[texts, :width]], [taught[texts]]
            )
            return loss * (texts.sum() / _mean_count(repeated, rows))
        if of_model and kind != "cosent":
            student, teacher = (
                normalize(side[:rows], dim=1) @ gather(normalize(side[rows:], dim=1)).T
                for side in (vectors, taught)
            )  # (B, C) each
            counted = ~repeated.flatten().expand(rows, -1)
        else:
            student, counted = _of_rows(vectors, rows), kept.view(-1, rows).T  # (B, 1 + K) each
            teacher = _of_rows(taught, rows) if of_model else taught / self.settings.scale
            own = torch.zeros_like(own)
        if kind == "cosent":
            pairs = [vectors[:rows].repeat(student.shape[1], 1)[kept], vectors[rows:][kept]]
            return self.stock.compute_loss_from_embeddings(pairs, teacher.T.flatten()[kept])  # type: ignore[no-any-return]
        if kind == "kl":
            return self._divergence(student, teacher, ~counted)
        ours, theirs = (side.gather(1, own[:, None]) - side for side in (student, teacher))
        if of_model:
            return mse_loss(ours[counted], theirs[counted])
        counted = counted[:, 1:]  # the negatives, of which a row may have none
        return (ours - theirs)[:, 1:][counted].square().sum() / _mean_count(repeated[:, 1:])

    def _divergence(self, student: Tensor, teacher: Tensor, left_out: Tensor) -> Tensor:
        """Kullback and Leibler's divergence of (B, N) scores, without the documents left out."""
        heat = self.settings.temperature
        shares = (teacher / heat).masked_fill(left_out, -torch.inf).softmax(dim=1)
        if not self.checked:
            self.checked = True
            check_teacher_targets(shares[~left_out], teacher, heat, "supervised.teacher.loss=kl")
        lowest = torch.finfo(student.dtype).min  # not infinite: a share of 0 times it must be 0
        logarithms = (student / heat).masked_fill(left_out, lowest).log_softmax(dim=1)
        return kl_div(logarithms, shares, reduction="batchmean")


def _of_rows(vectors: Tensor, rows: int) -> Tensor:
    """(B, 1 + K) cosines of each query to the documents of its row."""
    queries, *documents = vectors.split(rows)
    return torch.stack([pairwise_cos_sim(queries, each) for each in documents], dim=1)


def _mean_count(repeated: Tensor, others: int = 0) -> Tensor:
    """Mean number of texts of a device that count: documents not `repeated`, and `others`."""
    return ((~repeated).sum() / len(repeated) + others).clamp(min=1)
