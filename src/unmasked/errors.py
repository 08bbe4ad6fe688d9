"""Every error that a user can meet, each with the fix in its message.

    UnmaskedError
    ├── RecipeError            a recipe key or value
    ├── DataError              a file of texts, pairs or scores; names file and line
    ├── ModelError             a model folder, its tokenizer, its adapter
    │   └── NotBidirectionalError    the proof failed; carries the report
    ├── OutputError            an output path
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
    """Base class of every error that the user can correct.

    It is pickled without calling its constructor, whose arguments differ between subclasses. A
    pool of workers would wait forever for an error that cannot be unpickled.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.args, vars(self))


def _rebuilt(kind: Any, args: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(attributes)
    return error


class RecipeError(UnmaskedError, ValueError):
    """A recipe has an unknown key or a value that cannot be used."""


class DataError(UnmaskedError, ValueError):
    """A data file or an input cannot be used for what it was given for."""


class ModelError(UnmaskedError, ValueError):
    """A model folder, tokenizer or adapter cannot be used."""


class NotBidirectionalError(ModelError):
    """The forward pass shows that some layer still hides the tokens to the right.

    Attributes:
        report: the failed `unmasked.mask.proof.Proof`.
    """

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report


class OutputError(UnmaskedError, OSError):
    """The output path already exists, belongs to something else or cannot be written."""

    def __str__(self) -> str:
        return str(self.args[0])


class MissingExtraError(UnmaskedError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Fix: {pip_install(extra)}")


def pip_install(extra: str) -> str:
    """The command that installs this package with an extra, from where it was installed."""
    origin = origin_of_package()
    requirement = f"unmasked[{extra}]"
    if origin.startswith("git+"):
        requirement = f"{requirement} @ {origin}"
    elif not origin.startswith("http"):
        requirement = f"{origin}[{extra}]"
    return f"pip install {shlex.quote(requirement)}"


def origin_of_package() -> str:
    """Where this package was installed from: a source folder, a ``git+`` address, or its web page.

    pip records the origin of everything that does not come from an index (PEP 610). If the package
    runs without being installed, this file is in its source tree.
    """
    source_tree = Path(__file__).resolve().parents[2]
    try:
        recorded = json.loads(distribution("unmasked").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return str(source_tree)
    url = str(recorded.get("url", ""))
    if "vcs_info" in recorded:
        return f"{recorded['vcs_info'].get('vcs', 'git')}+{url}"
    if url.startswith("file:"):
        return url2pathname(urlparse(url).path)
    return url or "https://pypi.org/project/unmasked"


def nearest(given: str | Sequence[str], allowed: Iterable[str], end: str = ".") -> str:
    """The end of a sentence about an unknown word: ``, did you mean 'x'?``, or else `end`.

    Args:
        given: the unknown word, or several: the closest match of any of them counts.
        allowed: the words to compare it with; of equally similar ones, the first is named.
        end: returned if no allowed word is similar.
    """

    def similarity(word: str) -> float:
        others = [given] if isinstance(given, str) else given
        pairs = [(word.casefold(), other.casefold()) for other in others]
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    best = max(allowed, key=similarity, default="")
    return f", did you mean '{best}'?" if similarity(best) >= 0.6 else end


def unknown(what: str, given: object, allowed: Iterable[str]) -> str:
    """The message for a word, or a value of another kind, that is not one of the allowed words."""
    given, allowed = str(given), list(allowed)
    message = f"unknown {what} '{given}'{nearest(given, allowed)}"
    if not allowed:
        return f"{message} There is none. Fix: leave it out."
    return f"{message} Allowed: {', '.join(allowed)}. Fix: give one of these."


def no_such_path(path: str | Path) -> str:
    """The message for a path that does not exist, with the most similar name in its folder."""
    missing = Path(path)
    siblings = [p.name for p in missing.parent.iterdir()] if missing.parent.is_dir() else []
    fix = f"check the path, from {Path.cwd()}"
    if str(path).startswith("~/"):  # a quoted path, which the shell did not expand
        fix = f"give {missing.expanduser()}"
    return f"{path} is not a file or folder{nearest(missing.name, siblings)} Fix: {fix}."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
