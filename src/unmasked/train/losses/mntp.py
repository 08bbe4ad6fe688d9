"""Masked next-token prediction: teaching a decoder to use the tokens to its right.

Some tokens are masked; the one at position i is predicted from the state at i - 1, as the decoder
learned to do in pretraining (LLM2Vec, arXiv 2404.05961, section 2.2). The head is frozen: only the
trunk is trained. The family's own head turns states into logits, so that soft caps and scales are
kept, but it is given only the states that are scored: at 20 % masking that takes a fifth of the
time and memory of all logits, for the same loss. Logits are computed some rows at a time, and are
freed before the backward pass (`FusedScores`).

Shapes: B rows, T tokens, N scored tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from unmasked.errors import ModelError
from unmasked.forward.packing import is_checked, pack_blocks, pack_documents, run_packed
from unmasked.mask.opening import decoder_of
from unmasked.recipe.schema import MNTP
from unmasked.train.data.texts import Blocks

IGNORED = -100
"""The label of a token that is not scored."""
MICRO_BATCH = {"cpu": 2048, "cuda": 16384}
"""Tokens per forward by default: enough to keep the device busy."""
LOGITS_AT_ONCE = 1 << 27
"""Rows times vocabulary of a chunk of logits, which takes 0.5 GB in float32."""


@dataclass
class StatesOnly(BaseModelOutputWithPast):
    """A trunk's output with only the states; every other attribute that a family reads is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class GivenStates(nn.Module):
    """Replaces the trunk inside a causal LM, whose own forward then applies its head to states.

    The trunk's float attributes are copied, because some heads are scaled by one (falcon_h1).
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.__dict__ |= {k: v for k, v in vars(trunk).items() if isinstance(v, float)}

    @property
    def decoder(self) -> GivenStates:
        """Some families (opt) call this part of their trunk."""
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> StatesOnly:
        return StatesOnly(last_hidden_state=inputs_embeds)


Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps (N, D) states and (N,) targets to (N,) losses and (N,) hits."""


