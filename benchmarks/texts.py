"""The texts that encoding is timed on: mixes of lengths and scripts.

A gain on short texts says nothing about documents, and sorting by characters, as stock
sentence-transformers does, goes wrong where characters per token vary. Hence four mixes. Each is
drawn from sentences: those of a data folder, or the docstrings installed on every machine.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path

from unmasked.files import docstrings

DATA = Path(__file__).parents[2] / "shared" / "data"
SENTENCES = 6000  # of each language; more than any mix needs

PASSAGE_TOKENS, DOCUMENT_TOKENS = 100, 280
"""Sentences are joined until they have so many; with the last one, about 120 and 300."""


@dataclass(frozen=True)
class Sentences:
    """Where the texts come from; Korean is missing where there is no data folder."""

    source: str
    english: list[str]
    korean: list[str]


@cache
def read_sentences(folder: Path | None = None) -> Sentences:
    """Sentences of a data folder with ``text/{en,ko}wiki_sentences.txt.gz``, else docstrings.

    They are read once in a process: collecting docstrings takes half a minute.
    """
    if folder is None and not DATA.is_dir():
        found = docstrings.collect(limit=SENTENCES)
        return Sentences("docstrings of the installed packages", [d.summary for d in found], [])
    english, korean = (
        _head((folder or DATA) / "text" / f"{language}wiki_sentences.txt.gz")
        for language in ("en", "ko")
    )
    return Sentences("Wikipedia sentences", english, korean)


def _head(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [line.strip() for line in islice(lines, SENTENCES)]


def build_mixes(
    sentences: Sentences, sizes: dict[str, int], count: Callable[[str], int]
) -> dict[str, list[str]]:
    """The mixes, always the same ones for the same sentences.

    Args:
        sentences: what texts are made of.
        sizes: mix → number of texts.
        count: tokens of a text.

    Returns:
        mix → texts; without ``korean`` where there are no Korean sentences.
    """

    def joined(parts: cycle[str], tokens: int) -> str:
        text = next(parts)
        while count(text) < tokens:
            text = f"{text} {next(parts)}"
        return text

    mixes = {}
    for name, size in sizes.items():
        english = cycle(sentences.english)
        if name == "passages":
            texts = [joined(english, PASSAGE_TOKENS) for _ in range(size)]
        elif name == "mixed":
            draw = random.Random(size)
            texts = [
                joined(english, DOCUMENT_TOKENS) if draw.random() < 0.2 else next(english)
                for _ in range(size)
            ]
        elif name == "korean":
            other = size * 3 // 10
            texts = [*islice(english, size - other), *sentences.korean[:other]]
        else:
            texts = list(islice(english, size))
        random.Random(0).shuffle(texts)
        if name != "korean" or sentences.korean:
            mixes[name] = texts
    return mixes
