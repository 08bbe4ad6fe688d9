"""Supervised contrastive training: a query finds its document among those of the whole batch.

InfoNCE with hard negatives (LLM2Vec, arXiv 2404.05961, section 3.2). A document that equals the
query, or answers it anywhere in the batch, does not count as a negative. All texts of a batch are
one packed forward, where sentence-transformers runs one per column. With GradCache (Gao et al.,
arXiv 2101.06983) the batch need not fit into memory: texts are embedded twice, in forwards of a
limited number of tokens, which costs half as much computation again for the same gradient.

Shapes: B rows of this device, R = (2 + K) B texts with K hard negatives, W devices, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.util import all_gather, get_rank, get_world_size
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy, normalize

from unmasked.forward.geometry import alignment_and_uniformity
from unmasked.train import devices
from unmasked.train.losses.teacher import TeacherLoss


class BatchLayout(NamedTuple):
    """What the loss knows about the R texts of a batch besides their vectors.

    Attributes:
        rows: B.
        place: (R,) the position of each vector in the order "queries, positives, negatives".
        key: (R,) numbers in that order, which are equal for equal texts (see `PairCollator`).
        taught: a teacher's vectors, (R, W') in that order, or its scores, (B, 1 + K).
    """

    rows: int
    place: Tensor
    key: Tensor
    taught: Tensor | None = None


class RankingLoss(CachedLossMixin, nn.Module):
    """Cross-entropy of each query's own positive among the documents of all rows and devices.

    The loss is the mean over the rows of this device. Gradients of gathered documents are summed
    over the devices and then averaged by DDP with all others, so that a step on W devices equals a
    step on one device with the whole batch.

    Args:
        model: the encoder.
        temperature: of the cosines (0.02 in the paper).
        mini_batch_tokens: maximum number of tokens per forward; None runs each batch at once.
        margin: documents whose cosine to the query exceeds the positive's by more than this are not
            negatives; None leaves out only equal texts.
        dimensions: shorter vector lengths that are trained as well (Matryoshka, arXiv 2205.13147).
        depths: how many vectors the model gives for a text, side by side: more than one within
            `depth.depths`.
        teacher: the distillation loss, if there is a teacher; only the full vector learns from it.

    Attributes:
        measured: alignment and uniformity of the last forward; with a teacher, also both losses.
    """

    views = 1
    mini_batch_size = 1 << 62  # no limit in rows: forwards are limited by their tokens

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float = 0.02,
        mini_batch_tokens: int | None = None,
        margin: float | None = None,
        dimensions: Sequence[int] = (),
        depths: int = 1,
        teacher: TeacherLoss | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.mini_batch_num_tokens = mini_batch_tokens
        self.margin = margin
        self.dimensions = dimensions
        self.depths = depths
        self.teacher = teacher
        self.measured: dict[str, Tensor] = {}

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Scalar loss of the features that `PairCollator` makes."""
        features: dict[str, Any] = dict(next(iter(sentence_features)))
        features["repad"] = False
        given = (features.pop("place"), features.pop("key"), features.pop("taught", None))
        layout = BatchLayout(len(labels), *given)
        limit, attention = self.mini_batch_num_tokens, features["attention_mask"]
        # All devices must decide alike, so the one with the most tokens counts.
        if limit is None or devices.most(int(attention.sum()), attention.device) <= limit:
            return self.score(self.model(features)["sentence_embedding"], layout)
        return self.forward_cached([features], layout)  # type: ignore[arg-type]

    def embed_minibatch_iter(self, sentence_feature: Any, *given: Any, **named: Any) -> Any:
        """Run as many forwards as the device that has the most: FSDP gathers weights in each.

        The extra forwards come first, on the shortest text, which is the last of the batch. Their
        vectors and gradients are dropped, and the random state is put back.
        """
        if isinstance(self.model, FSDPModule):
            count, with_grad = len(named["ranges"]), named["with_grad"]
            mask = sentence_feature["attention_mask"]
            last = (len(mask) - 1, len(mask), with_grad, False)  # arguments of `embed_minibatch`
            on_gpu = [mask.device] if mask.device.type == "cuda" else []
            for _ in range(devices.most(count, mask.device) - count):
                with torch.random.fork_rng(on_gpu):
                    vectors, _ = self.embed_minibatch(sentence_feature, *last)
                if with_grad:
                    (0 * vectors).sum().backward()  # the backward pass gathers weights, too
        yield from super().embed_minibatch_iter(sentence_feature, *given, **named)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of the vectors of all mini-batches, which `CachedLossMixin` calls."""
        (parts,) = reps
        loss = self.score(torch.cat(parts), labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def score(self, vectors: Tensor, layout: BatchLayout) -> Tensor:
        """Scalar loss of (R, D) vectors, the mean over all trained lengths and depths."""
        # The batch has the longest text first; from here on queries, positives, negatives.
        vectors = torch.empty_like(vectors).index_copy(0, layout.place, vectors).float()
        by_depth, rows = vectors.chunk(self.depths, dim=1), layout.rows
        whole = by_depth[0]
        self.measured = alignment_and_uniformity(whole[:rows], whole[rows : 2 * rows])
        query_keys, keys = layout.key.split([rows, len(vectors) - rows])  # (B,), ((1 + K) B,)
        # Another device's rows may have more negatives. To gather equal shapes, the positives of
        # this device are repeated in their place; `_no_negatives` leaves repetitions out.
        repeats = (devices.most(len(keys), keys.device) - len(keys)) // rows
        keys = torch.cat([keys, *[keys[:rows]] * repeats])
        # (B,) the column of each query's positive among the documents of all devices
        own = get_rank() * len(keys) + torch.arange(rows, device=vectors.device)

        def gather(documents: Tensor) -> Tensor:  # ((1 + K) B, D) -> (W (1 + K) B, D)
            return _gathered(torch.cat([documents, *[documents[:rows]] * repeats]), with_grad=True)

        loss = vectors.new_zeros(())
        if self.teacher is None or self.teacher.settings.contrastive:
            no_negatives = _no_negatives(query_keys, keys, own)
            losses = []
            for encoded in by_depth:
                queries, documents = encoded[:rows], gather(encoded[rows:])
                widths = {*self.dimensions, encoded.shape[1]}
                losses += [
                    self._infonce(queries[:, :w], documents[:, :w], own, no_negatives)
                    for w in widths
                ]
            loss = torch.stack(losses).mean()
        if self.teacher is None or layout.taught is None:
            return loss
        repeated = _repeated(_gathered(keys).view(-1, len(keys) // rows, rows))
        taught: Tensor = self.teacher(whole, layout.taught, own, gather, repeated)
        self.measured |= {"contrastive_loss": loss.detach(), "teacher_loss": taught.detach()}
        settings = self.teacher.settings
        return settings.contrastive * loss + settings.weight * taught

    def _infonce(
        self, queries: Tensor, documents: Tensor, own: Tensor, no_negatives: Tensor
    ) -> Tensor:
        cosines = normalize(queries, dim=1) @ normalize(documents, dim=1).T  # (B, W (1 + K) B)
        left_out = no_negatives
        if self.margin is not None:
            positive = cosines.detach().gather(1, own[:, None])
            left_out = left_out | (cosines.detach() > positive + self.margin)
        left_out = left_out.scatter(1, own[:, None], False)  # the query's own positive stays in
        return cross_entropy((cosines / self.temperature).masked_fill(left_out, -torch.inf), own)


def _no_negatives(query_keys: Tensor, keys: Tensor, own: Tensor) -> Tensor:
    """(B, W (1 + K) B): documents that equal the query, or are a positive of it in any row.

    A text that answers a query is not a negative of that query, wherever in the batch it is: as
    another row's positive, as its hard negative, or on another device. A positive that is repeated
    in the place of a missing negative is a document of no query: it would count several times.
    """
    rows = len(query_keys)
    asked = _gathered(query_keys)  # (W B,)
    documents = _gathered(keys)  # (W (1 + K) B,)
    distinct, number = torch.cat([asked, documents]).unique(return_inverse=True)
    asked, documents = number.split([len(asked), len(documents)])
    queries = asked.view(-1, rows)[own[0] // len(keys)]  # (B,) of this device
    by_rank = documents.view(-1, len(keys) // rows, rows)  # (W, 1 + K, B)
    positives = by_rank[:, 0].reshape(-1)  # (W B,)
    # A pair of a query and a document becomes one number, so that `isin` can compare pairs.
    answered = asked * len(distinct) + positives
    pairs = queries[:, None] * len(distinct) + documents
    left_out: Tensor = torch.isin(pairs, answered) | (documents == queries[:, None])
    left_out |= _repeated(by_rank).view(-1)
    return left_out


def _repeated(documents: Tensor) -> Tensor:
    """(W, 1 + K, B): which documents repeat their row's positive, from numbers of that shape."""
    repeated = documents == documents[:, :1]
    repeated[:, 0] = False
    return repeated


def _gathered(tensor: Tensor, with_grad: bool = False) -> Tensor:
    """This tensor of every device, concatenated in the order of their ranks."""
    return all_gather(tensor, with_grad=with_grad) if get_world_size() > 1 else tensor
