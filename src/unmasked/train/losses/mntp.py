"""Masked next-token prediction: teaching a decoder to use the tokens to its right.

Some tokens are masked; the one at position i is predicted from the state at i - 1, where the model
is used to predicting it (LLM2Vec, arXiv 2404.05961, section 2.2). Only the LoRA on the trunk
trains. The family's own head turns states into logits, so soft caps and scales are kept, but only
the states that are scored reach it: at 20 % masking that is a fifth of the logits and of their
memory, to the same loss.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from unmasked.errors import DataError, ModelError
from unmasked.forward.packing import pack_documents, run_packed
from unmasked.recipe.schema import MNTP
from unmasked.text.tokens import TextTokenizer
from unmasked.train import devices
from unmasked.train.checkpoints import last_checkpoint
from unmasked.train.data.texts import Blocks, token_file

IGNORED = -100
TOKENS = "tokens"
"""Folder of the token file, in the run folder until MNTP is done."""
MICRO_BATCH = {"cpu": 2048, "cuda": 16384}
"""Tokens of a forward: enough to keep the device busy."""
LOGITS_AT_ONCE = 1 << 27
"""Rows times vocabulary of one chunk of logits: 0.5 GB in float32."""


@dataclass
class StatesOnly(BaseModelOutputWithPast):
    """A trunk's output with the states only; whatever else a family asks for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class GivenStates(nn.Module):
    """Stands in for the trunk inside a causal LM, so that its own forward applies its head.

    The numbers of the trunk are kept: some heads are scaled by one of them (falcon_h1).
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.__dict__ |= {k: v for k, v in vars(trunk).items() if isinstance(v, float)}

    @property
    def decoder(self) -> GivenStates:
        """What some families (opt) ask of their trunk."""
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> StatesOnly:
        return StatesOnly(last_hidden_state=inputs_embeds)


class MaskedNextTokenModel(nn.Module):
    """A trunk and the frozen head of its language model; the forward is the MNTP loss.

    Args:
        trunk: the bare transformer, with an adapter on it.
        language_model: the causal LM the trunk belongs to. Its trunk is taken out, only its head
            is used.
    """

    accepts_loss_kwargs = True
    """Tells the `Trainer` to count the scored tokens of a step, over micro-batches and devices."""

    def __init__(self, trunk: nn.Module, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = trunk
        output: Any = language_model.get_output_embeddings()
        words = language_model.get_input_embeddings()
        name, own = next(c for c in language_model.named_children() if words in c[1].modules())
        setattr(language_model, name, GivenStates(own))
        self.head = language_model.requires_grad_(False)
        self.config = language_model.config
        if output is not None and getattr(self.config, "tie_word_embeddings", False):
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
            begins: (B, T) bool, where a document begins that sees itself alone; None if all
                tokens of a row see each other. The model must be one that can be packed.
            num_items_in_batch: scored tokens of the whole optimiser step, on all devices; those
                of this batch if None.

        Returns:
            As `score`.
        """
        if begins is None:
            states: Tensor = self.trunk(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state  # (B, T, D)
        else:
            packed = pack_documents(begins)
            apart = run_packed(self.trunk, input_ids, packed)  # (N, D)
            places = (packed.rows, packed.columns)
            states = apart.new_empty(*labels.shape, apart.shape[1]).index_put(places, apart)
        return self.score(states, labels, num_items_in_batch)

    def score(
        self, states: Tensor, labels: Tensor, scored: Tensor | int | None = None
    ) -> dict[str, Tensor]:
        """Head and loss alone.

        Args:
            states: (B, T, D) of the trunk.
            labels: (B, T) as in `forward`.
            scored: what the summed loss is divided by; the tokens scored here if None.

        Returns:
            ``loss``: mean over the scored tokens; ``totals``: (B, 3) summed loss, correct
            predictions and scored tokens of each row.
        """
        rows, places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # (N,), (N,)
        targets = labels[rows, places + 1]  # (N,)
        losses, correct = self._score(states[rows, places], targets)
        totals = losses.new_zeros(len(labels), 3).index_add(
            0, rows, torch.stack([losses, correct, torch.ones_like(losses)], dim=1)
        )
        count = torch.as_tensor(len(losses) if scored is None else scored, device=losses.device)
        return {"loss": losses.sum() / count.clamp(min=1), "totals": totals.detach()}

    def _score(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) losses and hits of (N, D) states, a chunk of logits at a time."""
        rows = max(1, LOGITS_AT_ONCE // self.config.get_text_config().vocab_size)
        chunks = list(zip(states.split(rows), targets.split(rows), strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            parts = [self._score_chunk(*chunk) for chunk in chunks]
        else:  # recompute the logits of a chunk in the backward pass instead of keeping them
            parts = [checkpoint(self._score_chunk, *c, use_reentrant=False) for c in chunks]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _score_chunk(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(inputs_embeds=states[None], use_cache=False).logits[0].float()  # (n, V)
        losses = cross_entropy(logits, targets, reduction="none")
        return losses, (logits.detach().argmax(-1) == targets).float()


@dataclass(frozen=True)
class Masking:
    """Which tokens are masked, and by what (LLM2Vec, section 3.1 and appendix D).

    Attributes:
        mask_id: id that replaces a masked token.
        vocabulary: ids below this may replace a token at random.
        special_ids: never masked.
        probability: share of the other tokens that is scored.
        style: ``bert`` masks 80 %, replaces 10 % at random and keeps 10 %; ``all`` masks them all.
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

        Nothing is scored where `begins`, (B, T), says that a document begins.
        """
        scored = torch.rand(ids.shape, generator=generator) < self.probability
        scored &= ~torch.isin(ids, torch.tensor(self.special_ids, dtype=ids.dtype))
        scored[:, 0] = False  # nothing stands before it to predict it from
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
        None for kind ``mask``: a new embedding is needed. The tokenizer is never changed.

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
            raise ModelError("mask_token eos: the tokenizer names no EOS. Fix: mask_token: blank")
        return int(tokenizer.eos_token_id)
    found: Any = tokenizer.convert_tokens_to_ids("_")
    if found is None or found == tokenizer.unk_token_id:
        raise ModelError("mask_token blank: '_' is no single token here. Fix: mask_token: mask")
    return int(found)


class BlockData(Dataset[dict[str, Tensor]]):
    """Blocks of ids, masked anew in each epoch.

    What is masked depends on seed, epoch and index alone, not on the order of reading, so an
    interrupted run continues with the very masks it would have had. Without `set_epoch`, which
    the trainer calls for training data, masks stay as they are: that is what evaluation needs.

    Args:
        blocks: (N, T) ids, or what gives (T,) of them for a number.
        masking: what to mask.
        seed: of the masks.
        apart: also give ``begins``, (T,), where documents begin that see themselves alone.
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
        begins = None
        if self.apart and isinstance(self.blocks, Blocks):
            begins = torch.from_numpy(self.blocks.begins(index))[None]
        batch = self.masking(ids, generator, begins)
        if begins is not None:
            batch["begins"] = begins
        return {name: row[0] for name, row in batch.items()}


def block_data(
    folder: Path,
    stage: MNTP,
    tokens: TextTokenizer,
    masking: Masking,
    seed: int,
    apart: bool,
) -> tuple[BlockData, BlockData | None]:
    """Blocks to train on and, if any texts are held out, to evaluate on.

    Args:
        folder: of the stage; it gets ``data.json``, what was read and what was left out.
        stage: the settings.
        tokens: how texts become ids.
        masking, seed, apart: as in `BlockData`.

    Raises:
        DataError: as `token_file` and `Blocks`, or the texts have changed since the checkpoint.
    """
    file = token_file(stage.data, stage.max_texts, tokens, folder.parent / TOKENS)
    train, held_out = file.split(stage.held_out, seed)
    blocks = Blocks(file, train, stage.block_length)
    if devices.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_other_texts(folder, file.source)
        facts = {
            "source": file.source,
            "texts": len(file.keys),
            "repeated": len(file.keys) - len(train) - len(held_out),
            "held_out": len(held_out),
            "tokens": len(file.ids),
            "blocks": len(blocks),
            "dropped_tokens": blocks.dropped,
        }
        text = json.dumps(facts, indent=2) + "\n"
        (folder / "data.json").write_text(text, encoding="utf-8")
    evaluation = None
    if len(held_out) and stage.eval_steps:
        kept = Blocks(file, held_out, stage.block_length, held_out=True)
        evaluation = BlockData(kept, masking, seed, apart)
    return BlockData(blocks, masking, seed, apart), evaluation


def _refuse_other_texts(folder: Path, source: str) -> None:
    """An interrupted stage continues on the texts it began with, or not at all."""
    facts = folder / "data.json"
    if last_checkpoint(folder) is None or not facts.is_file():
        return
    if json.loads(facts.read_text(encoding="utf-8"))["source"] != source:
        raise DataError(
            f"the texts of {folder.name} have changed since its last checkpoint (names, sizes or "
            "times of the files). Fix: put them back to continue, or take another output folder."
        )


def micro_batch_rows(stage: MNTP, device: torch.device) -> int:
    """Most blocks of an MNTP forward."""
    budget = stage.micro_batch_tokens or MICRO_BATCH.get(device.type, 8192)
    return max(1, budget // stage.block_length)


def token_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Loss, perplexity and accuracy over all scored tokens (not means of batch means)."""
    loss, correct, count = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    if count == 0:
        return {}
    mean = loss / count
    return {
        "token_loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "accuracy": correct / count,
    }
