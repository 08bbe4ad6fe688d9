"""SimCSE: two dropout views of a text are closer to each other than to any other text.

Gao et al., arXiv 2104.08821, as used by LLM2Vec, arXiv 2404.05961, section 2.3. Decoders are
pretrained without dropout and their configs say 0, so it is switched on here, and two forwards of
eight tokens prove that it has an effect. Both views of a batch are one packed forward, with the
same preprocessing and pooling as in `encode`.
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
def noise(model: Any, attention: float, embedding: float = 0.0) -> Iterator[None]:
    """Within the block, dropout of a transformer is switched on; first it is proved to act.

    Args:
        model: a transformer, perhaps with an adapter.
        attention: probability of dropping an attention weight, in train mode.
        embedding: probability of dropping a number of a token's embedding, in train mode.

    Raises:
        ModelError: attention dropout is set, but two forwards give the same states.
    """

    def drop(module: nn.Module, _: Any, states: Tensor) -> Tensor:
        return nn.functional.dropout(states, embedding, module.training)

    hooks = []
    before = _set_dropout(model, attention)
    try:
        if attention > 0:
            _prove_noise(model, found=len(before))  # before embedding dropout, which would hide it
        hooks.append(model.get_input_embeddings().register_forward_hook(drop))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, name, value in before:
            setattr(module, name, value)


def _set_dropout(model: nn.Module, probability: float) -> list[tuple[nn.Module, str, float]]:
    """Set the attention dropout of all modules; returns the arguments of `setattr` to undo it."""
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
    """Refuse a model whose two forwards in train mode are equal."""
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

    Attributes:
        measured: alignment and uniformity of the last forward.
    """

    views = 2

    def __init__(self, model: SentenceTransformer, temperature: float = 0.05) -> None:
        super().__init__()
        self.model = model
        self.ranking = MultipleNegativesRankingLoss(
            model, scale=1 / temperature, gather_across_devices=get_world_size() > 1
        )
        self.measured: dict[str, Tensor] = {}

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Scalar loss of the features of B texts; there are no labels."""
        (features,) = sentence_features
        # Everything except the prompt's length, which is one number for the whole batch.
        tensors = {name: value for name, value in features.items() if isinstance(value, Tensor)}
        twice = {name: torch.cat([value, value]) for name, value in tensors.items()}
        vectors = self.model({**twice, "repad": False})["sentence_embedding"]  # (2B, D)
        first, second = vectors.chunk(2)
        self.measured = alignment_and_uniformity(first, second)
        return self.ranking.compute_loss_from_embeddings([first, second], labels)
