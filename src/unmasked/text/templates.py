"""What stands around a text, as data: `templates.yaml` read, chosen, and saved with the model.

A template is chosen by what a tokenizer says of itself (its chat template and its vocabulary), so a
copy, a fork or a merged checkpoint gets the one its original got; a name decides nothing. A model
saved by this package carries the template itself, not a reference to the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from unmasked.errors import ModelError, unknown

LLM2VEC = "llm2vec-0.2"
"""The preprocessing of the original package, versions 0.2.x."""

Compat = Literal["llm2vec-0.2"]


@dataclass(frozen=True)
class Template:
    """What stands around an instruction and a text.

    Attributes:
        prefix: before the instruction, or before the text without one; never pooled.
        suffix: behind the text.
        joint: ends an instruction that does not end in white space. A newline keeps the border to
            the text in every tokenizer; a space, which the published models use, merges into the
            text's first word.
        pool_suffix: whether the suffix is pooled with the text.
    """

    prefix: str = ""
    suffix: str = ""
    joint: str = "\n"
    pool_suffix: bool = True

    def join(self, instruction: str) -> str:
        """The prompt of an instruction: itself and the joint, unless it ends in white space."""
        if not instruction or instruction[-1].isspace():
            return instruction
        return instruction + self.joint

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


PLAIN = Template()
"""No template: the instruction, a newline, the text."""
PUBLISHED = Template(joint=" ")
"""What published checkpoints without a template were made with."""


@lru_cache(maxsize=1)
def table() -> dict[str, dict[str, Any]]:
    """The shipped templates by name."""
    text = (files("unmasked.text") / "templates.yaml").read_text(encoding="utf-8")
    content: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return content


def named(name: str) -> Template:
    """A shipped template, or ``none``.

    Raises:
        ModelError: there is none of that name.
    """
    if name == "none":
        return PLAIN
    if name not in table():
        raise ModelError(unknown("template", name, [*table(), "none"]))
    return _template(table()[name])


def detect(chat_template: Any, vocabulary: Mapping[str, int]) -> Template | None:
    """The template of a tokenizer.

    Args:
        chat_template: the tokenizer's own, a string, several by name, or None.
        vocabulary: token → id.

    Returns:
        None if no shipped template is that tokenizer's.
    """
    text = str(chat_template or "")
    for row in table().values():
        if all(token in text for token in row["needs"]) and not any(
            token in vocabulary for token in row["lacks"]
        ):
            return _template(row)
    return None


def read_template(given: Template | Mapping[str, Any] | str | None) -> Template:
    """A template given as itself, as saved, or by name; None is no template."""
    if isinstance(given, Template):
        return given
    if isinstance(given, str):
        return named(given)
    return PLAIN if given is None else _template(given)


def check_compat(compat: str | None) -> str | None:
    """The value itself, or a `ModelError` that names the allowed one."""
    if compat not in (None, LLM2VEC):
        raise ModelError(unknown("compat", str(compat), [LLM2VEC]))
    return compat


def _template(row: Mapping[str, Any]) -> Template:
    names = [field.name for field in fields(Template)]
    return Template(**{name: row[name] for name in names if name in row})
