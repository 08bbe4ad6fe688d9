"""What the package shows: its public names, and what a first import costs."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import unmasked

HEAVY = {"torch", "transformers", "sentence_transformers", "peft", "datasets", "accelerate"}


def heavy_modules_after(code: str) -> set[str]:
    """The heavy libraries that a fresh interpreter has loaded once ``code`` has run."""
    report = "\nimport sys; print('loaded:', *sorted(n for n in sys.modules if '.' not in n))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
    )
    *_, last = done.stdout.splitlines()
    assert last.startswith("loaded:")
    return HEAVY & set(last.split())


def test_public_names():
    assert unmasked.__all__ == ["LLM2Vec", "Recipe", "__version__"]
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


def test_command_line_help_loads_nothing_heavy():
    code = """
import sys
sys.argv = ["unmasked", "--help"]
from unmasked.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    assert heavy_modules_after(code) == set()
