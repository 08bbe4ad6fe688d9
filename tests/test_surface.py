"""What the package shows: its public names, what a first import costs, and its extras."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import unmasked

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]

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


def test_every_extra_has_code():
    """Its packages are imported somewhere, or named there for a library that imports them."""
    used: set[str] = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                used.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.add(node.value)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert {"eval", "report", "corpus", "dev"} <= extras.keys()
    dead = {
        f"{extra}: {name}"
        for extra, listed in extras.items()
        for name in (Requirement(line).name for line in listed)
        if extra != "dev" and name not in used
    }
    assert dead == set()
