"""Hard negatives: wrong answers that the encoder ranks highly.

A document whose score comes within the margin of the positive's is more likely an unlabelled
answer, and is left out (NV-Retriever, arXiv 2407.15831); with `skip`, so are the nearest ones.
`mine_hard_negatives` of sentence-transformers does the same with all texts, vectors and scores in
memory, and starts again after every interruption; tests compare the two.
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
from unmasked.files.writing import folder_for_one, written_aside
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

LOCK = ".lock"
INSTRUCTIONS = ("query_instruction", "document_instruction")


class Mined(NamedTuple):
    """Counts of what mining wrote.

    Attributes:
        rows, negatives: number of rows, and of the negatives in them.
        without: rows without a negative.
        answers: negatives that were removed from the given rows, because they answer the query in
            another row.
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
    """Find negatives for every row, and write the rows with them.

    The same call continues an interrupted one, from a hidden folder beside the output.

    Args:
        model: the encoder whose mistakes become negatives.
        pairs: the rows. Negatives that they have are kept; the data set's first instruction is the
            prompt of the queries, and is written to each row that has none of its own.
        output: a ``.jsonl`` file of query, positive and negatives.
        negatives: maximum number of new negatives per row.
        margin: a negative must score lower than the query's lowest positive by at least this share
            of that positive's score.
        skip: number of nearest documents, answers not counted, that are never negatives.
        depth: number of nearest documents, answers not counted, that are candidates.
        corpus: further documents besides the positives.
        tell: as in `pairs.read_rows`.
        progress: called after every shard of vectors, and after every block of the search.

    Raises:
        DataError: an argument is out of range, a row is faulty, there are fewer documents than
            `skip` requires, a column of a teacher is named, or no negative was found.
        OutputError: another process mines to the same file, or it cannot be written.
    """
    _check(negatives, margin, skip, depth)
    _check_teacher(pairs)
    folder = output.with_name(f".{output.name}.work")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with folder_for_one(folder, LOCK):
        try:
            work = _store(pairs, folder, corpus, tell)
            last = _last_rank(pairs, work, skip, depth)
        except DataError:
            if is_new:
                work_folder.clear_away(folder)
            raise
        prompt = PLAIN.join(pairs.instruction[0]) if pairs.instruction else None
        facts = {"vectors": [work.digest, model.fingerprint(), prompt], "band": [skip, last]}
        work_folder.begin(folder, facts, tell)
        search = _search(model, work, prompt, (skip, last), progress)
        nothing_found = _nothing_found(pairs, work, skip, margin)
        found = _write(output, pairs, work, search, (negatives, margin), nothing_found)
        work_folder.clear_away(folder)
    return found


def _last_rank(pairs: Pairs, work: _Work, skip: int, depth: int) -> int:
    """The number of candidates of a query, with those that are skipped; refuses a band of none."""
    documents = len(work.documents.first)
    last = min(depth, documents - 1)
    if last <= skip:
        raise DataError(
            f"{pairs.path}: of {documents} distinct documents the nearest {skip} are left out "
            f"(--skip), only the nearest {depth} are candidates (--depth), and a query's positive "
            "does not count, so none is left. Fix: a larger --depth, a smaller --skip, more "
            "rows, or --corpus FILE."
        )
    return last


def _check_teacher(pairs: Pairs) -> None:
    """Refuse a teacher's scores or vectors: the negatives that are found would have none."""
    if pairs.teacher is not None:
        raise DataError(
            f"{pairs.path}: '{pairs.teacher}' is named as the column of a teacher, and the "
            "negatives that are found have no scores or vectors of it. Fix: leave it out, and "
            "train with supervised.teacher=MODEL, which computes them."
        )


def _check(negatives: int, margin: float, skip: int, depth: int) -> None:
    for name, given, least in (("negatives", negatives, 1), ("skip", skip, 0), ("depth", depth, 1)):
        if given < least:
            raise DataError(f"{name} {given} should be {least} or more. Fix: {name}={least}.")
    if not margin <= 1:
        raise DataError(f"margin {margin} should be 1 or less. Fix: margin=0.05.")


class _Work(NamedTuple):
    """The rows, and which distinct query and document each row has."""

    folder: Path
    digest: str  # of all rows and texts
    rows: Dataset
    queries: Distinct
    documents: Distinct
    texts: Dataset  # of the distinct documents


class _Search(NamedTuple):
    """The vectors of distinct queries and documents, and the documents found for each query."""

    queries: NumberedArrays
    documents: NumberedArrays
    bands: NumberedArrays
    answers: Answers


