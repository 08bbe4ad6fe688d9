"""The page about errors names every class of them, and only messages that the program has."""

from __future__ import annotations

import ast
import re

import pytest
from support.pages import ROOT, read

from unmasked import errors

PAGE = read("docs/troubleshooting.md")
TABLES = re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.M)
QUOTED = [row for table in TABLES for row in re.findall(r"^\| `([^`]+)` \|", table, re.M)]
CLASSES = [
    name
    for name, thing in vars(errors).items()
    if isinstance(thing, type) and issubclass(thing, errors.UnmaskedError)
]


def sentences() -> list[str]:
    """Every text of the source, with ``…`` for what an f-string puts in."""
    found = []
    for file in (ROOT / "src" / "unmasked").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


SENTENCES = sentences()


def is_said(quoted: str) -> bool:
    """Whether one text of the source has all parts of a quoted message, in their order."""
    parts = [part.strip() for part in quoted.split("…") if len(part.strip(" .:;()'")) > 2]
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return bool(parts) and any(pattern.search(text) for text in SENTENCES)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_its_part(name: str):
    part = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert part and len(part[1].strip().splitlines()) > 2


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_message_is_one_of_the_program(quoted: str):
    assert is_said(quoted)


def test_a_message_that_nobody_says_is_noticed():
    assert len(QUOTED) == sum(table.count("\n") for table in TABLES) > 30
    assert len(CLASSES) == 7
    assert is_said("…: there is no text in it.") and not is_said("…: there is no text in here.")


def test_every_extra_is_in_it():
    from test_dependencies import EXTRAS

    assert {*EXTRAS} - {"dev"} <= {*re.findall(r"`(\w+)`", PAGE)}
