"""Hard negatives: texts that an encoder takes for the answer and that are none.

The search is that of sentence-transformers; what is closer to the query than its positive, less a
margin, is rather an answer nobody marked, and left out (NV-Retriever, arXiv 2407.15831).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives

from unmasked.compat.llm2vec import LLM2Vec
from unmasked.errors import DataError
from unmasked.files.writing import written_aside
from unmasked.forward.backbone import join_instruction
from unmasked.recipe.schema import Pairs
from unmasked.train.data.pairs import read_rows


class Mined(NamedTuple):
    """What mining found: rows written, negatives in them, rows without any."""

    rows: int
    negatives: int
    without: int


def mine(
    model: LLM2Vec,
    pairs: Pairs,
    output: Path,
    *,
    negatives: int = 5,
    margin: float = 0.05,
    skip: int = 0,
    depth: int = 100,
    corpus: Sequence[str] = (),
) -> Mined:
    """Search negatives for every row and write the rows with them.

    Cost: encoding each distinct text once, then a product of all queries and documents, in parts.

    Args:
        model: the encoder that is to be fooled.
        pairs: the rows; negatives they have are kept, its instruction stands before the queries.
        output: ``.jsonl`` of query, positive and negatives.
        negatives: most of each row.
        margin: leave out what is nearer to the query than its positive less this share of it.
        skip: nearest documents that are left out whatever they are.
        depth: nearest documents that are looked at.
        corpus: documents besides the positives.

    Raises:
        DataError: a faulty row, or fewer documents than `skip` and `negatives` need.
    """
    rows = list(read_rows(pairs))
    documents = len({*corpus, *(row.positive for row in rows)})
    if documents <= skip + 1:
        raise DataError(
            f"{pairs.path}: {documents} distinct documents, of which the nearest {skip} and the "
            "positive are no negatives. Fix: a smaller --skip, more rows, or --corpus FILE."
        )
    last = min(depth, documents - 1)
    if last <= skip:
        raise DataError(
            f"of the nearest {depth} documents (--depth) the nearest {skip} are left out (--skip), "
            "so that none is left. Fix: a larger --depth, or a smaller --skip."
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
        query_prompt=join_instruction(pairs.instruction[0]) if pairs.instruction else None,
        batch_size=sys.maxsize,  # by tokens
        verbose=False,
    )
    mined: dict[tuple[str, str], list[str]] = {}
    for row in found:
        mined.setdefault((row["q"], row["p"]), []).append(row["negative"])
    count = without = 0
    with written_aside(output) as file:
        for row in rows:
            texts = dict.fromkeys([*row.negatives, *mined.get((row.query, row.positive), [])])
            count, without = count + len(texts), without + (not texts)
            line = {"query": row.query, "positive": row.positive, "negatives": list(texts)}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    return Mined(len(rows), count, without)
