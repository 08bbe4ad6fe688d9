"""Recipe files: YAML in, single settings changed, every fault told with its line, YAML out."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from unmasked.errors import RecipeError, nearest
from unmasked.recipe.schema import Recipe
from unmasked.recipe.settings import section_of, settings, takes_list
from unmasked.recipe.teaching import named_teacher

logger = logging.getLogger(__name__)

Place = tuple[str | int, ...]
"""The way to a key: ``("supervised", "data", 0, "path")``."""
_DEEPEST = 4
_COMMA = re.compile(r",(?![^()]*\))")
"""A comma between values, not one inside of ``MTEB(kor, v2)``."""
_COMMA_OF_PAIRS = re.compile(r",(?!\s*\w+=)")
"""A comma between data sets, not one between the columns of ``FILE:query=a,positive=b``."""


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(__file__).parent / "shipped"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, change single settings, and check the whole.

    Args:
        path_or_name: A YAML file, or the name of a shipped recipe, which takes precedence (write
            ``./name`` for a file called so). Paths inside are relative to the current folder.
        overrides: ``section.key=value`` with the value in YAML: ``mntp.steps=50``,
            ``simcse=null`` to leave a stage out; a list with or without brackets,
            ``mntp.data=a.txt,b.txt``.

    Raises:
        RecipeError: No such file, not YAML, an unknown key or an unusable value. The message
            names every such key with its line or override.
    """
    path = shipped_recipes().get(str(path_or_name), Path(path_or_name))
    data, lines = _parse(_read(path, str(path_or_name)), path.name)
    places = {place: f"{path.name} line {line}" for place, line in lines.items()}
    return _checked(data, overrides, places, path.name)


