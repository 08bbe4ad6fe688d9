"""The pages of the documentation: their blocks of code, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(file.relative_to(ROOT))
    for file in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
)  # fmt: skip
LANGUAGES = {"bash", "python", "text", "yaml", "json"}

_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*?) -->\n)?^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and why it is not run, if it is not."""

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """The lines of a shell; one that ends in a backslash goes on, comments are left out."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if shlex.split(line, comments=True)]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def blocks_of(page: str) -> tuple[Block, ...]:
    text = read(page)
    return tuple(
        Block(page, text.count("\n", 0, found.start("code")), found["language"], found["code"],
              found["reason"])
        for found in _FENCE.finditer(text)
    )  # fmt: skip


def blocks(language: str) -> list[Block]:
    """Every block in this language, in all pages."""
    return [block for page in PAGES for block in blocks_of(page) if block.language == language]


def without_code(text: str) -> str:
    """A page without its blocks and its `code`, as far as links and headings are sought."""
    return re.sub(r"`[^`\n]*`", "``", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))
