"""Lists and describes the settings of a recipe.

Everything here is read from the schema itself: the text below a setting is its description. Cost:
importing the schema.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from unmasked.errors import RecipeError, unknown
from unmasked.recipe.schema import Recipe

WIDTH = 96
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}
_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "boolean": "true or false",
    "array": "a list",
    "null": "null",
}
Field = Mapping[str, Any]  # a field of the schema, in JSON Schema


@dataclass(frozen=True)
class Setting:
    """One setting, or a section of settings."""

    name: str  # the full name, such as ``mntp.learning_rate``
    about: str  # its description, in one line
    default: str  # in YAML; empty if it must be given
    allowed: str  # the allowed values, in words
    section: bool  # whether it is a section of settings

    @property
    def values(self) -> str:
        """The allowed values and the default."""
        return f"{self.allowed}; {f'default {self.default}' if self.default else 'must be given'}"


def settings(below: str = "") -> list[Setting]:
    """All settings of a recipe, or those at and below a name, in the order of the schema.

    Raises:
        RecipeError: there is no such setting.
    """
    every = list(_walk(_schema()["properties"], ()))
    if not below:
        return every
    found = [s for s in every if s.name == below or s.name.startswith(f"{below}.")]
    if not found:
        raise RecipeError(_unknown(below, [setting.name for setting in every]))
    return found


def takes_list(place: Sequence[str]) -> bool:
    """Whether the setting with this path of keys is a list."""
    field = section_at(place[:-1]).get(place[-1], {})
    return any(kind.get("type") == "array" for kind in _alternatives(field))


def section_at(place: Sequence[str | int]) -> Mapping[str, Field]:
    """The fields of the section with this path of keys; empty if there is no such section."""
    fields: Mapping[str, Field] = _schema()["properties"]
    for key in place:
        if isinstance(key, str):  # a number is an index into the list before it
            fields = _inside(fields.get(key, {}))
    return fields


def explained(text: str) -> str:
    """A recipe in YAML, with the description of each setting as a comment above it."""
    known = {setting.name: setting for setting in settings()}
    lines: list[str] = []
    above: list[tuple[int, str]] = []  # indent and name of the sections that contain a line
    for line in text.splitlines():
        bare = line.strip()
        key = bare.partition(":")[0]
        indent = len(line) - len(line.lstrip())
        if bare and not bare.startswith(("#", "-")) and ":" in bare:
            above = [(at, name) for at, name in above if at < indent]
            setting = known.get(".".join([*(name for _, name in above), key]))
            above.append((indent, key))
            if setting is not None:
                remark = "" if setting.section else f" ({setting.values})"
                lead = f"{' ' * indent}# "
                lines += textwrap.wrap(
                    f"{setting.about}{remark}", WIDTH, initial_indent=lead, subsequent_indent=lead
                )
        lines.append(line)
    return "\n".join(lines) + "\n"


def _walk(section: Mapping[str, Field], above: tuple[str, ...]) -> Iterator[Setting]:
    for key, field in section.items():
        name, is_section = ".".join((*above, key)), any(map(_is_section, _alternatives(field)))
        about = " ".join(field.get("description", "").replace("``", "").split())
        default = "" if is_section or "default" not in field else _in_yaml(field["default"])
        allowed = " or ".join(map(_allowed, _alternatives(field)))
        yield Setting(name, about, default, allowed, is_section)
        yield from _walk(_inside(field), (*above, key))


@cache
def _schema() -> Field:
    return Recipe.model_json_schema()


def _alternatives(field: Field) -> list[Field]:
    """The alternative types of a field; that of a section has ``properties``."""
    kinds = field.get("anyOf", [field])
    sections = _schema()["$defs"]
    return [sections[k["$ref"].rpartition("/")[2]] if "$ref" in k else k for k in kinds]


def _is_section(kind: Field) -> bool:
    return "properties" in kind


def _inside(field: Field) -> Mapping[str, Field]:
    """The fields of the section in a field, or of the sections in its list."""
    kinds = _alternatives(field)
    items = (item for kind in kinds if "items" in kind for item in _alternatives(kind["items"]))
    return next((kind["properties"] for kind in (*kinds, *items) if _is_section(kind)), {})


def _in_yaml(value: Any) -> str:
    written = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return str(written).replace("...", "").strip()


def _allowed(kind: Field) -> str:
    """The allowed values of a type, in words."""
    if _is_section(kind):
        return "a section"
    if "enum" in kind:
        return ", ".join(kind["enum"])
    if kind["type"] == "object":
        return "names and values"
    bounds = " and ".join(f"{said} {kind[name]}" for name, said in _BOUNDS.items() if name in kind)
    further = "that is not empty" if "minLength" in kind else bounds
    return f"{_KINDS[kind['type']]} {further}".strip()


def _unknown(name: str, every: Sequence[str]) -> str:
    """The message for an unknown setting: compared with its section, or with the sections.

    A name without its section is compared with the settings of that name.
    """
    if inside := [other for other in every if other.endswith(f".{name}")]:
        return unknown("setting", name, inside)
    section = name.rpartition(".")[0]
    siblings = [other for other in every if other.rpartition(".")[0] == section]
    top_level = [other for other in every if "." not in other]
    return unknown("setting", name, siblings or top_level)
