"""Hard negatives: wrong answers that the encoder ranks highly.

A document whose score comes within the margin of the positive's is more likely an answer that
nobody marked, and is left out (NV-Retriever, arXiv 2407.15831); so are the nearest ones, where a
band of ranks says so. `mine_hard_negatives` of sentence-transformers does the same with all texts,
vectors and scores in memory, and anew after every interruption; tests compare the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets

from unmasked.errors import DataError
from unmasked.files.writing import written_aside
from unmasked.model import TextEncoder
from unmasked.recipe.schema import Pairs
from unmasked.text.templates import PLAIN
from unmasked.train.data.pairs import PairRow, line_of, store_rows
from unmasked.train.data.texts import folded, key_of
from unmasked.train.mining import work_folder
from unmasked.train.mining.band import Answers, search_bands
from unmasked.train.mining.work_folder import (
    Distinct,
    NumberedArrays,
    Progress,
    distinct_keys,
    keys_of,
)

INSTRUCTIONS = ("query_instruction", "document_instruction")


class Mined(NamedTuple):
    """What mining wrote: rows, negatives in them, rows without any, and what it left out.

    `answers` counts negatives that their rows had and that answer their query in another row.
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
    corpus: Iterable[str] = (),
    tell: Callable[[str], object] = lambda said: None,
    progress: Progress = lambda what, done, total: None,
) -> Mined:
    """Search negatives for every row and write the rows with them.

    What is cut off goes on with the same call, from a hidden folder beside the output.

    Args:
        model: the encoder whose mistakes are looked for.
        pairs: the rows; negatives they have are kept, the instruction stands before the queries.
        output: ``.jsonl`` of query, positive and negatives.
        negatives: maximum number of new negatives per row.
        margin: share of the score of the query's least positive by which a negative's score must
            lie below it.
        skip: number of nearest documents, answers not counted, that are never negatives.
        depth: number of nearest documents, answers not counted, that are looked at.
        corpus: documents besides the positives.
        tell: as in `pairs.read_rows`.
        progress: told of every shard of vectors, and of every block of the search.

    Raises:
        DataError: a number that cannot be, a faulty row, fewer documents than `skip` and `depth`
            need, or no negative.
    """
    _check(negatives, margin, skip, depth)
    work = _stored(pairs, output, corpus, tell)
    documents = len(work.documents.first)
    last = min(depth, documents - 1)
    if last <= skip:
        work_folder.clear_away(work.folder)
        raise DataError(
            f"{pairs.path}: of {documents} distinct documents the nearest {skip} are left out "
            f"(--skip), only the nearest {depth} are looked at (--depth), and a query's positive "
            "does not count, so that none is left. Fix: a larger --depth, a smaller --skip, more "
            "rows, or --corpus FILE."
        )
    prompt = PLAIN.join(pairs.instruction[0]) if pairs.instruction else None
    facts = {"vectors": [work.digest, model.fingerprint(), prompt], "band": [skip, last]}
    work_folder.begin(work.folder, facts, tell)
    search = _searched(model, work, prompt, (skip, last), progress)
    found = _write(
        output, work, search, (negatives, margin), _nothing_left(pairs, work, skip, margin)
    )
    work_folder.clear_away(work.folder)
    return found


def _check(negatives: int, margin: float, skip: int, depth: int) -> None:
    for name, given, least in (("negatives", negatives, 1), ("skip", skip, 0), ("depth", depth, 1)):
        if given < least:
            raise DataError(f"{name} {given} should be {least} or more. Fix: {name}={least}.")
    if not margin <= 1:
        raise DataError(f"margin {margin} should be 1 or less. Fix: margin=0.05.")


class _Work(NamedTuple):
    """The rows, and which distinct query and document each of them has."""

    folder: Path
    digest: str  # of all texts
    rows: Dataset
    queries: Distinct
    documents: Distinct
    texts: Dataset  # of the distinct documents


class _Search(NamedTuple):
    """The vectors of distinct queries and documents, and the bands of the queries."""

    queries: NumberedArrays
    documents: NumberedArrays
    bands: NumberedArrays
    answers: Answers


def _stored(
    pairs: Pairs, output: Path, corpus: Iterable[str], tell: Callable[[str], object]
) -> _Work:
    """The texts, read and checked anew, in files that are mapped into memory."""
    folder = output.with_name(f".{output.name}.work")
    made = not folder.exists()
    try:
        read = store_rows([pairs], folder / "rows.arrow", tell)["source"]
        more = work_folder.store_texts(corpus, folder / "corpus.arrow")
    except DataError:
        if made:
            work_folder.clear_away(folder)
        raise
    rows = Dataset.from_file(str(folder / "rows.arrow"))
    if any(any(part[name]) for part in rows.iter(work_folder.SHARD) for name in INSTRUCTIONS):
        tell(f"{pairs.path}: the instructions in the rows are kept; the search is without them")
    positives = rows.select_columns("positive").rename_column("positive", "text")
    parts = [positives, Dataset.from_file(str(folder / "corpus.arrow"))]
    every = concatenate_datasets([part for part in parts if len(part)])
    documents = distinct_keys(keys_of(every))
    queries = distinct_keys(keys_of(rows.select_columns("query").rename_column("query", "text")))
    return _Work(folder, f"{read} {more}", rows, queries, documents, every.select(documents.first))


