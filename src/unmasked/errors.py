"""Every error a user can meet, each with the fix in its message.

    UnmaskedError
    ├── RecipeError            a recipe key or value
    ├── DataError              a file of texts, pairs or scores; names file and line
    ├── ModelError             a model folder, its tokenizer, its adapter
    │   └── NotBidirectionalError    the proof failed; carries the report
    ├── OutputError            where to write
    └── MissingExtraError      an optional dependency

The command line prints the message without a traceback and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UnmaskedError(Exception):
    """Base of every error that the user, rather than the program, can correct."""


class RecipeError(UnmaskedError, ValueError):
    """A recipe has an unknown key or a value that cannot be used."""


class DataError(UnmaskedError, ValueError):
    """A data file cannot be read as what it was given as."""


class ModelError(UnmaskedError, ValueError):
    """A model folder, tokenizer or adapter cannot be used."""


class NotBidirectionalError(ModelError):
    """The forward pass shows that some layer still hides the tokens to the right.

    Attributes:
        report: the report of `mask.proof` that shows it.
    """

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report


class OutputError(UnmaskedError, OSError):
    """The place to write to exists already, belongs to something else or cannot be written."""

    def __str__(self) -> str:
        return str(self.args[0])


class MissingExtraError(UnmaskedError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Fix: pip install 'unmasked[{extra}]'")


def nearest(given: str, allowed: Iterable[str], end: str = ".") -> str:
    """The end of a sentence about an unknown word: ``, did you mean 'x'?``, or else `end`.

    Args:
        given: the unknown word.
        allowed: the words of which the most similar one is named.
        end: what is returned if none of them is similar.
    """
    matches = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f", did you mean '{matches[0]}'?" if matches else end


def unknown(what: str, given: str, allowed: Iterable[str]) -> str:
    """The message for a word that is not one of the allowed ones."""
    allowed = list(allowed)
    return f"unknown {what} '{given}'{nearest(given, allowed)} Allowed: {', '.join(allowed)}."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
