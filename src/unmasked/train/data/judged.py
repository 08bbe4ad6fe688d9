"""Pairs with a label: NLI's entailment and contradiction, or 1 and 0 for a match and none.

A row that matches becomes a query and its positive; adjacent rows with the same query that do not
match become its hard negatives, as NLI was made into triplets for SimCSE (Gao et al., arXiv
2104.08821). Rows that are neither, and negatives whose query has no positive beside them, are left
out and counted. Scores between 0 and 1, and whole numbers as NLI data sets have them, are refused:
they are ambiguous (0 may mean entailment, or no match).

Cost: the rows of one query at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from unmasked.train.data.cells import FaultyCell

Texts = tuple[str, str, list[str], str, str, list[float], list[list[float]], str]
"""Query, positive, negatives, the instructions of query and documents, a teacher's scores and
vectors, and the file and line."""
WORDS: dict[object, bool | None] = {
    "entailment": True,
    "contradiction": False,
    "neutral": None,
    "-": None,  # where the annotators of SNLI did not agree
}
NUMBERS: dict[object, bool | None] = {1: True, 0: False, "1": True, "0": False}
INFERENCE = ("hypothesis", "sent1")
"""Columns of NLI data: their labels must be words, since numbers are ambiguous."""


def matches(label: str, value: object, positive: str) -> bool | None:
    """Whether a pair matches; None if it is neither a match nor a negative.

    Args:
        label: the column of the label.
        value: the label.
        positive: the column of the text that is judged.

    Raises:
        FaultyCell: the label is unknown or ambiguous.
    """
    words = value.lower() if isinstance(value, str) else value
    if isinstance(words, str) and words in WORDS:
        return WORDS[words]
    if positive not in INFERENCE and isinstance(value, int | str) and value in NUMBERS:
        return NUMBERS[value]
    known = [*WORDS] if positive in INFERENCE else [*WORDS, 1, 0]
    raise FaultyCell(
        f"'{label}' is {value!r:.40}, and the only labels that are known are "
        f"{', '.join(map(str, known))}",
        "write these, or keep the rows that match, without this column",
    )


@dataclass
class Groups:
    """Groups adjacent labelled rows that have the same query.

    Attributes:
        left_out: number of rows that became neither a positive nor a negative.
    """

    left_out: int = 0
    _positives: list[Texts] = field(default_factory=list)
    _negatives: list[str] = field(default_factory=list)
    _query: str | None = None

    def add(self, matched: bool | None, texts: Texts) -> list[Texts]:
        """Take a row; when a new query begins, return the finished rows of the previous one."""
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
        """The finished rows of the current query: each positive with all of its negatives."""
        if not self._positives:
            self.left_out += len(self._negatives)
        found = [(q, p, [*n, *self._negatives], *rest) for q, p, n, *rest in self._positives]
        self._positives, self._negatives = [], []
        return found  # type: ignore[return-value]