class FusedScores(torch.autograd.Function):
    """Losses and hits; the gradient of the states is computed in the forward, with their logits.

    The head is frozen, and the loss of a row depends on the state of that row alone. So the
    backward pass only needs the (N, D) gradients of each row's loss, which it multiplies by that
    loss's own gradient: no logits are kept for it or computed again. torch's
    `linear_cross_entropy` and the kernels of Liger and cut-cross-entropy work in the same way, but
    they take the head's matrix, without the scales and soft caps of some families, or give no hits.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, score: Score, rows: int
    ) -> tuple[Tensor, Tensor]:
        parts = []
        for chunk, wanted in zip(states.split(rows), targets.split(rows), strict=True):
            with torch.enable_grad():  # it is off inside an autograd function
                leaf = chunk.detach().requires_grad_()
                losses, hits = score(leaf, wanted)
                # A row's loss depends on its state alone, so the sum has each row's own gradient.
                (gradient,) = torch.autograd.grad(losses.sum(), leaf)
            parts.append((losses.detach(), hits, gradient))
        losses, hits, gradient = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors  # (N, D); outer[0] is the gradient of the (N,) losses
        return gradient * outer[0][:, None].to(gradient.dtype), None, None, None


class MaskedNextTokenModel(nn.Module):
    """A trunk and the frozen head of its language model; the forward is the MNTP loss.

    Args:
        trunk: the bare transformer, with an adapter on it.
        language_model: the causal LM that the trunk belongs to. Its own trunk is removed, and only
            its head is used.
    """

    accepts_loss_kwargs = True
    """The `Trainer` then counts the scored tokens of a step, over micro-batches and devices."""

    def __init__(self, trunk: nn.Module, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = trunk
        output: Any = language_model.get_output_embeddings()
        embeddings = language_model.get_input_embeddings()
        children = language_model.named_children()
        name, own_trunk = next(child for child in children if embeddings in child[1].modules())
        setattr(language_model, name, GivenStates(own_trunk))
        self.head = language_model.requires_grad_(False)
        self.config = language_model.config
        if output is not None and getattr(self.config, "tie_word_embeddings", False):
            # The head was tied to the embeddings that were just removed: tie it to the trunk's.
            output.weight = trunk.get_input_embeddings().weight  # type: ignore[operator]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        begins: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """MNTP loss of a batch.

        Args:
            input_ids: (B, T) with masked tokens replaced.
            labels: (B, T) the original id where a token is scored, else -100.
            attention_mask: (B, T); None without padding.
            begins: (B, T) bool, True at the first token of each document; then attention stays
                within documents, and the model must be one that can be packed. None if all tokens
                of a row attend to each other.
            num_items_in_batch: number of scored tokens of the whole optimiser step, on all
                devices; None counts those of this batch.

        Returns:
            As `score`.
        """
        if begins is not None:
            packed = pack_documents(begins)
            apart = run_packed(self.trunk, input_ids, packed)  # (B * T, D), document by document
            places = (packed.rows, packed.columns)  # put back where the tokens were: (B, T, D)
            states = apart.new_empty(*labels.shape, apart.shape[1]).index_put(places, apart)
        elif attention_mask is None and is_checked(decoder_of(self.trunk)):
            rows, length = labels.shape  # packed, as in the other stages
            packed = pack_blocks(rows, length, labels.device)
            states = run_packed(self.trunk, input_ids, packed).view(*input_ids.shape, -1)
        else:
            states = self.trunk(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state  # (B, T, D)
        return self.score(states, labels, num_items_in_batch)

    def score(
        self, states: Tensor, labels: Tensor, scored: Tensor | int | None = None
    ) -> dict[str, Tensor]:
        """The loss of given states.

        Args:
            states: (B, T, D), the output of the trunk.
            labels: (B, T) as in `forward`.
            scored: the number that the summed loss is divided by; None counts the tokens that are
                scored here.

        Returns:
            ``loss``, the mean over the scored tokens, and ``totals``, (B, 3): summed loss, number
            of correct predictions and number of scored tokens of each row.
        """
        # The state at position i is scored against the label at i + 1.
        rows, places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # (N,), (N,)
        targets = labels[rows, places + 1]  # (N,)
        losses, correct = self._score(states[rows, places], targets)
        totals = losses.new_zeros(len(labels), 3).index_add(
            0, rows, torch.stack([losses, correct, torch.ones_like(losses)], dim=1)
        )
        count = torch.as_tensor(len(losses) if scored is None else scored, device=losses.device)
        return {"loss": losses.sum() / count.clamp(min=1), "totals": totals.detach()}

    def _score(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) losses and hits of (N, D) states, one chunk of logits at a time."""
        rows = max(1, LOGITS_AT_ONCE // self.config.get_text_config().vocab_size)
        if states.requires_grad and not any(p.requires_grad for p in self.head.parameters()):
            return FusedScores.apply(states, targets, self._score_chunk, rows)  # type: ignore
        chunks = list(zip(states.split(rows), targets.split(rows), strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            parts = [self._score_chunk(*chunk) for chunk in chunks]
        else:  # a tied head is trained with the trunk: its logits are recomputed, not kept
            parts = [checkpoint(self._score_chunk, *c, use_reentrant=False) for c in chunks]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _score_chunk(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(inputs_embeds=states[None], use_cache=False).logits[0].float()  # (N, V)
        losses = cross_entropy(logits, targets, reduction="none")
        return losses, (logits.detach().argmax(-1) == targets).float()


@dataclass(frozen=True)
class Masking:
    """Which tokens are masked, and by what (LLM2Vec, section 3.1 and appendix D).

    Attributes:
        mask_id: the id that replaces a masked token.
        vocabulary: ids below this number may replace a token at random.
        special_ids: ids that are never masked.
        probability: the share of the other tokens that is scored.
        style: of the scored tokens, ``bert`` masks 80 %, replaces 10 % at random and keeps 10 %;
            ``all`` masks all of them.
    """

    mask_id: int
    vocabulary: int
    special_ids: tuple[int, ...]
    probability: float = 0.2
    style: str = "bert"

    def __call__(
        self,
        ids: Tensor,
        generator: torch.Generator | None = None,
        begins: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Masked ``input_ids`` and ``labels``, each (B, T), for (B, T) ids.

        The first token of a document, where `begins` (B, T) is True, is never scored.
        """
        scored = torch.rand(ids.shape, generator=generator) < self.probability
        scored &= ~torch.isin(ids, torch.tensor(self.special_ids, dtype=ids.dtype))
        scored[:, 0] = False  # there is no state before it to predict it from
        if begins is not None:
            scored &= ~begins
        labels = torch.where(scored, ids, IGNORED)
        if self.style == "all":
            return {"input_ids": torch.where(scored, self.mask_id, ids), "labels": labels}
        draw = torch.rand(ids.shape, generator=generator)
        noise = torch.randint(self.vocabulary, ids.shape, generator=generator)
        masked = torch.where(scored & (draw < 0.8), self.mask_id, ids)
        masked = torch.where(scored & (draw >= 0.8) & (draw < 0.9), noise, masked)
        return {"input_ids": masked, "labels": labels}


def find_mask_id(tokenizer: PreTrainedTokenizerBase, kind: str) -> int | None:
    """The id that masks: the tokenizer's own mask token, else ``_`` (blank) or EOS.

    Returns:
        None for kind ``mask``: a new embedding is needed. The tokenizer is not changed.

    Raises:
        ModelError: the tokenizer has no such token.
    """
    own: Any = getattr(tokenizer, "mask_token_id", None)
    if own is not None:
        return int(own)
    if kind == "mask":
        return None
    if kind == "eos":
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "mask_token eos: the tokenizer does not name an EOS token. Fix: mask_token: blank."
            )
        return int(tokenizer.eos_token_id)
    found: Any = tokenizer.convert_tokens_to_ids("_")
    if found is None or found == tokenizer.unk_token_id:
        raise ModelError(
            "mask_token blank: '_' is not one token of this tokenizer. Fix: mask_token: mask."
        )
    return int(found)


class BlockData(Dataset[dict[str, Tensor]]):
    """Blocks of token ids, with new masks in each epoch.

    A mask depends on seed, epoch and index alone, not on the order of reading, so that a resumed
    run has the same masks as an uninterrupted one. `set_epoch` is called for training data only:
    evaluation has the same masks each time.

    Args:
        blocks: (N, T) ids, or an object that returns (T,) ids for an index.
        masking: which tokens are masked, and by what.
        seed: the seed of the masks.
        apart: also return ``begins`` (T,), which keeps attention within documents.
    """

    def __init__(
        self, blocks: np.ndarray | Blocks, masking: Masking, seed: int, apart: bool = False
    ) -> None:
        self.blocks = blocks
        self.masking = masking
        self.seed = seed
        self.apart = apart
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        (state,) = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state))
        ids = torch.from_numpy(np.asarray(self.blocks[index], dtype=np.int64))[None]
        if not self.apart:
            return {name: row[0] for name, row in self.masking(ids, generator).items()}
        begins = torch.from_numpy(self.blocks.begins(index))[None]  # type: ignore[union-attr]
        batch = {**self.masking(ids, generator, begins), "begins": begins}
        return {name: row[0] for name, row in batch.items()}


def micro_batch_rows(stage: MNTP, device: torch.device) -> int:
    """Maximum number of blocks per forward."""
    budget = stage.micro_batch_tokens or MICRO_BATCH.get(device.type, 8192)
    return max(1, budget // stage.block_length)


def token_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Loss, perplexity and accuracy over all scored tokens, not means of means of batches."""
    loss, correct, count = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    if count == 0:
        return {}
    mean = loss / count
    return {
        "token_loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "accuracy": correct / count,
    }
