"""What stands around a text, as data: `templates.yaml` is read here and chosen from.

A template is chosen by what a tokenizer says of itself (its chat template and its vocabulary) and
never by a name, so a copy, a fork or a merged checkpoint gets the template that its original got. A
model saved by this package carries the template itself, not a reference to the table. The cost is
one small file, read once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml

from unmasked.errors import ModelError, unknown


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


PLAIN = Template()
"""No template: the instruction, a newline, the text."""


@lru_cache(maxsize=1)
def shipped() -> dict[str, dict[str, Any]]:
    """The rows of `templates.yaml` by name."""
    text = (files("unmasked.text") / "templates.yaml").read_text(encoding="utf-8")
    content: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return content


def named(name: str) -> Template:
    """The template of a name in `templates.yaml`, or of ``none``.

    Raises:
        ModelError: no template has that name.
    """
    if name == "none":
        return PLAIN
    if name not in shipped():
        raise ModelError(unknown("template", name, [*shipped(), "none"]))
    return read_template(shipped()[name])


def detect(chat_template: Any, vocabulary: Mapping[str, int]) -> Template | None:
    """The template of a tokenizer; None if no row of `templates.yaml` is that tokenizer's.

    Args:
        chat_template: the tokenizer's own: a string, several by name, or None.
        vocabulary: token → id.
    """
    text = str(chat_template or "")
    for row in shipped().values():
        lacking = not any(token in vocabulary for token in row["lacks"])
        if lacking and all(token in text for token in row["needs"]):
            return read_template(row)
    return None


def read_template(given: Template | Mapping[str, Any] | str | None) -> Template:
    """A template given as itself, as a mapping (saved, or a row), or by name; None is `PLAIN`."""
    if isinstance(given, Template):
        return given
    if isinstance(given, str):
        return named(given)
    names = {field.name for field in fields(Template)}
    return Template(**{name: value for name, value in (given or {}).items() if name in names})
