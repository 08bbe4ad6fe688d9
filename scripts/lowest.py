"""Print the lowest version that pyproject.toml allows of each direct dependency, as constraints for pip.

Read from the metadata of the installed package, so that extras are included. What these packages
depend on in turn is left to pip, which takes the newest that fits.
"""

from __future__ import annotations

from importlib.metadata import requires

from packaging.requirements import Requirement


def lowest(name: str = "unmasked") -> list[str]:
    """One ``name==version`` per direct dependency with a lower bound."""
    found = {}
    for requirement in map(Requirement, requires(name) or []):
        bounds = [s.version for s in requirement.specifier if s.operator in (">=", "~=", "==")]
        found |= {requirement.name: bound for bound in bounds}
    return [f"{name}=={version}" for name, version in sorted(found.items())]


if __name__ == "__main__":
    print("\n".join(lowest()))
