"""Chat templates around a text, read from `templates.yaml`, and the choice between them.

A template is chosen by the tokenizer's own chat template and vocabulary and never by a model name,
so a copy, a fork or a merged checkpoint gets the same template as its original. A model saved by
this package contains the template itself, not a reference to the table. The cost is one small file,
read once.
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
    """The strings around an instruction and a text.

    Attributes:
        prefix: put before the instruction, or before the text without one; never pooled.
        suffix: put after the text.
        joint: put after an instruction that does not end in white space. A newline keeps the border
            to the text in every tokenizer; a space, which the published models use, merges with the
            first word of the text.
        pool_suffix: whether the suffix is pooled with the text.

    Raises:
        ModelError: a value of another kind.
    """

    prefix: str = ""
    suffix: str = ""
    joint: str = "\n"
    pool_suffix: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            kind = bool if name == "pool_suffix" else str
            if not isinstance(value, kind):
                allowed = "true or false" if kind is bool else 'a text, such as ""'
                raise ModelError(
                    f"template: {name} {value!r} is not {allowed}. "
                    "Fix: one of these, in llm2vec_config.json or as the argument."
                )

    def join(self, instruction: str) -> str:
        """The prompt for an instruction: with the joint, unless it ends in white space."""
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
    """The template with a name in `templates.yaml`, or ``none``.

    Raises:
        ModelError: no template has that name.
    """
    if name == "none":
        return PLAIN
    if name not in shipped():
        raise ModelError(unknown("template", name, [*shipped(), "none"]))
    return read_template(shipped()[name])


def detect(chat_template: Any, vocabulary: Mapping[str, int]) -> Template | None:
    """The template of a tokenizer; None if no row of `templates.yaml` matches it.

    Args:
        chat_template: the tokenizer's own: a string, several by name, or None.
        vocabulary: token → id.
    """
    text = str(chat_template or "")
    for row in shipped().values():
        has_all = all(token in text for token in row["needs"])
        if has_all and not any(token in vocabulary for token in row["lacks"]):
            return read_template(row)
    return None


def read_template(given: Template | Mapping[str, Any] | str | None) -> Template:
    """A template from itself, from a mapping (saved, or a row), or from its name; None: `PLAIN`.

    Raises:
        ModelError: no template has that name, or it is something else.
    """
    if isinstance(given, Template):
        return given
    if not isinstance(given, Mapping | None):
        return named(str(given))
    names = {field.name for field in fields(Template)}
    return Template(**{name: value for name, value in (given or {}).items() if name in names})
