"""Every loss of sentence-transformers has the gradient of the padded forward on the packed one.

In float32 the two forwards differ by rounding, which a loss multiplies by its scale: 1.5e-5 of the
gradient for `GISTEmbedLoss`, whose temperature of 0.01 makes it 100. In float64, as here, nothing
but a fault would be seen.
"""

from __future__ import annotations

import inspect
import random

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses

from unmasked import LLM2Vec

TEXTS = [
    ("short one", "a rather longer sentence than that", "x"),
    ("what is this about, then?", "b", "another of the other lengths"),
    ("one", "two three four five six seven", "eight nine"),
    ("ten eleven twelve", "thirteen", "fourteen fifteen sixteen seventeen"),
]
LIMIT = 1e-10
OF_DECODERS = {"DenoisingAutoEncoderLoss"}
"""It trains a decoder with cross-attention beside the encoder, of a class that is named for it."""


def label_kinds(columns):
    """Texts (columns) and labels of the losses that do not take triplets without labels."""
    floats, classes = torch.tensor([0.1, 0.9, 0.4, 0.7]), torch.tensor([0, 1, 0, 1])
    vectors = torch.linspace(-1, 1, 4 * 32, dtype=torch.float64).reshape(4, 32)
    two, one = columns[:2], columns[:1]
    return {
        **dict.fromkeys(("CosineSimilarityLoss", "CoSENTLoss", "AnglELoss"), (two, floats)),
        **dict.fromkeys(("ContrastiveLoss", "OnlineContrastiveLoss"), (two, classes)),
        "SoftmaxLoss": (two, classes),
        **dict.fromkeys((n for n in dir(losses) if n.startswith("Batch")), (one, classes)),
        "ContrastiveTensionLoss": (two, classes),
        "MSELoss": (one, vectors),
        "EmbedDistillLoss": (one, vectors),
        "MarginMSELoss": (columns, floats),
        "DistillKLDivLoss": (columns, torch.stack([floats, floats.flip(0)], dim=1)),
        "ContrastiveTensionLossInBatchNegatives": (two, None),
        "MegaBatchMarginLoss": (two, None),
        "MultipleNegativesSymmetricRankingLoss": (two, None),
        "CachedMultipleNegativesSymmetricRankingLoss": (two, None),
    }  # fmt: skip


def made(name, model, guide):
    """A loss with what its constructor asks for."""
    kind = getattr(losses, name)
    options = {
        "guide": guide,
        "embedding_dimension": 32,
        "num_labels": 2,
        "matryoshka_dims": [32, 16],
        "mini_batch_size": 2,
    }
    asked = inspect.signature(kind).parameters
    given = {key: value for key, value in options.items() if key in asked}
    if "loss" in asked:
        given["loss"] = losses.MultipleNegativesRankingLoss(model)
    if name == "MegaBatchMarginLoss":
        del given["mini_batch_size"]
        given["use_mini_batched_version"] = False
    torch.manual_seed(0)
    return kind(model=model, **given).double()


def gradient(name, model, guide, prompt=None):
    torch.manual_seed(0)
    random.seed(0)
    model.zero_grad()
    loss = made(name, model, guide)
    columns = [[row[column] for row in TEXTS] for column in range(3)]
    used, labels = label_kinds(columns).get(name, (columns, None))
    value = loss([model.preprocess(texts, prompt=prompt) for texts in used], labels)
    value = sum(value.values()) if isinstance(value, dict) else value
    value.backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return value.detach(), torch.cat(found)


def every_loss():
    names = [name for name in losses.__all__ if inspect.isclass(getattr(losses, name))]
    return [name for name in names if issubclass(getattr(losses, name), torch.nn.Module)]


def same_gradient(name, tiny_decoder):
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu").double()
    guide = LLM2Vec.from_pretrained(tiny_decoder, device="cpu").double()
    assert model.backbone.packs_here()
    value, packed = gradient(name, model, guide)
    model.backbone.unpackable = guide.backbone.unpackable = "compared with padding"
    assert not model.backbone.packs_here()
    wanted, padded = gradient(name, model, guide)
    assert torch.isfinite(padded).all() and padded.norm() > 0
    torch.testing.assert_close(value, wanted, rtol=LIMIT, atol=LIMIT)
    assert (packed - padded).norm() / padded.norm() < LIMIT


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "GISTEmbedLoss", "CoSENTLoss"])
def test_a_loss_has_the_gradient_of_the_padded_forward(name, tiny_decoder):
    same_gradient(name, tiny_decoder)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*every_loss()} - OF_DECODERS))
def test_every_loss_has_the_gradient_of_the_padded_forward(name, tiny_decoder):
    same_gradient(name, tiny_decoder)


@pytest.mark.parametrize("name", ["AdaptiveLayerLoss", "Matryoshka2dLoss"])
def test_losses_over_layers_are_those_of_the_stock_model_of_the_folder(
    name, tiny_decoder, tmp_path
):
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu").double()
    model.save(tmp_path / "saved")
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu").double()
    ours, gradient_of_ours = gradient(name, model, None)
    theirs, wanted = gradient(name, stock, None, stock.prompts["document"])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # pooling adds up in float32
    assert (gradient_of_ours - wanted).norm() / wanted.norm() < 1e-5
    assert not model.model.config.output_hidden_states
    assert "all_layer_embeddings" not in model(model.preprocess(["a text"]))
