"""SimCSE: two dropout views of a sentence are closer to each other than to any other sentence.

(Gao et al., arXiv 2104.08821, as used by LLM2Vec, arXiv 2404.05961, section 2.3.) Decoders are
trained without dropout and their configs say 0, so the noise has to be switched on, and is proved
to be on. Both views go through the model in one forward, behind the same preprocessing and pooling
as `encode`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import get_world_size
from torch import Tensor, nn

from unmasked.errors import ModelError
from unmasked.forward.geometry import alignment_and_uniformity

ATTENTION_DROPOUT = ("attention_dropout", "attn_dropout", "attn_pdrop")
"""Names of the attention dropout in attention modules: a number in most, a `Dropout` in some."""


@contextmanager
def noise(model: nn.Module, attention: float, embedding: float = 0.0) -> Iterator[None]:
    """Dropout switched on in a transformer for the time of the block, and proved to act.

    Args:
        model: a transformer, perhaps with an adapter.
        attention: probability of dropping an attention weight, in train mode.
        embedding: probability of dropping a number of a token's embedding, in train mode.

    Raises:
        ModelError: attention dropout is wanted and no module has one, or two passes are equal.
    """
    before = _set_dropout(model, attention)
    try:
        if attention > 0:
            _prove_noise(model, found=len(before))
        with _embedding_dropout(model, embedding):
            yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def _embedding_dropout(model: Any, probability: float) -> Iterator[None]:
    def drop(module: nn.Module, _: Any, states: Tensor) -> Tensor:
        return nn.functional.dropout(states, probability, module.training)

    hook = model.get_input_embeddings().register_forward_hook(drop)
    try:
        yield
    finally:
        hook.remove()


def _set_dropout(model: nn.Module, probability: float) -> list[tuple[nn.Module, str, float]]:
    before: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        for name in ATTENTION_DROPOUT:
            value = getattr(module, name, None)
            target, key = (value, "p") if isinstance(value, nn.Dropout) else (module, name)
            if isinstance(getattr(target, key, None), int | float):
                before.append((target, key, getattr(target, key)))
                setattr(target, key, probability)
    return before


@torch.no_grad()
def _prove_noise(model: nn.Module, found: int) -> None:
    was_training = model.training
    device = next(model.parameters()).device
    config: Any = model.config
    ids = torch.arange(2, 10, device=device)[None] % config.get_text_config().vocab_size
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        views = [model.train()(input_ids=ids, use_cache=False).last_hidden_state for _ in range(2)]
    model.train(was_training)
    if torch.equal(views[0], views[1]):
        raise ModelError(
            f"attention dropout has no effect in this model ({found} modules have a setting), so "
            "SimCSE's two views would be one. Fix: model.attention=sdpa or eager, which apply "
            "dropout, or simcse.attention_dropout=0 simcse.embedding_dropout=0.1."
        )


class TwoViewsLoss(nn.Module):
    """InfoNCE between two passes over the same texts, done as one forward of twice the rows.

    The texts of all devices are a text's negatives.

    Args:
        model: the encoder, in train mode with dropout.
        temperature: of the cosine similarities (0.05 in the paper).
    """

    views = 2
    """Forwards of every token, for the count of tokens."""

    def __init__(self, model: SentenceTransformer, temperature: float = 0.05) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.ranking = MultipleNegativesRankingLoss(
            model, scale=1 / temperature, gather_across_devices=get_world_size() > 1
        )
        self.measured: dict[str, Tensor] = {}

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Scalar loss of (B, T) features."""
        (features,) = sentence_features
        twice = {name: torch.cat([value, value]) for name, value in features.items()}
        vectors = self.model({**twice, "repad": False})["sentence_embedding"]  # (2B, D)
        first, second = vectors.chunk(2)
        self.measured = alignment_and_uniformity(first, second)
        return self.ranking.compute_loss_from_embeddings([first, second], labels)

    def get_config_dict(self) -> dict[str, Any]:
        return {"temperature": self.temperature}
