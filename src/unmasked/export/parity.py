"""The twenty texts for which every export and every server must give the same vectors as torch.

They cover what goes wrong in other programs: with and without an instruction, one word, many words,
longer than a sliding window, Korean, emoji, code, white space, an empty text. Cost: twenty texts,
2,600 words in all.

Shapes: N texts, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FIND = "Given a question, find the passage that answers it:"
SAME = "비슷한 문장을 찾으세요:"

_LOG = " ".join(
    f"Entry {n}: at {n % 24:02d}:{7 * n % 60:02d} the keeper saw {3 * n % 17} ships, wind "
    f"{('north', 'east', 'south', 'west')[n % 4]}, sea {('calm', 'rough', 'high')[n % 3]}."
    for n in range(1, 91)
)

TEXTS: tuple[tuple[str, str], ...] = (
    ("", "Lighthouse"),
    ("", "The keeper climbs ninety steps every evening."),
    ("", "Why do ships sound their horns in fog?"),
    ("", "등대지기는 저녁마다 계단 아흔 개를 오른다."),
    ("", "안개가 끼면 배는 왜 기적을 울리나요?"),
    ("", "Der Wärter zählt die Schiffe; 灯台守は船を数える。 Маяк виден издалека 🌊🚢"),
    ("", "def count(ships):\n    return sum(ship.seen for ship in ships)\n"),
    ("", "  two leading blanks, a tab\there, and three behind   "),
    ("", "3.14159 26535 89793 0x7FFF 1,000,000"),
    ("", " ".join(_LOG.split()[:150])),
    ("", _LOG),
    ("", ""),
    (FIND, "Why do ships sound their horns in fog?"),
    (FIND, "fog"),
    (FIND, "안개가 끼면 배는 왜 기적을 울리나요?"),
    (SAME, "등대지기는 저녁마다 계단 아흔 개를 오른다."),
    (SAME, "The keeper climbs ninety steps every evening."),
    (FIND, " ".join(_LOG.split()[:120])),
    (SAME, _LOG),
    (FIND, ""),
)
"""(instruction, text); an empty string means no instruction."""

LIMIT, LIMIT_OF_8_BITS = 0.9999, 0.999
"""Minimum cosine of vectors that count as the same; with 8-bit weights, no more can be reached."""


@dataclass(frozen=True)
class Parity:
    """How near an engine's vectors are to those of torch."""

    cosines: tuple[float, ...]  # the cosine for each compared text, in the order of `texts`
    texts: tuple[int, ...]  # indices of these texts in `TEXTS`
    limit: float  # the minimum cosine that counts as the same vector

    @property
    def least(self) -> float:
        """The least cosine of all."""
        return min(self.cosines, default=0.0)

    @property
    def same(self) -> bool:
        """Whether every vector is the same."""
        return self.least >= self.limit

    def as_dict(self) -> dict[str, Any]:
        """For JSON; cosines by the index of their text."""
        return {
            "least_cosine": self.least,
            "limit": self.limit,
            "same": self.same,
            "cosines": {str(n): c for n, c in zip(self.texts, self.cosines, strict=True)},
        }


def shown(number: int) -> str:
    """The text of `TEXTS` with this index and its instruction, shortened."""
    instruction, text = TEXTS[number]
    text = text if len(text) <= 32 else f"{text[:29]}..."
    return f"{text!r} after {instruction[:24]!r}" if instruction else repr(text)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N,) cosines of the rows of two (N, D) arrays.

    The cosine is 0 if one of the two is zero or not finite, and 1 if both are zero.
    """
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (one * other).sum(axis=1) / lengths
    return np.where((one == other).all(axis=1), 1.0, np.where(np.isfinite(found), found, 0.0))


def compare_vectors(
    ours: np.ndarray, theirs: np.ndarray, limit: float, texts: Sequence[int] | None = None
) -> Parity:
    """Compare the (N, D) vectors of the texts with these indices, by default of all texts."""
    numbers = tuple(range(len(TEXTS)) if texts is None else texts)
    return Parity(tuple(map(float, cosines(ours, theirs))), numbers, limit)
