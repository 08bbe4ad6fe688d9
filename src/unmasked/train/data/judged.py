"""Pairs that a label judges: NLI's entailment and contradiction, or 1 and 0 for a match and none.

A row that matches is a query and its positive; the rows beside it with the same query and no match
are its hard negatives, as NLI was made into triplets for SimCSE (Gao et al., arXiv 2104.08821).
What is neither, and a negative whose query has no positive beside it, is left out and counted.
Scores between 0 and 1, and whole numbers as NLI data sets have them (is 0 entailment, or none?),
are refused: they say something else to different people.

Cost: the rows of one query at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from unmasked.train.data.cells import FaultyCell

Texts = tuple[str, str, list[str], str, str]
"""Query, positive, negatives, and the instructions of query and documents."""
WORDS: dict[object, bool | None] = {
    "entailment": True,
    "contradiction": False,
    "neutral": None,
    "-": None,  # where the annotators of SNLI did not agree
}
NUMBERS: dict[object, bool | None] = {1: True, 0: False, "1": True, "0": False}
INFERENCE = ("hypothesis", "sent1")
"""Columns of texts whose labels are words."""


def matches(label: str, value: object, positive: str) -> bool | None:
    """Whether a pair matches; None where it neither does nor is a negative.

    Args:
        label: the column of the judgement.
        value: what stands there.
        positive: the column of the text that is judged.

    Raises:
        FaultyCell: the value can be read in two ways.
    """
    words = value.lower() if isinstance(value, str) else value
    if isinstance(words, str) and words in WORDS:
        return WORDS[words]
    if positive not in INFERENCE and isinstance(value, int | str) and value in NUMBERS:
        return NUMBERS[value]
    known = [*WORDS] if positive in INFERENCE else [*WORDS, 1, 0]
    raise FaultyCell(
        f"'{label}' is {value!r:.40}, and which pairs match is known only of "
        f"{', '.join(map(str, known))}",
        "write these, or keep the rows that match, without this column",
    )


@dataclass
class Groups:
    """Judged rows, gathered by their query as they come one behind the other.

    Attributes:
        left_out: rows that became neither a positive nor a negative.
    """

    left_out: int = 0
    _positives: list[Texts] = field(default_factory=list)
    _negatives: list[str] = field(default_factory=list)
    _query: str | None = None

    def add(self, matched: bool | None, texts: Texts) -> list[Texts]:
        """Take a row; returns the rows of the query before it, once another one begins."""
        query, document, *_ = texts
        found = self.rest() if query != self._query else []
        self._query = query
        if matched:
            self._positives.append(texts)
        elif matched is None:
            self.left_out += 1
        else:
            self._negatives.append(document)
        return found

    def rest(self) -> list[Texts]:
        """The rows of the query that was last."""
        if not self._positives:
            self.left_out += len(self._negatives)
        found = [(q, p, [*n, *self._negatives], *told) for q, p, n, *told in self._positives]
        self._positives, self._negatives = [], []
        return found  # type: ignore[return-value]