def make_recipe(settings: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a command's flags; `overrides` and errors are those of `load_recipe`."""
    return _checked(dict(settings), overrides, {}, "from the command line")


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML, with every default written out; ``load_recipe`` reads an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def as_published(recipe: Recipe) -> Recipe:
    """The recipe with the published texts in every stage that names no data."""
    texts: dict[str, list[str]] = {
        str(name): files for name, files in recipe.published_data.items()
    }
    empty = {name: stage for name, stage in recipe.stages() if name in texts and not stage.data}
    filled = {name: s.model_copy(update={"data": texts[name]}) for name, s in empty.items()}
    return recipe.model_copy(update=filled)


def recipe_differences(a: Recipe, b: Recipe) -> list[str]:
    """What changed from ``a`` to ``b``, one line per setting: ``mntp.steps: 100 -> 200``.

    Notes for the reader, the licence and what was published, are no settings.
    """
    notes: Any = {"anchors": True, "published_data": True, "model": {"licence"}}

    def walk(old: object, new: object, *keys: str) -> Iterator[str]:
        if isinstance(old, dict) and isinstance(new, dict):
            for key in old:
                yield from walk(old[key], new[key], *keys, key)
        elif old != new:
            shown = ["set" if isinstance(value, dict) else value for value in (old, new)]
            yield f"{'.'.join(keys)}: {shown[0]} -> {shown[1]}"

    return list(walk(a.model_dump(exclude=notes), b.model_dump(exclude=notes)))


def _checked(
    data: dict[str, Any], overrides: Sequence[str], places: dict[Place, str], name: str
) -> Recipe:
    own = {name: dict(section) for name, section in data.items() if isinstance(section, dict)}
    changed: set[Place] = set()
    for override in overrides:
        place = _apply(override, data)
        changed.add(place)
        places = {p: text for p, text in places.items() if p[: len(place)] != place}
        for end in range(1, len(place) + 1):
            places.setdefault(place[:end], f"override '{override}'")
    _shorten_warmup(data, own, changed)
    if ("model", "base") in changed and ("model", "licence") not in changed:
        data["model"].pop("licence", None)  # it is that of the base before
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = [_explain(e, places, name) for e in error.errors(include_url=False)]
        raise RecipeError("\n".join([*problems, *_explained_by(error, problems)])) from None


def _shorten_warmup(
    data: dict[str, Any], own: dict[str, dict[str, Any]], changed: set[Place]
) -> None:
    """Fewer steps than the warm-up of the recipe, or of the schema, get a tenth of them instead.

    A warm-up that was asked for together with the steps stays, and is refused if it is too long.
    """
    for name in ("mntp", "simcse", "supervised"):
        section = data.get(name)
        if not isinstance(section, dict) or (name, "warmup_steps") in changed:
            continue
        fewer = {(name, "steps"), (name, "schedule_steps")} & changed
        given = section if (name,) in changed else own.get(name, {})
        if "warmup_steps" in given and not fewer:
            continue
        fields = section_of(Recipe.model_fields[name]).model_fields
        settings = {key: field.default for key, field in fields.items()} | section
        steps, warmup = settings["schedule_steps"] or settings["steps"], settings["warmup_steps"]
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{name}{at} is not YAML: {getattr(error, 'problem', None) or error}. "
            "Fix: mend that line; unmasked recipes show nano prints a recipe."
        ) from None
    if not isinstance(data, dict) or not isinstance(node, yaml.MappingNode):
        found = "is empty" if data is None else f"holds a {type(data).__name__}, not keys"
        raise RecipeError(
            f"{name} {found}. A recipe needs at least its name and model.base. "
            "Fix: begin with one that unmasked recipes copy nano writes."
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
    """Set what ``section.key=value`` says; returns the place of the key."""
    dotted, equals, text = override.partition("=")
    *sections, last = place = tuple(dotted.strip().split("."))
    if not equals or not all(place):
        raise RecipeError(f"override '{override}' should look like mntp.steps=500. Fix: KEY=VALUE.")
    section = data
    for depth, key in enumerate(sections, start=1):
        inner = section.get(key) or {}
        if isinstance(inner, str) and place[:depth] == ("supervised", "teacher"):
            inner = named_teacher(inner)  # the one section that a name may stand for
        if not isinstance(inner, dict):
            raise RecipeError(
                f"{'.'.join(place[:depth])} has no keys (override '{override}'). "
                f"Fix: {'.'.join(place[:depth])}={text}."
            )
        section[key] = section = dict(inner)  # a copy: an alias may stand in several places
    try:
        value = yaml.safe_load(text)
        if isinstance(value, str) and takes_list(place) and not Path(value).exists():
            items = (
                _COMMA_OF_PAIRS.split(value) if place[0] == "supervised" else _COMMA.split(value)
            )
            value = [yaml.safe_load(item) for item in items if item.strip()]
        section[last] = value
    except (yaml.YAMLError, ValueError):
        message = f"override '{override}': the value is not YAML. Fix: put it in quotes."
        raise RecipeError(message) from None
    return place


def _explain(error: Any, places: dict[Place, str], name: str) -> str:
    """One finding of pydantic as a line: key, given value, what is allowed, where."""
    place: Place = error["loc"]
    nearby = (places.get(place[:end]) for end in range(len(place), 0, -1))
    where = next(filter(None, nearby), name)
    key, given = ".".join(map(str, place)), error["input"]
    if error["type"] == "extra_forbidden":
        allowed = _keys(place[:-1])
        hint = nearest(str(place[-1]), allowed, end=f". Allowed: {', '.join(allowed)}.")
        return f"{key}: unknown key{hint} ({where})"
    if error["type"] == "missing":
        return f"{key}: missing ({where})"
    message = re.sub(r"^(Value error, |Input |String )", "", error["msg"])
    if error["type"] == "literal_error":
        message += nearest(str(given), re.findall(r"'([^']+)'", message), end="")
    elif error["type"] == "model_type":
        message = f"should be a section with keys: {', '.join(_keys(place))}"
    elif error["type"] == "string_type" and isinstance(given, int | float):
        message += ": put it in quotes"
    shown = "" if isinstance(given, dict) else f"{given!r} "
    return f"{key}: {shown}{message} ({where})"


def _explained_by(error: ValidationError, problems: Sequence[str]) -> list[str]:
    """A line with the commands that say what is allowed, where the findings name no fix."""
    known, commands = {one.name for one in settings()}, []
    for found, problem in zip(error.errors(include_url=False), problems, strict=True):
        keys = [str(key) for key in found["loc"] if isinstance(key, str)]
        while keys and ".".join(keys) not in known:
            keys.pop()
        if "Fix: " not in problem:
            commands.append(" ".join(["unmasked recipes explain", *[".".join(keys)][: len(keys)]]))
    named = list(dict.fromkeys(commands))
    return [f"Fix: see what is allowed: {'; '.join(named)}"] if named else []


def _keys(place: Place) -> list[str]:
    """The keys of the section at a place."""
    section: type[BaseModel] = Recipe
    for key in place:
        if isinstance(key, str):  # a number is an item of the list before it
            section = section_of(section.model_fields[key])
    return list(section.model_fields)
