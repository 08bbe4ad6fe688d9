"""Exact and near copies of texts, found as the texts pass by.

Exact copies are equal apart from case and white space. Near ones share most of their runs of
`RUN` characters: datasketch's MinHash finds candidates, and the share (Jaccard) is then counted, so
that none is named by mistake; a few are missed, and more of them the nearer the limit.

Cost: half a millisecond a text, and about two kilobytes of memory beside the text.
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
"""Characters of a run."""
PERMUTATIONS = 128


class Copy(NamedTuple):
    """What a text is a copy of, and the share of runs that they have in common; 1 if exact."""

    of: str
    share: float


class Copies:
    """Texts seen so far, by a label each.

    Args:
        similarity: least share of runs in common that makes a near copy; 1 finds exact ones only.
    """

    def __init__(self, similarity: float) -> None:
        self.similarity = similarity
        self._exact: dict[str, str] = {}  # folded text → label
        near = min(similarity, 0.9)  # above, candidates would be missed; their share is counted
        self._near = MinHashLSH(threshold=near, num_perm=PERMUTATIONS)

    def find(self, text: str, add_as: str | None = None) -> Copy | None:
        """The nearest copy among those that were added.

        Args:
            text: to look for.
            add_as: the label under which it is added if it has none.
        """
        text = folded(text)
        if label := self._exact.get(text):
            return Copy(label, 1.0)
        found: Copy | None = None
        if self.similarity < 1:
            runs = _runs(text)
            hashed = MinHash(num_perm=PERMUTATIONS)
            hashed.update_batch([run.encode() for run in runs])
            for other in self._near.query(hashed):
                theirs = _runs(other)
                share = len(runs & theirs) / len(runs | theirs)
                if share >= self.similarity and (found is None or share > found.share):
                    found = Copy(self._exact[other], share)
            if add_as and found is None:
                self._near.insert(text, hashed)
        if add_as and found is None:
            self._exact[text] = add_as
        return found


def _runs(text: str) -> set[str]:
    return {text[i : i + RUN] for i in range(max(1, len(text) - RUN + 1))}
