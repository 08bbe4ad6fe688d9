"""Hard negatives: wrong answers that the encoder ranks highly.

The search is `mine_hard_negatives` of sentence-transformers. A document whose score comes within
the margin of the positive's is more likely an answer that nobody marked, and is left out
(NV-Retriever, arXiv 2407.15831). Cost: encoding each distinct text once, then the product of all
queries and documents, in parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives

from unmasked.errors import DataError
from unmasked.files.writing import written_aside
from unmasked.model import TextEncoder
from unmasked.recipe.schema import Pairs
from unmasked.text.templates import PLAIN
from unmasked.train.data.pairs import PairRow, read_rows


class Mined(NamedTuple):
    """What mining wrote: rows, negatives in them, rows without any, and what it left out.

    `answers` counts negatives, given or found, that answer their query in another row.
    """

    rows: int
    negatives: int
    without: int
    answers: int = 0


def mine(
    model: TextEncoder,
    pairs: Pairs,
    output: Path,
    *,
    negatives: int = 5,
    margin: float = 0.05,
    skip: int = 0,
    depth: int = 100,
    corpus: Sequence[str] = (),
    tell: Callable[[str], object] = lambda said: None,
) -> Mined:
    """Search negatives for every row and write the rows with them.

    Args:
        model: the encoder whose mistakes are looked for.
        pairs: the rows; negatives they have are kept, the instruction stands before the queries.
        output: ``.jsonl`` of query, positive and negatives.
        negatives: maximum number of new negatives per row.
        margin: share of the positive's score by which a negative's score must lie below it.
        skip: number of nearest documents that are never negatives.
        depth: number of nearest documents that are looked at.
        corpus: documents besides the positives.
        tell: as in `pairs.read_rows`.

    Raises:
        DataError: a faulty row, or fewer documents than `skip` and `depth` need.
    """
    rows = list(read_rows(pairs, tell=tell))
    if any(row.query_instruction or row.document_instruction for row in rows):
        tell(f"{pairs.path}: the instructions in the rows are kept; the search is without them")
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row.query, {row.query}).add(row.positive)
    documents = len({*corpus, *(row.positive for row in rows)})
    last = min(depth, documents - 1)
    if last <= skip:
        raise DataError(
            f"{pairs.path}: of {documents} distinct documents the nearest {skip} are left out "
            f"(--skip), only the nearest {depth} are looked at (--depth), and a query's positive "
            "does not count, so that none is left. Fix: a larger --depth, a smaller --skip, more "
            "rows, or --corpus FILE."
        )
    found = mine_hard_negatives(
        Dataset.from_dict({"q": [r.query for r in rows], "p": [r.positive for r in rows]}),
        model,
        anchor_column_name="q",
        positive_column_name="p",
        corpus=list(corpus) or None,
        relative_margin=margin,
        range_min=skip,
        range_max=last,
        num_negatives=min(negatives, last - skip),
        query_prompt=PLAIN.join(pairs.instruction[0]) if pairs.instruction else None,
        batch_size=None,  # type: ignore[arg-type]  # handed on to `encode`: by tokens
        verbose=False,
    )
    mined: dict[tuple[str, str], list[str]] = {}
    for row in found:
        mined.setdefault((row["q"], row["p"]), []).append(row["negative"])
    count = without = answered = 0
    with written_aside(output) as file:
        for row in rows:
            given = dict.fromkeys(row.negatives + mined.get((row.query, row.positive), []))
            texts = [text for text in given if text not in answers[row.query]]
            answered += len(given) - len(texts)
            count, without = count + len(texts), without + (not texts)
            line = _line(row, texts)
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    return Mined(len(rows), count, without, answered)


def _line(row: PairRow, negatives: Sequence[str]) -> dict[str, Any]:
    """A row as `read_rows` reads it, with the instructions that its file gave it."""

    def told(text: str) -> str | list[str]:
        return [row.document_instruction, text] if row.document_instruction else text

    line: dict[str, Any] = {"query": row.query, "positive": told(row.positive)}
    if row.document_instruction:
        line["positive"] = [line["positive"]]
    line["negatives"] = [told(text) for text in negatives]
    if row.query_instruction:
        line["instruction"] = row.query_instruction
    return line
