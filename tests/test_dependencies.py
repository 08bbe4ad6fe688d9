"""What pyproject.toml declares is what the package imports, and constraints.txt fits to it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import metadata, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
TOOLS = ("dev", "docs")
"""Extras of programs that are run beside the package and not imported by it."""
DIRECT = [
    *PROJECT["dependencies"],
    *(requirement for name in EXTRAS if name not in TOOLS for requirement in EXTRAS[name]),
]
SOURCES = {
    file: file.read_text(encoding="utf-8") for file in (ROOT / "src" / "unmasked").rglob("*.py")
}

UNDECLARED = {
    "flash-attn": None,  # installed by hand: each build of it is made for one version of torch
    "huggingface-hub": "transformers",
    "packaging": "transformers",
    "safetensors": "transformers",
    "threadpoolctl": "scikit-learn",
    "tokenizers": "transformers",
    "tqdm": "transformers",
    "typing-extensions": "torch",
}
"""Imported and not declared, because what is named here brings it."""


def names_of(requirements: list[str]) -> set[str]:
    """Distributions by their canonical names, without those of an extra of another package."""
    read = (Requirement(given) for given in requirements)
    return {canonicalize_name(r.name) for r in read if "extra" not in str(r.marker or "")}


def imported() -> dict[str, str]:
    """Canonical name of every distribution that a file imports → one of its files."""
    found = {}
    homes = packages_distributions()
    for file, text in SOURCES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for module in {name.partition(".")[0] for name in modules} - {"unmasked"}:
                if module not in sys.stdlib_module_names:
                    found[canonicalize_name(homes.get(module, [module])[0])] = file.name
    return found


def test_b53_what_is_imported_is_declared():
    used, declared = imported(), names_of(DIRECT)
    assert {"torch", "pyyaml", "scikit-learn"} <= used.keys()
    assert {name: file for name, file in used.items() if name not in declared} == {
        name: used.get(name) for name in UNDECLARED
    }
    for name, home in UNDECLARED.items():
        assert home is None or (home in declared and name in names_of(requires(home)))


@pytest.mark.parametrize("name", sorted(names_of(DIRECT)))
def test_what_is_declared_is_used(name):
    """Imported, or called by its name, as trackers are."""
    named = re.compile(rf"""["']{name}["']""")
    assert name in imported() or any(named.search(text) for text in SOURCES.values())


def test_the_tested_versions_are_allowed_ones():
    """Each of what `make install` installs is in constraints.txt, within its bounds."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in (Requirement(line) for line in lines if line and line[0] != "#")
    }
    own = f"{PROJECT['name']}["
    (extras,) = (given.removeprefix(own)[:-1].split(",") for given in EXTRAS["dev"] if own in given)
    wanted = [*PROJECT["dependencies"], *(r for name in ["dev", *extras] for r in EXTRAS[name])]
    for requirement in (Requirement(given) for given in wanted if own not in given):
        pinned = pins[canonicalize_name(requirement.name)]
        assert Version(pinned) in requirement.specifier, requirement


def test_every_dependency_has_a_lowest_version():
    """What `make test-lowest` installs; without a bound it would be the newest."""
    for given in [*DIRECT, *(r for name in TOOLS for r in EXTRAS[name])]:
        requirement = Requirement(given)
        if requirement.name != PROJECT["name"]:
            assert [s.operator for s in requirement.specifier].count(">=") == 1, given


def test_the_lowest_python_is_one_that_the_tested_versions_take():
    """Otherwise pip finds no version of a dependency there, and refuses to install anything."""
    (lowest,) = re.findall(r"^>=(\d+\.\d+)$", PROJECT["requires-python"])
    for name in names_of(PROJECT["dependencies"]):
        assert f"{lowest}.99" in SpecifierSet(metadata(name)["Requires-Python"] or ""), name
    for page in ("README.md", "README.ko.md", "Makefile"):
        assert f"Python {lowest}" in (ROOT / page).read_text(encoding="utf-8"), page
    assert f"< ({lowest.replace('.', ', ')})" in (ROOT / "Makefile").read_text(encoding="utf-8")
