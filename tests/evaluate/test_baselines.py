"""The causal decoder behind an encoder."""

from __future__ import annotations

import json
import shutil

import pytest

from unmasked import LLM2Vec
from unmasked.checkpoint.card import Card
from unmasked.checkpoint.location import bundled_path, locate
from unmasked.compat.origin import find_base
from unmasked.errors import ModelError
from unmasked.evaluate.baselines import causal_baselines
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
        assert find_base(str(name)).name == str(tiny_decoder)


def test_a_card_names_the_decoder_if_that_is_on_the_hub_or_bundled(tmp_path, tiny_decoder):
    bases = {"public": "owner/decoder", "private": str(tiny_decoder), "bundled": "nano"}
    for name, base in bases.items():
        folder = tmp_path / name
        LLM2Vec.from_pretrained(tiny_decoder, device="cpu").save(folder, card=Card(base))
    assert find_base(tmp_path / "public").name == "owner/decoder"
    assert find_base(tmp_path / "private").name == str(tmp_path / "private")
    assert find_base(tmp_path / "bundled").name == str(bundled_path())


def test_a_recipe_beside_a_decoder_says_nothing_about_it(tmp_path, tiny_decoder):
    (tmp_path / "recipe.yaml").write_text("name: x\nmodel: {base: elsewhere}\n")
    own = tmp_path / "decoder"
    shutil.copytree(tiny_decoder, own)
    assert find_base(own).name == str(own)
    shutil.copytree(tiny_decoder, tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text("no recipe: at all\n")
    assert find_base(tmp_path / "model").name == str(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(f"name: x\nmodel: {{base: {tmp_path / 'model'}}}\n")
    assert find_base(tmp_path / "model").name == str(tmp_path / "model"), "a circle ends"


def test_a_revision_is_kept_on_the_way(tmp_path):
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    recipe = Recipe(name="x", model=Model(base="owner/decoder", revision="abc"))
    (model.parent / "recipe.yaml").write_text(recipe_text(recipe), encoding="utf-8")
    found = find_base(model)
    assert (found.name, found.hub) == ("owner/decoder", {"revision": "abc"})


def test_baselines_are_causal_and_have_the_poolings_of_the_paper(tmp_path, tiny_decoder):
    made = {name: make() for name, make in causal_baselines(locate(tiny_decoder))}
    assert list(made) == ["causal_mean", "causal_weighted_mean", "causal_last_token"]
    assert [model.pooling_mode for model in made.values()] == [
        "mean",
        "weighted_mean",
        "last_token",
    ]
    assert {model.report.verdict for model in made.values()} == {"impossible"}

    LLM2Vec.from_pretrained(tiny_decoder, device="cpu").save(tmp_path / "open")
    _, make = next(causal_baselines(locate(tmp_path / "open")))
    with pytest.raises(ModelError, match=r"open has no causal mask any more.*Fix: .* --base"):
        make()
