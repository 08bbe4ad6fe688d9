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
import json
import shlex
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname


class UnmaskedError(Exception):
    """Base of every error that the user, rather than the program, can correct.

    It comes back whole from another process, whatever its constructor takes: an error that cannot
    be read there leaves a pool of workers waiting for ever.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (type(self), self.args, vars(self))


def _made_again(kind: Any, args: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(attributes)
    return error


class RecipeError(UnmaskedError, ValueError):
    """A recipe has an unknown key or a value that cannot be used."""


class DataError(UnmaskedError, ValueError):
    """A data file cannot be read as what it was given as."""


class ModelError(UnmaskedError, ValueError):
    """A model folder, tokenizer or adapter cannot be used."""


class NotBidirectionalError(ModelError):
    """The forward pass shows that some layer still hides the tokens to the right.

    Attributes:
        report: the `unmasked.mask.proof.Proof` that shows it.
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
        super().__init__(f"{package} is not installed. Fix: {pip_install(extra)}")


def pip_install(extra: str) -> str:
    """The command that installs this package with an extra, from where it came."""
    origin = origin_of_package()
    what = f"unmasked[{extra}]"
    if origin.startswith("git+"):
        what = f"{what} @ {origin}"
    elif not origin.startswith("http"):
        what = f"{origin}[{extra}]"
    return f"pip install {shlex.quote(what)}"


def origin_of_package() -> str:
    """Where this package was installed from: the folder of a source tree, ``git+...``, or its page.

    pip notes it for everything that is not from an index (PEP 610). A package that runs without
    having been installed is in the tree above this file.
    """
    here = Path(__file__).resolve().parents[2]
    try:
        noted = json.loads(distribution("unmasked").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return str(here)
    url = str(noted.get("url", ""))
    if "vcs_info" in noted:
        return f"{noted['vcs_info'].get('vcs', 'git')}+{url}"
    if url.startswith("file:"):
        return url2pathname(urlparse(url).path)
    return url or "https://pypi.org/project/unmasked"


def nearest(given: str | Sequence[str], allowed: Iterable[str], end: str = ".") -> str:
    """The end of a sentence about an unknown word: ``, did you mean 'x'?``, or else `end`.

    Args:
        given: the unknown word, or several that would do.
        allowed: the words of which the most similar one is named.
        end: what is returned if none of them is similar.
    """

    def likeness(word: str) -> float:
        several = [given] if isinstance(given, str) else given
        words = [(word.casefold(), one.casefold()) for one in several]
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in words)

    best = max(allowed, key=likeness, default="")  # the first of those that are alike
    return f", did you mean '{best}'?" if likeness(best) >= 0.6 else end


def unknown(what: str, given: str, allowed: Iterable[str]) -> str:
    """The message for a word that is not one of the allowed ones."""
    allowed = list(allowed)
    said = f"unknown {what} '{given}'{nearest(given, allowed)}"
    if not allowed:
        return f"{said} There is none. Fix: leave it out."
    return f"{said} Allowed: {', '.join(allowed)}. Fix: give one of these."


def no_such_path(path: str | Path) -> str:
    """The message for a path where nothing is, with the most similar name in its folder."""
    place = Path(path)
    siblings = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
    fix = f"check the path, from {Path.cwd()}"
    fix = f"give {place.expanduser()}" if str(path).startswith("~/") else fix
    return f"{path} is not a file or folder{nearest(place.name, siblings)} Fix: {fix}."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
