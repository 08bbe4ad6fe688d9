"""Fewer layers: kept when a model is loaded, trained as encoders of their own, and scored."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from support import tiny

from unmasked import LLM2Vec
from unmasked.checkpoint import adapters, loading
from unmasked.checkpoint.weights import with_first_layers
from unmasked.errors import DataError, ModelError, RecipeError
from unmasked.evaluate.trade_off import cut_encoders
from unmasked.files.writing import write_text
from unmasked.recipe.schema import Pairs, Recipe
from unmasked.train.data.mixing import PairCollator
from unmasked.train.losses.depth import depths, first_layers
from unmasked.train.losses.supervised import RankingLoss
from unmasked.train.run import Run

TEXTS = ["The cat sat on the mat.", "A dog barked."]
FAMILIES = [
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_neo",
    "llama",
    "llama4",
    "mistral",
    "qwen3",
    "stablelm",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layers_of_a_family_are_those_of_the_whole(family, tmp_path):
    whole = tiny.model(family, num_hidden_layers=3, **LONGER.get(family, {}))
    whole.save_pretrained(tmp_path)
    config = with_first_layers("x", whole.config, 2)
    cut = type(whole).from_pretrained(tmp_path, config=config)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), first_layers(whole, 2):
        wanted = whole(input_ids=ids, use_cache=False).last_hidden_state
    with torch.no_grad():
        found = cut.eval()(input_ids=ids, use_cache=False).last_hidden_state
        other = whole(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, other, rtol=1e-2, atol=1e-3)
    assert whole.config.get_text_config().num_hidden_layers == 3


WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
LONGER = {
    "gemma2": WINDOWS,
    "gemma3": WINDOWS,
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "llama4": {"no_rope_layers": [1, 0, 1]},
}


def test_a_family_that_ties_other_weights_to_the_number_is_refused(tmp_path, tiny_tokenizer):
    tiny.save_random(tmp_path, tiny.config("gemma4"), tiny_tokenizer)
    with pytest.raises(ModelError, match=r"layers 1: the weights of .*Fix: keep all of them"):
        LLM2Vec.from_pretrained(tmp_path, layers=1)


def test_a_config_that_cannot_be_read_back_is_refused(monkeypatch):
    config = tiny.config("llama")
    plain = type(config).from_dict.__func__

    def from_dict(cls, values, **more):
        if values["num_hidden_layers"] < 2:
            raise ValueError("two at least")
        return plain(cls, values, **more)

    monkeypatch.setattr(type(config), "from_dict", classmethod(from_dict))
    with pytest.raises(ModelError, match=r"layers 1: .* \(two at least\). Fix: keep all of them"):
        with_first_layers("x", config, 1)


@pytest.mark.parametrize("count", [0, 3, -1])
def test_layers_that_are_not_there_are_refused(tiny_decoder, count):
    with pytest.raises(ModelError, match=rf"layers {count}: .* has 2 layers.*Fix: layers=1"):
        loading.find(tiny_decoder, layers=count)


def test_kept_layers_are_proved_saved_and_loaded_by_stock(tiny_decoder, tmp_path):
    encoder = LLM2Vec.from_pretrained(tiny_decoder, layers=1)
    assert encoder.report.verdict == "full"
    encoder.save(tmp_path / "one")
    stock = SentenceTransformer(str(tmp_path / "one"), device="cpu")
    np.testing.assert_allclose(stock.encode(TEXTS), encoder.encode(TEXTS), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "one" / "config.json").read_text())["num_hidden_layers"] == 1


def test_an_adapter_of_all_layers_is_merged_into_those_that_are_kept(tiny_decoder, tmp_path):
    trunk = LLM2Vec.from_pretrained(tiny_decoder, device="cpu").backbone.auto_model
    adapter = adapters.attach(trunk, rank=2, dropout=0.0)
    for name, weight in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    adapters.save_adapter(adapter, tmp_path, adapters.adapter_state(adapter))
    whole = LLM2Vec.from_pretrained(tiny_decoder, tmp_path)
    cut = LLM2Vec.from_pretrained(tiny_decoder, tmp_path, layers=1)
    with first_layers(whole.backbone.auto_model, 1):
        wanted = whole.encode(TEXTS)
    np.testing.assert_allclose(cut.encode(TEXTS), wanted, rtol=1e-4, atol=1e-5)


def test_the_vectors_of_a_depth_follow_those_of_the_whole(tiny_decoder):
    encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    features = encoder.preprocess(TEXTS)
    with torch.no_grad(), depths(encoder, [1]):
        found = encoder(dict(features))["sentence_embedding"].numpy()
    assert found.shape == (2, 64)
    np.testing.assert_allclose(found[:, :32], encoder.encode(TEXTS), rtol=1e-4, atol=1e-5)
    alone = LLM2Vec.from_pretrained(tiny_decoder, layers=1, device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found[:, 32:], alone, rtol=1e-4, atol=1e-5)
    assert encoder(dict(features))["sentence_embedding"].shape == (2, 32)


def test_the_loss_of_depths_and_dimensions_is_the_mean_with_and_without_caching(tiny_decoder):
    encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    alone = LLM2Vec.from_pretrained(tiny_decoder, layers=1, device="cpu")
    rows = [
        {"query": f"q {i}", "positive": f"p {i} " * 3, "negatives": [], "source": 0, "number": i}
        for i in range(6)
    ]
    collated = PairCollator(encoder.preprocess, [Pairs(path="x")], 0, 32)(rows)
    labels = collated.pop("label")

    def loss_of(model, limit=None, **settings):
        features = {name.removeprefix("text_"): value for name, value in collated.items()}
        return RankingLoss(model, mini_batch_tokens=limit, **settings)([features], labels)

    wanted = (loss_of(encoder, dimensions=[8]) + loss_of(alone, dimensions=[8])) / 2
    gradients = []
    for limit in (None, 30):
        encoder.zero_grad()
        with depths(encoder, [1]):
            found = loss_of(encoder, limit, dimensions=[8], depths=2)
            found.backward()
        torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-4, atol=1e-5)
        gradients.append({n: p.grad.clone() for n, p in encoder.named_parameters()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-3, atol=1e-5)


def recipe_of(base, tmp_path, model=(), **stage):
    rows = [{"query": f"question {i}", "positive": f"answer {i}"} for i in range(24)]
    write_text(tmp_path / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    given = {"steps": 2, "batch_size": 4, "held_out": 4, "warmup_steps": 0, "max_length": 16}
    given |= {"data": str(tmp_path / "pairs.jsonl"), "lora": {"rank": 2}, **stage}
    model = {"base": str(base), "max_length": 32, **dict(model)}
    return Recipe.model_validate({"name": "t", "model": model, "supervised": given})


def test_a_recipe_trains_first_layers_and_keeps_them(tiny_decoder, tmp_path):
    recipe = recipe_of(tiny_decoder, tmp_path, {"layers": 1})
    encoder = Run(recipe, tmp_path / "run").run()
    assert len(encoder.backbone.auto_model.layers) == 1
    saved = LLM2Vec.from_pretrained(tmp_path / "run" / "model")
    np.testing.assert_allclose(saved.encode(TEXTS), encoder.encode(TEXTS), rtol=1e-5, atol=1e-6)


def test_a_recipe_trains_every_depth(tiny_decoder, tmp_path):
    recipe = recipe_of(tiny_decoder, tmp_path, matryoshka=[8], matryoshka_layers=[1])
    encoder = Run(recipe, tmp_path / "run").run()
    assert encoder.encode(TEXTS).shape == (2, 32)


@pytest.mark.parametrize(
    ("model", "stage", "said"),
    [
        ({"layers": 3}, {}, "layers 3: .* has 2 layers"),
        ({}, {"matryoshka_layers": [2]}, "matryoshka_layers: 2 given, but the model has 2"),
    ],
)
def test_layers_that_do_not_fit_a_recipe_leave_nothing_behind(
    tiny_decoder, tmp_path, model, stage, said
):
    with pytest.raises((ModelError, RecipeError), match=said):
        Run(recipe_of(tiny_decoder, tmp_path, model, **stage), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_every_part_that_is_asked_for_is_cut_as_it_says(tiny_decoder):
    found = []
    for cut, encoder in cut_encoders(str(tiny_decoder), [1], [8, 16]):
        found.append((cut.layers, cut.dimensions, cut.compute, cut.bytes))
        assert encoder.encode(TEXTS).shape == (2, cut.dimensions)
        assert len(encoder.backbone.auto_model.layers) == cut.layers
    assert found == [
        (2, 32, 1.0, 128), (2, 16, 1.0, 64), (2, 8, 1.0, 32),
        (1, 32, 0.5, 128), (1, 16, 0.5, 64), (1, 8, 0.5, 32),
    ]  # fmt: skip


@pytest.mark.parametrize(("layers", "dimensions"), [([3], []), ([], [33]), ([0], [])])
def test_parts_that_are_not_there_are_refused_before_any_is_scored(
    tiny_decoder, layers, dimensions
):
    with pytest.raises(DataError, match="has (2|32). Fix: a number from 1 to"):
        next(cut_encoders(str(tiny_decoder), layers, dimensions))
