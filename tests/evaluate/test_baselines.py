"""The causal decoder behind an encoder."""

from __future__ import annotations

import json

import pytest

from unmasked import LLM2Vec
from unmasked.errors import ModelError
from unmasked.evaluate.baselines import causal_baselines, find_base
from unmasked.recipe.files import recipe_text
from unmasked.recipe.schema import Model, Recipe


def test_the_base_is_found_through_adapters_and_run_folders(tmp_path, tiny_decoder):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_decoder)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    recipe = Recipe(name="x", model=Model(base=str(adapter)))
    (model.parent / "recipe.yaml").write_text(recipe_text(recipe), encoding="utf-8")
    for name in (tiny_decoder, adapter, model):
        assert find_base(str(name)) == str(tiny_decoder)


def test_baselines_are_causal_and_have_the_poolings_of_the_paper(tmp_path, tiny_decoder):
    made = {name: make() for name, make in causal_baselines(str(tiny_decoder))}
    assert list(made) == ["causal_mean", "causal_weighted_mean", "causal_last_token"]
    assert [model.pooling_mode for model in made.values()] == [
        "mean",
        "weighted_mean",
        "last_token",
    ]
    assert {model.report.verdict for model in made.values()} == {"impossible"}

    LLM2Vec.from_pretrained(tiny_decoder, device="cpu").save(tmp_path / "open")
    _, make = next(causal_baselines(str(tmp_path / "open")))
    with pytest.raises(ModelError, match=r"open has no causal mask any more.*Fix: .* --base"):
        make()
