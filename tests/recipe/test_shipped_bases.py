"""The bases of the shipped recipes, built from their sizes with the config classes of today.

Nothing is fetched: `scripts/decoder_sizes.yaml` has the sizes, `unmasked plan` counts them, and the
mask is opened on a miniature of each family.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from unmasked.checkpoint.loading import load_config
from unmasked.doctor.miniature import miniature
from unmasked.mask.opening import open_config
from unmasked.mask.proof import open_mask
from unmasked.recipe.files import load_recipe, shipped_recipes
from unmasked.train.plan.shapes import DecoderSizes

SCRIPT = Path(__file__).parents[2] / "scripts" / "recipes.py"
PAGE = SCRIPT.parents[1] / "docs" / "recipes.md"


def loaded():
    spec = importlib.util.spec_from_file_location("recipes_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = loaded()
BASES = {load_recipe(name).model.base: name for name in shipped_recipes()}
FAMILIES = {sizes["model_type"]: base for base, sizes in script.SIZES.items()}


def test_every_base_has_its_sizes_and_no_other():
    assert set(script.SIZES) == set(BASES) - {"nano", "runs/demo/model"}


@pytest.mark.parametrize("base", script.SIZES)
def test_a_base_has_the_parameters_that_its_page_gives(base, tmp_path):
    config = load_config(script.config_folder(base, tmp_path / "base"))
    sizes = DecoderSizes(config, torch.bfloat16)
    published = script.SIZES[base]["published"]
    assert (sizes.parameters + sizes.head) / 1e9 == pytest.approx(published, rel=0.04)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_of_each_family_is_planned_and_its_mask_opens(family, tmp_path):
    name = BASES[FAMILIES[family]]
    plan = script.plan_without_weights(name, tmp_path / "base")
    assert [stage.name for stage in plan.stages] == [n for n, _ in load_recipe(name).stages()]
    assert all(stage.memory.activations > 0 and stage.flops > 0 for stage in plan.stages)
    config = miniature(load_config(tmp_path / "base"))
    assert config.model_type == family
    torch.manual_seed(0)
    assert open_mask(AutoModel.from_config(open_config(config)).eval()).verdict == "full"


def test_the_page_names_every_recipe_its_licence_and_its_figures():
    page = PAGE.read_text(encoding="utf-8")
    for name in shipped_recipes():
        recipe = load_recipe(name)
        said = f"| `{name}` | {recipe.model.base} | {recipe.model.licence or 'with this package'} |"
        assert said in page
        for anchor in recipe.anchors:
            for trained, score in anchor.scores.items():
                row = f"| {anchor.benchmark} | {trained.replace('_', ' ')} | {score:.2f} |"
                assert row in page
    assert "Written by `python scripts/recipes.py`" in page
