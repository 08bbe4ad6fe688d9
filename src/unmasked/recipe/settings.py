"""What can be set in a recipe: the settings of the schema, described one by one.

Everything here is read from the schema itself: the text below a setting is its description. Cost:
importing the schema.
"""

from __future__ import annotations

import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from unmasked.errors import RecipeError, unknown
from unmasked.recipe.schema import Recipe

WIDTH = 96
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class Setting:
    """One setting, or a section of settings.

    Attributes:
        name: ``mntp.learning_rate``.
        about: what it does, in a line.
        default: in YAML; empty if it must be given.
        allowed: which values, in words.
        section: whether settings follow below it.
    """

    name: str
    about: str
    default: str
    allowed: str
    section: bool


def settings(below: str = "") -> list[Setting]:
    """Every setting of a recipe, or those at and below a name, in the order of the schema.

    Raises:
        RecipeError: there is no such setting.
    """
    every = list(_walk(Recipe, ()))
    if not below:
        return every
    found = [one for one in every if one.name == below or one.name.startswith(f"{below}.")]
    if not found:
        raise RecipeError(_unknown(below, [one.name for one in every]))
    return found


def takes_list(place: Sequence[str | int]) -> bool:
    """Whether the setting at a place is a list."""
    section: type[BaseModel] | None = Recipe
    field: FieldInfo | None = None
    for key in place:
        if section is None or str(key) not in section.model_fields:
            return False
        field = section.model_fields[str(key)]
        section = section_of(field) if _is_section(field) else None
    return field is not None and any(get_origin(kind) is list for kind in _kinds(field))


def section_of(field: FieldInfo) -> type[BaseModel]:
    """The section that a field holds, or holds a list of."""
    kinds = (*_kinds(field), *(inner for kind in _kinds(field) for inner in get_args(kind)))
    found: type[BaseModel] = next(kind for kind in kinds if _is_model(kind))
    return found


def explained(text: str) -> str:
    """A recipe in YAML with what each of its settings means above it, as comments."""
    known = {one.name: one for one in settings()}
    lines: list[str] = []
    above: list[tuple[int, str]] = []  # indent and name of the sections that a line is in
    for line in text.splitlines():
        bare = line.strip()
        key = bare.partition(":")[0]
        indent = len(line) - len(line.lstrip())
        if bare and not bare.startswith(("#", "-")) and ":" in bare:
            above = [(at, name) for at, name in above if at < indent]
            one = known.get(".".join([*(name for _, name in above), key]))
            above.append((indent, key))
            if one is not None:
                allowed = "" if one.section else f" ({_remark(one)})"
                lead = f"{' ' * indent}# "
                lines += textwrap.wrap(
                    f"{one.about}{allowed}", WIDTH, initial_indent=lead, subsequent_indent=lead
                )
        lines.append(line)
    return "\n".join(lines) + "\n"


def _remark(one: Setting) -> str:
    return f"{one.allowed}; default {one.default}" if one.default else f"{one.allowed}; no default"


def _walk(section: type[BaseModel], above: tuple[str, ...]) -> Iterator[Setting]:
    for key, field in section.model_fields.items():
        name, inner = ".".join((*above, key)), _is_section(field)
        about = " ".join((field.description or "").replace("``", "").split())
        yield Setting(name, about, "" if inner else _default(field), _allowed(field), inner)
        if inner or _holds_sections(field):
            yield from _walk(section_of(field), (*above, key))


def _is_section(field: FieldInfo) -> bool:
    return any(map(_is_model, _kinds(field)))


def _holds_sections(field: FieldInfo) -> bool:
    return any(_is_model(inner) for kind in _kinds(field) for inner in get_args(kind))


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _kinds(field: FieldInfo) -> tuple[Any, ...]:
    """The types of a field, one by one."""
    return tuple(_bare(kind)[0] for kind in _alternatives(field))


def _alternatives(field: FieldInfo) -> tuple[Any, ...]:
    annotation = field.annotation
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


def _bare(kind: Any) -> tuple[Any, list[Any]]:
    """A type and what is attached to it."""
    if get_origin(kind) is not Annotated:
        return kind, []
    inner, *attached = get_args(kind)
    return inner, [part for item in attached for part in (item, *getattr(item, "metadata", []))]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    written = yaml.safe_dump(field.default, default_flow_style=True, width=1000)
    return str(written).replace("...", "").strip()


def _allowed(field: FieldInfo) -> str:
    """Which values a field takes, in words."""
    said = []
    for alternative in _alternatives(field):
        kind, attached = _bare(alternative)
        if get_origin(kind) is Literal:
            said.append(", ".join(map(str, get_args(kind))))
        elif get_origin(kind) is list:
            said.append("a list")
        elif get_origin(kind) is dict:
            said.append("names and values")
        elif kind is type(None):
            said.append("null")
        else:
            bounds = _bounds([*attached, *field.metadata])
            said.append(f"{_KINDS.get(kind, 'a section')} {bounds}".strip())
    return " or ".join(said)


def _bounds(attached: Sequence[Any]) -> str:
    """Bounds in words; of two of one kind the later one, which narrows the first."""
    found = {
        words: getattr(item, name)
        for item in attached
        for name, words in _BOUNDS.items()
        if getattr(item, name, None) is not None
    }
    if any(getattr(item, "min_length", None) for item in attached):
        return "that is not empty"
    return " and ".join(f"{words} {bound}" for words, bound in found.items())


def _unknown(name: str, every: Sequence[str]) -> str:
    above = name.rpartition(".")[0]
    beside = [one for one in every if one.rpartition(".")[0] == above] if above in every else []
    return unknown("setting", name, beside or [one for one in every if "." not in one])
