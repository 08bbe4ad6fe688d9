"""Turn any decoder-only language model into a text encoder (LLM2Vec, arXiv 2404.05961).

The public names are imported when first used: ``import unmasked`` loads neither torch nor
transformers, which take seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unmasked.compat.llm2vec import LLM2Vec
    from unmasked.doctor.proving import prove_model as prove
    from unmasked.recipe.schema import Recipe

__version__ = "0.1.0"
__all__ = ["LLM2Vec", "Recipe", "__version__", "prove"]

_HOMES = {
    "LLM2Vec": ("unmasked.compat.llm2vec", "LLM2Vec"),
    "Recipe": ("unmasked.recipe.schema", "Recipe"),
    "prove": ("unmasked.doctor.proving", "prove_model"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'unmasked' has no attribute '{name}'")
    home, own_name = _HOMES[name]
    return getattr(import_module(home), own_name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
