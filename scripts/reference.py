"""Write `docs/reference`: commands, settings and public names, as the program itself says them.

    python scripts/reference.py

Commands come from the options of the command line, settings from the schema of recipes, names from
the docstrings. A test says when the pages are no longer what this writes.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
WRITTEN = "Written by `python scripts/reference.py`; change what it reads, not this page.\n"


def cell(text: str) -> str:
    """A text that stays within one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


# --- commands -----------------------------------------------------------------------------------


def commands_page() -> str:
    """Every verb with its arguments and options."""
    import typer

    from unmasked.cli import app

    parts = ["# Commands\n", WRITTEN]
    parts.append(
        "`unmasked VERB --help` says the same. Exit codes: 0 when it is done, 2 for what you can "
        "mend, 130 when it was interrupted. `unmasked --debug VERB` shows the traceback of an error."
        "\n"
    )
    for name, command in verbs(typer.main.get_command(app), ""):
        parts.append(f"## {name}\n")
        parts.append("\n\n".join(" ".join(p.split()) for p in (command.help or "").split("\n\n")))
        rows = [option_row(given) for given in command.params if given.name != "help"]
        if rows:
            parts.append("\n| | | |\n|---|---|---|\n" + "\n".join(rows) + "\n")
        else:
            parts.append("")
    return "\n".join(parts)


def verbs(group, above: str) -> Iterator[tuple[str, object]]:
    """Every command below a group, with its whole name."""
    for name, command in group.commands.items():
        whole = f"{above} {name}".strip()
        if hasattr(command, "commands"):
            yield from verbs(command, whole)
        else:
            yield whole, command


def option_row(given) -> str:
    """A row of a table: what is written, which values, what it does."""
    if given.param_type_name == "argument":
        written = f"`{(given.metavar or given.name).strip('{}[]')}`"
    else:
        written = ", ".join(f"`{name}`" for name in (*given.opts, *given.secondary_opts))
    kind = "" if getattr(given, "is_flag", False) else kind_of(given)
    default = given.default if given.default not in (None, False, ()) else None
    shown = getattr(given, "show_default", None)
    if isinstance(shown, str):
        default = f"({shown})"
    said = [cell(getattr(given, "help", None) or "")]
    if given.required:
        said.append("Must be given.")
    elif default is not None and not callable(default):
        said.append(f"Default: {cell(str(default))}.")
    return f"| {written} | {kind} | {' '.join(said)} |"


def kind_of(given) -> str:
    """Which values an option takes."""
    choices = getattr(given.type, "choices", None)
    if choices:
        return " ".join(f"`{choice}`" for choice in choices)
    names = {"integer": "whole number", "integer range": "whole number", "float": "number",
             "float range": "number", "text": "text", "path": "path", "str": "text", "int": "whole number"}  # fmt: skip
    kind = names.get(given.type.name, given.type.name)
    many = getattr(given, "multiple", False) or getattr(given, "nargs", 1) == -1
    return cell(f"{kind}, repeatable" if many else kind)


# --- settings -----------------------------------------------------------------------------------


def settings_page() -> str:
    """Every setting of a recipe."""
    from unmasked.recipe.settings import settings

    parts = ["# Settings of a recipe\n", WRITTEN]
    parts.append(
        "A recipe is a YAML file with these sections; on the command line a setting is "
        "`section.key=value`. `unmasked recipes explain SECTION` says the same.\n"
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
            parts.append("\nIts settings are [on a page of their own](settings.md).\n")
            continue
        if inspect.isfunction(thing):
            parts.append(f"```text\nunmasked.{name}{signature(thing)}\n```\n")
        parts.append(markdown(inspect.getdoc(thing)) + "\n")
        if inspect.isclass(thing):
            parts += members(thing, (thing, TextEncoder))
    parts.append("## The rooms\n\nWhat each part of the package answers, for those who go deeper.\n")
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
    line = f"({', '.join(shown)})".replace("=Ellipsis", "=...")
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