def _store(
    pairs: Pairs, folder: Path, corpus: Iterable[str], tell: Callable[[str], object]
) -> _Work:
    """Read and check all texts, and store them in memory-mapped files, also when continuing."""
    pairs = pairs.model_copy(update={"instruction": []})  # which would hide those of the rows
    rows_digest = store_rows([pairs], folder / "rows.arrow", tell)["source"]
    corpus_digest = work_folder.store_texts(corpus, folder / "corpus.arrow")
    rows = Dataset.from_file(str(folder / "rows.arrow"))
    if any(any(part[name]) for part in rows.iter(work_folder.SHARD) for name in INSTRUCTIONS):
        tell(f"{pairs.path}: the rows keep their own instructions; the search does not use them")
    positives = rows.select_columns("positive").rename_column("positive", "text")
    parts = [positives, Dataset.from_file(str(folder / "corpus.arrow"))]
    every = concatenate_datasets([part for part in parts if len(part)])
    documents = distinct_keys(keys_of(every))
    queries = distinct_keys(keys_of(rows.select_columns("query").rename_column("query", "text")))
    digest = f"{rows_digest} {corpus_digest}"
    return _Work(folder, digest, rows, queries, documents, every.select(documents.first))


def _search(
    model: TextEncoder, work: _Work, prompt: str | None, ranks: tuple[int, int], progress: Progress
) -> _Search:
    """Encode the texts and search the queries for which there is no file yet."""
    asked = work.rows.select(work.queries.first).select_columns("query")
    asked = asked.rename_column("query", "text")
    options: dict[str, Any] = {"normalize_embeddings": True, "show_progress_bar": False}
    options["batch_size"] = None  # batches are cut by tokens

    def encoded(name: str, texts: Dataset, encode: Callable[..., Any]) -> NumberedArrays:
        def compute(begin: int, end: int) -> np.ndarray:
            return np.asarray(encode(list(texts[begin:end]["text"]), **options), dtype=np.float32)

        vectors = NumberedArrays(work.folder, name, len(texts))
        vectors.make(compute, lambda done: progress(f"encoding {name}", done, len(texts)))
        return vectors

    queries = encoded("queries", asked, partial(model.encode_query, prompt=prompt))
    documents = encoded("documents", work.texts, model.encode_document)
    keys = keys_of(asked, folded), keys_of(work.texts, folded)
    own = work.documents.place[: len(work.rows)]  # the rows' positives; the corpus comes after them
    answers = Answers(work.queries.place, own, *keys)
    bands = NumberedArrays(work.folder, "band", len(asked))
    search_bands(bands, queries, documents, answers, ranks, progress, device=model.device)
    return _Search(queries, documents, bands, answers)


def _limits(work: _Work, search: _Search, margin: float) -> np.ndarray:
    """(Q,) the highest score that a negative may have: the lowest positive's, less the margin."""
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
    """The documents of each query's band that become negatives, the nearest first."""
    for band, limit in zip(bands, limits, strict=True):
        good = (band["place"] >= 0) & (band["score"] <= limit)
        yield band["place"][good][:most].tolist()


def _write(
    output: Path,
    pairs: Pairs,
    work: _Work,
    search: _Search,
    wanted: tuple[int, float],
    nothing: DataError,
) -> Mined:
    """Write every row with its negatives; raises `nothing` if there are no new ones.

    Args:
        output, pairs, work, search: where to, the data set, its rows, and what was found.
        wanted: maximum number of new negatives per row, and the margin.
        nothing: the error if no row got a negative.
    """
    most, margin = wanted
    limits = _limits(work, search, margin)
    instruction = next(iter(pairs.instruction), "")
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
                row = row._replace(query_instruction=row.query_instruction or instruction)
                line = json.dumps(line_of(row, every), ensure_ascii=False)
                file.write(line.encode() + b"\n")
        if not mined:
            raise nothing
    return Mined(len(work.rows), count, without, answered)


def _nothing_found(pairs: Pairs, work: _Work, skip: int, margin: float) -> DataError:
    fixes = [f"--margin 0 (now {margin:g})"] if margin else []
    fixes += [f"--skip 0 (now {skip})"] if skip else []
    return DataError(
        f"{pairs.path}: no query has a negative: every candidate answers its query, or scores "
        "higher than the positive less the margin. Fix: the same command with "
        f"{', '.join([*fixes, 'a larger --depth'])} or --corpus FILE; the vectors are kept for it "
        f"in {work.folder}."
    )