def _searched(
    model: TextEncoder, work: _Work, prompt: str | None, ranks: tuple[int, int], told: Progress
) -> _Search:
    """Encode what has no vectors yet, and search what was not searched yet."""
    asked = work.rows.select(work.queries.first).select_columns("query")
    asked = asked.rename_column("query", "text")
    found: list[NumberedArrays] = []
    plain: dict[str, Any] = {"normalize_embeddings": True, "show_progress_bar": False}
    plain["batch_size"] = None  # by tokens
    for name, texts, encode in (
        ("queries", asked, partial(model.encode_query, prompt=prompt, **plain)),
        ("documents", work.texts, partial(model.encode_document, **plain)),
    ):
        shards = NumberedArrays(work.folder, name, len(texts))
        told_of = partial(_tell_encoded, told, name, len(texts))
        shards.make(partial(_encoded, encode, texts), told_of)
        found.append(shards)
    keys = keys_of(asked, folded), keys_of(work.texts, folded)
    own = work.documents.place[: len(work.rows)]
    answers = Answers(work.queries.place, own, *keys)
    bands = NumberedArrays(work.folder, "band", len(asked))
    search_bands(bands, found[0], found[1], answers, ranks, told, device=model.device)
    return _Search(found[0], found[1], bands, answers)


def _encoded(encode: Callable[..., Any], texts: Dataset, begin: int, end: int) -> np.ndarray:
    return np.asarray(encode(list(texts[begin:end]["text"])), dtype=np.float32)


def _tell_encoded(told: Progress, name: str, total: int, done: int) -> None:
    told(f"encoding {name}", done, total)


def _limits(work: _Work, search: _Search, margin: float) -> np.ndarray:
    """The highest score (Q,) that a negative may have: below the least of the query's positives."""
    least = np.full(len(work.queries.first), np.inf, np.float32)
    for begin in range(0, len(work.rows), work_folder.SHARD):
        rows = slice(begin, min(begin + work_folder.SHARD, len(work.rows)))
        asked, answer = work.queries.place[rows], work.documents.place[rows]
        scores = np.einsum(
            "nd,nd->n", search.queries.gather(asked), search.documents.gather(answer)
        )
        np.minimum.at(least, asked, scores)
    limits: np.ndarray = least - margin * np.abs(least)
    return limits


def _chosen(bands: np.ndarray, limits: np.ndarray, most: int) -> Iterator[list[int]]:
    """The documents of each band that are negatives, the nearest first."""
    for band, limit in zip(bands, limits, strict=True):
        good = (band["place"] >= 0) & (band["score"] <= limit)
        yield band["place"][good][:most].tolist()


def _write(
    output: Path, work: _Work, search: _Search, wanted: tuple[int, float], nothing: DataError
) -> Mined:
    """Write every row with its negatives; raises `nothing` if there are no new ones."""
    most, margin = wanted
    limits = _limits(work, search, margin)
    count = without = answered = mined = 0
    with written_aside(output) as file:
        for begin in range(0, len(work.rows), work_folder.SHARD):
            part = work.rows[begin : begin + work_folder.SHARD]
            rows = [PairRow(*cells) for cells in zip(*map(part.get, PairRow._fields), strict=True)]
            numbers = work.queries.place[begin : begin + work_folder.SHARD]
            chosen = list(_chosen(search.bands.gather(numbers), limits[numbers], most))
            needed = sorted({place for places in chosen for place in places})
            texts = dict(zip(needed, work.texts.select(needed)["text"], strict=True))
            for row, query, places in zip(rows, numbers.tolist(), chosen, strict=True):
                answers = set(search.answers.keys(query).tolist())
                given = [text for text in row.negatives if key_of(folded(text)) not in answers]
                every = list(dict.fromkeys([*given, *(texts[place] for place in places)]))
                answered, mined = answered + len(row.negatives) - len(given), mined + len(places)
                count, without = count + len(every), without + (not every)
                line = json.dumps(line_of(row, every), ensure_ascii=False)
                file.write(line.encode() + b"\n")
        if not mined:
            raise nothing
    return Mined(len(work.rows), count, without, answered)


def _nothing_left(pairs: Pairs, work: _Work, skip: int, margin: float) -> DataError:
    nearer = [f"--margin 0 (now {margin:g})"] if margin else []
    nearer += [f"--skip 0 (now {skip})"] if skip else []
    return DataError(
        f"{pairs.path}: no query has a negative: every document in the band of ranks answers its "
        "query, scores within the margin of its positive, or above it. Fix: the same command with "
        f"{', '.join([*nearer, 'a larger --depth'])} or --corpus FILE; the vectors are kept for it "
        f"in {work.folder}."
    )
