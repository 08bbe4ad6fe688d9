"""Write `docs/reference`: commands, settings and public names, as the program itself says them.

    python scripts/reference.py

Commands come from the options of the command line, settings from the schema of recipes, names from
the docstrings. A test says when the pages are no longer what this writes.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
WRITTEN = "Written by `python scripts/reference.py`; do not edit this page.\n"


def cell(text: str) -> str:
    """A text that stays within one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


# --- commands -----------------------------------------------------------------------------------


def commands_page() -> str:
    """Every verb with its arguments and options."""
    from unmasked.cli import app

    parts = ["# Commands\n", WRITTEN]
    parts.append(
        "`unmasked VERB --help` shows the same. Exit codes: 0 on success, 2 for an error that you "
        "can correct (`unmasked --debug VERB` shows its traceback), 130 after an interruption.\n"
    )
    for name, verb in verbs(app, ""):
        said = (inspect.getdoc(verb) or "").split("\n\n")[0]
        parts.append(f"## {name}\n\n{' '.join(said.split())}\n")
        hints = get_type_hints(verb, include_extras=True)
        given = inspect.signature(verb).parameters.values()
        rows = [option_row(one.name, hints[one.name], one.default) for one in given]
        if rows:
            parts.append(
                "| argument or option | value | what it does |\n|---|---|---|\n"
                + "\n".join(rows)
                + "\n"
            )
    return "\n".join(parts)


def verbs(group: Any, above: str) -> Iterator[tuple[str, Callable]]:
    """Every command of a group, with its whole name and the function behind it."""
    for command in group.registered_commands:
        yield f"{above}{command.name or command.callback.__name__}", command.callback
    for inner in group.registered_groups:
        yield from verbs(inner.typer_instance, f"{above}{inner.name} ")


def option_row(name: str, hint: Any, default: Any) -> str:
    """A row of a table: what is written, which values, what it does."""
    kind, info = get_args(hint)[:2]
    if isinstance(info, ArgumentInfo):
        written = f"`{cell(info.metavar or name)}`"
    else:
        # In Annotated, typer takes the first name for a default until it reads the function.
        first = [info.default] if str(info.default).startswith("-") else []
        named = [*first, *info.param_decls] or [f"--{name.replace('_', '-')}"]
        written = ", ".join(f"`{one}`" for one in sorted(named, key=len))
    said = [cell(info.help or "")]
    if default is inspect.Parameter.empty:
        said.append("Must be given.")
    elif isinstance(info.show_default, str):
        said.append(f"Default: {cell(info.show_default)}.")
    elif default not in (None, "") and default is not False:  # 0 is a default like any other
        said.append(f"Default: `{cell(str(default))}`.")
    return f"| {written} | {values_of(kind, info)} | {' '.join(said)} |"


def values_of(kind: Any, info: Any) -> str:
    """Which values an option takes, in words; nothing for a flag."""
    inner = [one for one in get_args(kind) if one is not type(None)]
    if get_origin(kind) is Literal:
        return " ".join(f"`{choice}`" for choice in inner)
    if get_origin(kind) is list:
        return f"{values_of(inner[0], info)}, more than one"
    if inner:
        return values_of(inner[0], info)
    words = {bool: "", int: "whole number", float: "number", Path: "path", str: "text"}[kind]
    bounds = [("from", info.min), ("to", info.max)]
    return " ".join([words, *(f"{word} {at}" for word, at in bounds if at is not None)])


# --- settings -----------------------------------------------------------------------------------


def settings_page() -> str:
    """Every setting of a recipe."""
    from unmasked.recipe.settings import settings

    parts = ["# Settings of a recipe\n", WRITTEN]
    parts.append(
        "A recipe is a YAML file with these sections; on the command line a setting is "
        "`section.key=value`. `unmasked recipes explain SECTION` shows the same.\n"
    )
    table = "\n| setting | allowed | default | what it does |\n|---|---|---|---|"
    in_table = False
    for one in settings():
        if one.section:
            parts.append(f"\n## {one.name}\n\n{' '.join(one.about.split())}")
            in_table = False
            continue
        if not in_table:
            parts.append(table)
            in_table = True
        default = f"`{cell(one.default)}`" if one.default else "must be given"
        about = cell(one.about.replace("``", "`"))
        parts.append(f"| `{one.name}` | {cell(one.allowed)} | {default} | {about} |")
    return "\n".join(parts) + "\n"


# --- Python -------------------------------------------------------------------------------------


def python_page() -> str:
    """The public names, and what each room says of itself."""
    import unmasked
    from unmasked.model import TextEncoder

    parts = ["# Public names in Python\n", WRITTEN]
    for name in unmasked.__all__:
        thing = getattr(unmasked, name)
        if not callable(thing):
            continue
        parts.append(f"## {name}\n")
        if name == "Recipe":
            parts.append(markdown(inspect.getdoc(thing)))
            parts.append("\nIts settings are listed on [a page of their own](settings.md).\n")
            continue
        if inspect.isfunction(thing):
            parts.append(f"```text\nunmasked.{name}{signature(thing)}\n```\n")
        parts.append(markdown(inspect.getdoc(thing)) + "\n")
        if inspect.isclass(thing):
            parts += members(thing, (thing, TextEncoder))
    parts.append(
        "## The rooms\n\nWhat each part of the package answers, for those who go deeper.\n"
    )
    for file in sorted((ROOT / "src" / "unmasked").glob("*/__init__.py")):
        said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        parts.append(f"### unmasked.{file.parent.name}\n\n{markdown(said)}\n")
    return "\n".join(parts)


def members(thing: type, homes: tuple[type, ...]) -> Iterator[str]:
    """The public methods and properties that these classes define and describe."""
    seen = set()
    for home in homes:
        for name, member in vars(home).items():
            plain = getattr(member, "__func__", getattr(member, "fget", member))
            if name.startswith("_") or name in seen or not inspect.isfunction(plain):
                continue
            if not (said := inspect.getdoc(plain)):
                continue
            seen.add(name)
            yield f"### {thing.__name__}.{name}\n"
            if not isinstance(member, property):
                yield f"```text\n{name}{signature(plain)}\n```\n"
            yield markdown(said) + "\n"


def signature(function) -> str:
    """The arguments by name and default, one to a line where they are many."""
    given = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in {"self", "cls"}
    ]
    shown = [re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", str(one)) for one in given]
    shown = [one.replace("=Ellipsis", "=...") for one in shown]
    line = f"({', '.join(shown)})"
    return line if len(line) < 80 else "(\n    " + ",\n    ".join(shown) + ",\n)"


def markdown(said: str | None) -> str:
    """A docstring of Google's convention: sections become lists, examples stay as they are."""
    out: list[str] = []
    section = ""
    for line in (said or "").splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Attributes|Yields):", line):
            section = line[:-1]
            out += [f"**{section}**", ""]
        elif section and (found := re.match(r" {4}([\w*][\w, ]*): (.*)", line)):
            out.append(f"* `{found[1]}`: {found[2]}")
        elif section and line.startswith("    "):
            out.append(f"  {line.strip()}" if out[-1] else line.strip())
        elif line.startswith((">>>", "...")) or (out and out[-1].startswith("    >>>")):
            out.append(f"    {line}")
        else:
            section = section if not line else ""
            out.append(line)
    return "\n".join(out).replace("``", "`").strip()


PAGES = {"commands.md": commands_page, "settings.md": settings_page, "python.md": python_page}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, write in PAGES.items():
        (FOLDER / name).write_text(write(), encoding="utf-8")
