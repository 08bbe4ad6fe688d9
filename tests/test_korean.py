"""A page in Korean says what the English one does: the same headings, commands, figures, links.

What only a reader can judge, that the sentences mean the same, is left to one.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
from support.pages import blocks_of, read, without_code

ENGLISH, KOREAN = "README.md", "README.ko.md"
TUTORIAL = "docs/tutorials/own-domain.md"
BOTH = [(ENGLISH, KOREAN), (TUTORIAL, TUTORIAL.replace(".md", ".ko.md"))]


def headings(text: str) -> list[int]:
    """The level of each heading, in order."""
    return [len(marks) for marks in re.findall(r"^(#+) ", without_code(text), re.M)]


def code(page: str) -> list[tuple[str, str | None, str]]:
    """What each block would do: what stands behind two spaces, a comment or what a verb is for,
    is prose."""
    return [
        (b.language, b.reason, re.sub(r"(?<=\S) {2,}\S.*$", "", b.code, flags=re.M))
        for b in blocks_of(page)
    ]


def inline(text: str) -> Counter[str]:
    return Counter(" ".join(x.split()) for x in re.findall(r"`([^`]+)`", prose(text)))


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def figures(text: str) -> Counter[str]:
    """Every number outside of code; the words of the two languages stand in another order."""
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", without_code(text)))


def rows(text: str) -> list[list[str]]:
    """The figures of each row of each table, cell by cell."""
    lines = re.findall(r"^\|.*\|$", without_code(text), re.M)
    return [[" ".join(re.findall(r"[-+]?\d+(?:\.\d+)?", c)) for c in x.split("|")] for x in lines]


def links(text: str) -> list[str]:
    """Where links and pictures lead, without those from one language to the other."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    pages = [target.replace(".ko.md", ".md") for target in found]
    return [page for page in pages if page not in (ENGLISH, "own-domain.md")]


@pytest.mark.parametrize(("english", "korean"), BOTH)
@pytest.mark.parametrize("part", [headings, inline, figures, rows, links])
def test_the_two_say_the_same(english, korean, part):
    assert part(read(korean)) == part(read(english))


@pytest.mark.parametrize(("english", "korean"), BOTH)
def test_the_two_have_the_same_code(english, korean):
    ours = code(english)
    assert ours and code(korean) == ours


def test_the_list_of_commands_is_compared():
    assert "unmasked recipes list|show|copy|explain\n" in "".join(x[-1] for x in code(ENGLISH))


@pytest.mark.parametrize(("english", "korean"), BOTH)
def test_each_leads_to_the_other(english, korean):
    names = english.rpartition("/")[-1], korean.rpartition("/")[-1]
    assert f"({names[1]})" in read(english) and f"({names[0]})" in read(korean)


@pytest.mark.parametrize(
    ("part", "old", "new"),
    [(headings, "## How good", "How good"), (figures, "26.42", "26.43"), (rows, "20.38", "20.39"),
     (links, "docs/results.md)", "docs/models.md)"),
     (inline, "'.[report,serve,export]'`", "'.[report,serve]'`")],
)  # fmt: skip
def test_a_change_of_one_is_noticed(part, old: str, new: str):
    text = read(ENGLISH)
    assert old in text and part(text.replace(old, new)) != part(text)
