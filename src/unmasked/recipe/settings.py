"""Lists and describes the settings of a recipe.

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
        name: the full name, such as ``mntp.learning_rate``.
        about: its description, in one line.
        default: in YAML; empty if it must be given.
        allowed: the allowed values, in words.
        section: whether it is a section of settings.
    """

    name: str
    about: str
    default: str
    allowed: str
    section: bool


def settings(below: str = "") -> list[Setting]:
    """All settings of a recipe, or those at and below a name, in the order of the schema.

    Raises:
        RecipeError: there is no such setting.
    """
    every = list(_walk(Recipe, ()))
    if not below:
        return every
    found = [s for s in every if s.name == below or s.name.startswith(f"{below}.")]
    if not found:
        raise RecipeError(_unknown(below, [setting.name for setting in every]))
    return found


def takes_list(place: Sequence[str | int]) -> bool:
    """Whether the setting with this path of keys is a list."""
    section: type[BaseModel] | None = Recipe
    field: FieldInfo | None = None
    for key in place:
        if section is None or str(key) not in section.model_fields:
            return False
        field = section.model_fields[str(key)]
        section = section_of(field) if _is_section(field) else None
    return field is not None and any(get_origin(kind) is list for kind in _kinds(field))


def section_of(field: FieldInfo) -> type[BaseModel]:
    """The section in a field, or the section that a list in a field is made of."""
    kinds = (*_kinds(field), *(inner for kind in _kinds(field) for inner in get_args(kind)))
    section: type[BaseModel] = next(kind for kind in kinds if _is_model(kind))
    return section


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
                remark = "" if setting.section else f" ({_remark(setting)})"
                lead = f"{' ' * indent}# "
                lines += textwrap.wrap(
                    f"{setting.about}{remark}", WIDTH, initial_indent=lead, subsequent_indent=lead
                )
        lines.append(line)
    return "\n".join(lines) + "\n"


def _remark(setting: Setting) -> str:
    default = f"default {setting.default}" if setting.default else "no default"
    return f"{setting.allowed}; {default}"


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
    """The alternative types of a field, without what is attached to them."""
    return tuple(_unwrapped(kind)[0] for kind in _alternatives(field))


def _alternatives(field: FieldInfo) -> tuple[Any, ...]:
    annotation = field.annotation
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


def _unwrapped(kind: Any) -> tuple[Any, list[Any]]:
    """A type without `Annotated`, and its annotations."""
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
    """The allowed values of a field, in words."""
    words = []
    for alternative in _alternatives(field):
        kind, annotations = _unwrapped(alternative)
        if get_origin(kind) is Literal:
            words.append(", ".join(map(str, get_args(kind))))
        elif get_origin(kind) is list:
            words.append("a list")
        elif get_origin(kind) is dict:
            words.append("names and values")
        elif kind is type(None):
            words.append("null")
        else:
            bounds = _bounds([*annotations, *field.metadata])
            words.append(f"{_KINDS.get(kind, 'a section')} {bounds}".strip())
    return " or ".join(words)


def _bounds(annotations: Sequence[Any]) -> str:
    """Bounds in words; of two bounds of one kind the later one, which is the narrower."""
    found = {
        words: getattr(item, name)
        for item in annotations
        for name, words in _BOUNDS.items()
        if getattr(item, name, None) is not None
    }
    if any(getattr(item, "min_length", None) for item in annotations):
        return "that is not empty"
    return " and ".join(f"{words} {bound}" for words, bound in found.items())


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
