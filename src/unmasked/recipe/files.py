"""Reads and writes recipe files in YAML, applies overrides, and reports errors with their line."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from unmasked.errors import RecipeError, nearest
from unmasked.recipe.schema import Recipe
from unmasked.recipe.settings import section_at, settings, takes_list
from unmasked.recipe.teaching import named_teacher

logger = logging.getLogger(__name__)

Place = tuple[str | int, ...]  # the path of a key: ``("supervised", "data", 0, "path")``
_DEEPEST = 4  # the number of levels of keys whose lines are looked up
_COMMA = re.compile(r",(?![^()]*\))")  # a comma between values, not one inside of ``MTEB(kor, v2)``
_COMMA_OF_PAIRS = re.compile(r",(?!\s*\w+=)")
"""A comma between data sets, not one between the columns of ``FILE:query=a,positive=b``."""


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(__file__).parent / "shipped"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, and check it.

    Args:
        path_or_name: a YAML file, or the name of a shipped recipe, which takes precedence (write
            ``./name`` for a file of that name). Paths inside are relative to the current folder.
        overrides: ``section.key=value`` with the value in YAML: ``mntp.steps=50``,
            ``simcse=null`` to leave a stage out; a list with or without brackets,
            ``mntp.data=a.txt,b.txt``.

    Raises:
        RecipeError: there is no such file, it is not YAML, a key is unknown or a value cannot be
            used. The message names every such key with its line or override.
    """
    path = shipped_recipes().get(str(path_or_name), Path(path_or_name))
    data, lines = _parse(_read(path, str(path_or_name)), path.name)
    places = {place: f"{path.name} line {line}" for place, line in lines.items()}
    return _checked(data, overrides, places, path.name)


def make_recipe(settings: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe for the flags of a command; `overrides` and errors as in `load_recipe`."""
    return _checked(dict(settings), overrides, {}, "from the command line")


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML with all defaults written out; `load_recipe` reads an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def as_published(recipe: Recipe) -> Recipe:
    """The recipe with the published texts in every stage without data."""
    texts: dict[str, list[str]] = {
        str(name): files for name, files in recipe.published_data.items()
    }
    empty = {name: stage for name, stage in recipe.stages() if name in texts and not stage.data}
    filled = {name: s.model_copy(update={"data": texts[name]}) for name, s in empty.items()}
    return recipe.model_copy(update=filled)


def recipe_differences(a: Recipe, b: Recipe) -> list[str]:
    """The changes from ``a`` to ``b``, one line per setting: ``mntp.steps: 100 -> 200``.

    The licence and the published figures and data are left out: they do not change a run.
    """
    notes: Any = {"anchors": True, "published_data": True, "model": {"licence"}}

    def walk(old: Any, new: Any, *keys: object) -> Iterator[str]:
        sides = (old, new)
        if all(isinstance(side, list) for side in sides) and len(old) == len(new) > 0:
            data_sets = all(isinstance(item, dict) for item in (*old, *new))
            old, new = (dict(enumerate(side)) if data_sets else side for side in sides)
        if isinstance(old, dict) and isinstance(new, dict):
            for key in old:
                yield from walk(old[key], new[key], *keys, key)
        elif old != new:
            shown = ["set" if isinstance(value, dict) else value for value in (old, new)]
            yield f"{'.'.join(map(str, keys))}: {shown[0]} -> {shown[1]}"

    return list(walk(a.model_dump(exclude=notes), b.model_dump(exclude=notes)))


def _checked(
    data: dict[str, Any], overrides: Sequence[str], places: dict[Place, str], name: str
) -> Recipe:
    """Apply overrides to settings and check them; `places` says where each key was given."""
    own = {name: dict(section) for name, section in data.items() if isinstance(section, dict)}
    changed: set[Place] = set()
    for override in overrides:
        place = _apply(override, data)
        changed.add(place)
        # The override replaces what the file says at this place and below it.
        places = {p: text for p, text in places.items() if p[: len(place)] != place}
        for end in range(1, len(place) + 1):
            places.setdefault(place[:end], f"override '{override}'")
    _shorten_warmup(data, own, changed)
    if ("model", "base") in changed and ("model", "licence") not in changed:
        data["model"].pop("licence", None)  # the licence of another base
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = [_explain(e, places, name) for e in error.errors(include_url=False)]
        raise RecipeError("\n".join([*problems, *_explained_by(error, problems)])) from None


def _shorten_warmup(
    data: dict[str, Any], own: dict[str, dict[str, Any]], changed: set[Place]
) -> None:
    """Shorten a warm-up that is not shorter than the steps, to a tenth of the steps.

    A warm-up that was given together with the steps stays, and is refused later if it is too long.
    """
    for name in ("mntp", "simcse", "supervised"):
        section = data.get(name)
        if not isinstance(section, dict) or (name, "warmup_steps") in changed:
            continue
        steps_changed = {(name, "steps"), (name, "schedule_steps")} & changed
        given = section if (name,) in changed else own.get(name, {})
        if "warmup_steps" in given and not steps_changed:
            continue
        values = {key: field["default"] for key, field in section_at([name]).items()} | section
        steps, warmup = values["schedule_steps"] or values["steps"], values["warmup_steps"]
        if isinstance(steps, int) and isinstance(warmup, int) and 0 < steps <= warmup:
            data[name] = section | {"warmup_steps": steps // 10}
            logger.warning(
                "%s.warmup_steps: %d instead of %d, a tenth of the %d steps.",
                name,
                steps // 10,
                warmup,
                steps,
            )


def _read(path: Path, given: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        shipped = shipped_recipes()
        hint = nearest(path.stem, shipped, end=": no such file.")
        problem = f"no recipe '{given}'{hint} Shipped recipes: {', '.join(shipped)}. "
        problem += "Fix: give one of these, or a file."
    except UnicodeDecodeError as error:
        problem = f"{given} is not UTF-8 text (byte {error.start}). Fix: save it as UTF-8."
    except OSError as error:
        problem = (
            f"cannot read the recipe {given}: {error.strerror}. Fix: give a file that you may read."
        )
    raise RecipeError(problem)


def _parse(text: str, name: str) -> tuple[dict[str, Any], dict[Place, int]]:
    """The YAML mapping, and the line of every key in it."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{name}{at} is not YAML: {getattr(error, 'problem', None) or error}. "
            "Fix: correct that line; unmasked recipes show nano prints a recipe."
        ) from None
    if not isinstance(data, dict) or not isinstance(node, yaml.MappingNode):
        found = "is empty" if data is None else f"holds a {type(data).__name__}, not keys"
        raise RecipeError(
            f"{name} {found}. A recipe needs at least its name and model.base. "
            "Fix: start from a recipe that unmasked recipes copy nano writes."
        )
    lines: dict[Place, int] = {}
    for place, line in _key_lines(node, ()):
        if place in lines:
            key = ".".join(map(str, place))
            raise RecipeError(
                f"{key}: given twice ({name} lines {lines[place]} and {line}). Fix: leave one."
            )
        lines[place] = line
    return data, lines


