"""Exact and near copies of texts, found in one pass over the texts.

Exact copies are equal except for case and white space. Near copies share most of their character
n-grams (`RUN` characters long): datasketch's MinHash finds candidates, whose Jaccard similarity is
then computed exactly, so that there are no false alarms. A few copies are missed, most of them near
the threshold.

Cost: half a millisecond per text, and about two kilobytes of memory besides the text.
"""

from __future__ import annotations

from typing import NamedTuple

from unmasked.errors import MissingExtraError
from unmasked.train.data.texts import folded

try:
    from datasketch import MinHash, MinHashLSH
except ImportError as error:
    raise MissingExtraError("datasketch", "data") from error

RUN = 5
"""Length of the n-grams in characters."""
PERMUTATIONS = 128


class Copy(NamedTuple):
    """The label of the text that was copied, and the Jaccard similarity; 1 for exact copies."""

    of: str
    share: float


class Copies:
    """The texts that were added so far, each with a label.

    Args:
        similarity: minimum Jaccard similarity of a near copy; 1 finds exact copies only.
    """

    def __init__(self, similarity: float) -> None:
        self.similarity = similarity
        self._exact: dict[str, str] = {}  # folded text → label
        near = min(similarity, 0.9)  # higher would miss candidates; `find` checks them exactly
        self._near = MinHashLSH(threshold=near, num_perm=PERMUTATIONS)

    def find(self, text: str, add_as: str | None = None) -> Copy | None:
        """The most similar text that was added, if `text` is an exact or near copy of it.

        Args:
            text: the text to look for.
            add_as: if given and `text` is no copy, `text` is added under this label.
        """
        hashed, text = None, folded(text)
        if label := self._exact.get(text):
            return Copy(label, 1.0)
        found: Copy | None = None
        if self.similarity < 1:
            runs = _runs(text)
            hashed = _hashed(runs)
            for other in self._near.query(hashed):
                theirs = _runs(other)
                share = len(runs & theirs) / len(runs | theirs)
                if share >= self.similarity and (found is None or share > found.share):
                    found = Copy(self._exact[other], share)
        if add_as and found is None:
            self._insert(text, add_as, hashed)
        return found

    def add(self, text: str, label: str) -> None:
        """Add a text, also if it is a near copy of one that was added; an exact copy is there."""
        text = folded(text)
        if text not in self._exact:
            self._insert(text, label, _hashed(_runs(text)) if self.similarity < 1 else None)

    def _insert(self, text: str, label: str, hashed: MinHash | None) -> None:
        self._exact[text] = label
        if hashed is not None:
            self._near.insert(text, hashed)


def _hashed(runs: set[str]) -> MinHash:
    hashed = MinHash(num_perm=PERMUTATIONS)
    hashed.update_batch([run.encode() for run in runs])
    return hashed


def _runs(text: str) -> set[str]:
    return {text[i : i + RUN] for i in range(max(1, len(text) - RUN + 1))}
