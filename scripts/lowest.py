"""The lowest version that pyproject.toml allows of each direct dependency, as constraints for pip.

    python scripts/lowest.py > constraints.lowest.txt

They come from the metadata of the installed package, extras included. What these packages depend
on in turn is left to pip, which takes the newest that fits. `make test-lowest` tests with them.
"""

from __future__ import annotations

from importlib.metadata import requires

from packaging.requirements import Requirement


def lowest(package: str = "unmasked") -> dict[str, str]:
    """The lower bound of each dependency; one without is left out."""
    return {
        requirement.name: bound.version
        for requirement in map(Requirement, requires(package) or [])
        for bound in requirement.specifier
        if bound.operator == ">="
    }


if __name__ == "__main__":
    for name, version in sorted(lowest().items()):
        print(f"{name}=={version}")