def _key_lines(node: yaml.Node, above: Place) -> Iterator[tuple[Place, int]]:
    """Every key below a node, with its line; a key that is given twice comes twice."""
    if len(above) == _DEEPEST:
        return
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*above, key.value)
            yield place, key.start_mark.line + 1
            yield from _key_lines(value, place)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _key_lines(item, (*above, index))


def _apply(override: str, data: dict[str, Any]) -> Place:
    """Apply ``section.key=value`` to the settings; returns the place of the key."""
    dotted, equals, text = override.partition("=")
    *sections, last = place = tuple(dotted.strip().split("."))
    if not equals or not all(place):
        raise RecipeError(f"override '{override}' should look like mntp.steps=500. Fix: KEY=VALUE.")
    section = data
    for depth, key in enumerate(sections, start=1):
        inner = section.get(key) or {}
        if isinstance(inner, str) and place[:depth] == ("supervised", "teacher"):
            inner = named_teacher(inner)  # the only section that may be given as a name
        if not isinstance(inner, dict):
            raise RecipeError(
                f"{'.'.join(place[:depth])} has no keys (override '{override}'). "
                f"Fix: {'.'.join(place[:depth])}={text}."
            )
        copied = dict(inner)  # a YAML alias may have put the same section in several places
        section[key] = copied
        section = copied
    try:
        value = yaml.safe_load(text)
        # `Path.exists` raises an error for a very long name on Python 3.11.
        is_file = isinstance(value, str) and os.path.exists(value)  # noqa: PTH110
        if isinstance(value, str) and takes_list(place) and not is_file:
            comma = _COMMA_OF_PAIRS if place[0] == "supervised" else _COMMA
            value = [yaml.safe_load(item) for item in comma.split(value) if item.strip()]
        section[last] = value
    except (yaml.YAMLError, ValueError, AttributeError):
        message = f"override '{override}': the value is not YAML. Fix: put it in quotes."
        raise RecipeError(message) from None
    return place


def _explain(error: Any, places: dict[Place, str], name: str) -> str:
    """One error of pydantic as a line: key, given value, what is allowed, where."""
    place: Place = error["loc"]
    known_places = (places.get(place[:end]) for end in range(len(place), 0, -1))
    where = next(filter(None, known_places), name)  # of the key, or of the section above it
    key, given = ".".join(map(str, place)), error["input"]
    if error["type"] == "extra_forbidden":
        allowed = list(section_at(place[:-1]))
        hint = nearest(str(place[-1]), allowed, end=f". Allowed: {', '.join(allowed)}.")
        return f"{key}: unknown key{hint} ({where})"
    if error["type"] == "missing":
        return f"{key}: missing ({where})"
    message = re.sub(r"^(Value error, |Input |String )", "", error["msg"])
    if error["type"] == "literal_error":
        message += nearest(str(given), re.findall(r"'([^']+)'", message), end="")
    elif error["type"] == "model_type":
        message = f"should be a section with keys: {', '.join(section_at(place))}"
    elif error["type"] == "string_type" and isinstance(given, int | float):
        message += ": put it in quotes"
    shown = "" if isinstance(given, dict) else f"{given!r} "
    return f"{key}: {shown}{message} ({where})"


def _explained_by(error: ValidationError, problems: Sequence[str]) -> list[str]:
    """A line with the commands that explain the settings of all problems without a fix."""
    known, commands = {setting.name for setting in settings()}, []
    for found, problem in zip(error.errors(include_url=False), problems, strict=True):
        keys = [str(key) for key in found["loc"] if isinstance(key, str)]
        while keys and ".".join(keys) not in known:
            keys.pop()
        if "Fix: " not in problem:
            commands.append(f"unmasked recipes explain {'.'.join(keys)}".rstrip())
    distinct = list(dict.fromkeys(commands))
    return [f"Fix: see what is allowed: {'; '.join(distinct)}"] if distinct else []
