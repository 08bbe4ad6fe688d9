"""Supervised contrastive training: a query finds its document among those of the whole batch.

InfoNCE with hard negatives (LLM2Vec, arXiv 2404.05961, section 3.2). A document that is the query's
own text, or answers it anywhere in the batch, does not count as a negative. All texts of a batch
are one packed forward, where sentence-transformers runs one per column. With GradCache (Gao et al.,
arXiv 2101.06983) the batch need not fit into memory: texts are embedded twice, in forwards of a
limited number of tokens, for half as much computation again and the same gradient.

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
    """What the loss knows of the R texts of a batch besides their vectors.

    Attributes:
        rows: B.
        place: (R,) where each vector belongs among queries, positives and negatives.
        key: (R,) equal for equal texts, in that order.
        taught: what a teacher says of them, if there is one: (R, W) vectors in that order, or
            (B, 1 + K) scores.
    """

    rows: int
    place: Tensor
    key: Tensor
    taught: Tensor | None = None


class RankingLoss(CachedLossMixin, nn.Module):
    """Cross-entropy of each query's own positive among the documents of all rows and devices.

    The mean over the rows of this device is returned. Gradients of gathered documents are summed
    over devices and then averaged with all others by DDP, so a step on W devices equals one on a
    device with the whole batch.

    Args:
        model: the encoder.
        temperature: of the cosines (0.02 in the paper).
        mini_batch_tokens: maximum number of tokens per forward; None runs each batch at once.
        margin: documents whose cosine to the query is larger than the positive's by more than this
            are not negatives; None leaves out only equal texts.
        dimensions: lengths of the beginning of the vector that are trained as well (Matryoshka,
            arXiv 2205.13147).
        depths: vectors of the model that are trained, one behind the other, where `depth.depths`
            gives those of several numbers of layers.
        teacher: the loss of what a teacher says, if there is one, learned by the whole vector.

    Attributes:
        measured: alignment and uniformity of the last forward, and both losses beside a teacher.
    """

    views = 1
    mini_batch_size = 1 << 62  # forwards are limited by their tokens alone

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
        told = (features.pop("place"), features.pop("key"), features.pop("taught", None))
        layout = BatchLayout(len(labels), *told)
        limit, attention = self.mini_batch_num_tokens, features["attention_mask"]
        if limit is None or devices.most(int(attention.sum()), attention.device) <= limit:
            return self.score(self.model(features)["sentence_embedding"], layout)
        return self.forward_cached([features], layout)  # type: ignore[arg-type]

    def embed_minibatch_iter(self, sentence_feature: Any, *given: Any, **named: Any) -> Any:
        """As many forwards as on the device that has the most: sharded weights need all devices.

        Those without a part of the batch come first, and run the shortest text, which is the last.
        Their result and gradient are dropped, and they leave the random state as it was.
        """
        if isinstance(self.model, FSDPModule):
            count, with_grad = len(named["ranges"]), named["with_grad"]
            mask = sentence_feature["attention_mask"]
            part, cuda = (len(mask) - 1, len(mask), with_grad, False), mask.device.type == "cuda"
            for _ in range(devices.most(count, mask.device) - count):
                with torch.random.fork_rng([mask.device] if cuda else []):
                    vectors, _ = self.embed_minibatch(sentence_feature, *part)
                if with_grad:
                    (0 * vectors).sum().backward()
        yield from super().embed_minibatch_iter(sentence_feature, *given, **named)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of the vectors of all mini-batches, as `CachedLossMixin` asks for it."""
        (parts,) = reps
        loss = self.score(torch.cat(parts), labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def score(self, vectors: Tensor, layout: BatchLayout) -> Tensor:
        """Scalar loss of (R, D) vectors, the mean over all trained lengths and depths."""
        vectors = torch.empty_like(vectors).index_copy(0, layout.place, vectors).float()
        each, rows = vectors.chunk(self.depths, dim=1), layout.rows
        self.measured = alignment_and_uniformity(each[0][:rows], each[0][rows : 2 * rows])
        query_keys, keys = layout.key.split([rows, len(vectors) - rows])
        # Rows of another device may have more negatives: these show their positive again, too.
        again = (devices.most(len(keys), keys.device) - len(keys)) // rows
        keys = torch.cat([keys, *[keys[:rows]] * again])
        own = get_rank() * len(keys) + torch.arange(rows, device=vectors.device)

        def everyone(documents: Tensor) -> Tensor:  # (W (1 + K) B, D)
            return _gathered(torch.cat([documents, *[documents[:rows]] * again]), with_grad=True)

        loss = vectors.new_zeros(())
        if self.teacher is None or self.teacher.settings.contrastive:
            same = _same(query_keys, keys, own)
            losses = []
            for deep in each:
                queries, documents = deep[:rows], everyone(deep[rows:])
                widths = {*self.dimensions, deep.shape[1]}
                losses += [
                    self._infonce(queries[:, :w], documents[:, :w], own, same) for w in widths
                ]
            loss = torch.stack(losses).mean()
        if self.teacher is None or layout.taught is None:
            return loss
        taught: Tensor = self.teacher(each[0], layout.taught, rows, own, everyone)
        self.measured |= {"contrastive_loss": loss.detach(), "teacher_loss": taught.detach()}
        settings = self.teacher.settings
        return settings.contrastive * loss + settings.weight * taught

    def _infonce(self, queries: Tensor, documents: Tensor, own: Tensor, same: Tensor) -> Tensor:
        cosines = normalize(queries, dim=1) @ normalize(documents, dim=1).T
        left_out = same
        if self.margin is not None:
            positive = cosines.detach().gather(1, own[:, None])
            left_out = left_out | (cosines.detach() > positive + self.margin)
        left_out = left_out.scatter(1, own[:, None], False)
        return cross_entropy((cosines / self.temperature).masked_fill(left_out, -torch.inf), own)


def _same(query_keys: Tensor, keys: Tensor, own: Tensor) -> Tensor:
    """(B, W (1 + K) B): documents that are the query itself, or answer it somewhere.

    What answers a query is no negative of it, wherever in the batch it stands: as another row's
    positive, as its hard negative, or on another device.
    """
    rows = len(query_keys)
    asked = _gathered(query_keys)  # (W B,)
    documents = _gathered(keys)  # (W (1 + K) B,)
    distinct, number = torch.cat([asked, documents]).unique(return_inverse=True)
    asked, documents = number.split([len(asked), len(documents)])
    queries = asked.view(-1, rows)[own[0] // len(keys)]  # (B,) of this device
    positives = documents.view(-1, len(keys))[:, :rows].reshape(-1)  # (W B,)
    # One number stands for each pair of a query and a document.
    answered = asked * len(distinct) + positives
    pairs = queries[:, None] * len(distinct) + documents
    left_out: Tensor = torch.isin(pairs, answered) | (documents == queries[:, None])
    return left_out


def _gathered(tensor: Tensor, with_grad: bool = False) -> Tensor:
    """The same tensor of all devices, one after the other."""
    return all_gather(tensor, with_grad=with_grad) if get_world_size() > 1 else tensor
