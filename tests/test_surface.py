"""What the package shows: its public names, and what a first import costs."""

from __future__ import annotations

import importlib.metadata

import pytest
from support.commands import heavy_modules_after

import unmasked


def test_public_names():
    assert unmasked.__all__ == ["LLM2Vec", "Recipe", "__version__", "prove"]
    assert set(unmasked.__all__) <= set(dir(unmasked))
    assert unmasked.Recipe.__module__ == "unmasked.recipe.schema"
    with pytest.raises(AttributeError, match="no attribute 'LLM3Vec'"):
        unmasked.LLM3Vec  # noqa: B018


def test_llm2vec_is_the_models_own():
    assert unmasked.LLM2Vec.__module__ == "unmasked.compat.llm2vec"


def test_version_is_the_installed_one():
    assert importlib.metadata.version("unmasked") == unmasked.__version__


def test_import_loads_nothing_heavy():
    """Neither the package itself nor any file of what is read before a model is there."""
    code = """
import importlib, pkgutil, unmasked, unmasked.errors
for name in ("cli", "files", "recipe"):
    room = importlib.import_module(f"unmasked.{name}")
    for file in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
        importlib.import_module(file.name)
"""
    assert heavy_modules_after(code) == set()
    assert heavy_modules_after("import unmasked, torch") == {"torch"}, "the probe sees nothing"
