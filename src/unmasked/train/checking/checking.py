"""Checks files of training data, row by row, for copies, test texts and false negatives.

A row that repeats another row, or has a text of a test set, is removed. A negative that an encoder
scores as high as the positive is removed from its row. Lengths are measured on all texts, languages
(by lingua) on a random sample of `SAMPLE` texts.

Cost: `copies`, and with an encoder the encoding of all rows that have negatives.
"""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from unmasked.errors import MissingExtraError
from unmasked.files import readers
from unmasked.files.training_source import training_source
from unmasked.files.writing import written_aside
from unmasked.model import TextEncoder
from unmasked.recipe.schema import Pairs
from unmasked.train.checking.copies import Copies
from unmasked.train.data.columns import NAMES
from unmasked.train.data.pairs import PairRow, first_columns, line_of, placed_rows

SAMPLE = 2000
"""Number of texts whose language is detected."""
CHUNK = 512
"""Rows that are checked, and encoded, at a time."""
EXAMPLES = 3
OF = " of "
"""Joins the number of a text and the name of its test set into a label, and separates them."""
Write = Callable[[dict[str, Any]], object]


class Item(NamedTuple):
    """A row: its file and line, its texts, and the `PairRow` if it is one."""

    place: str
    texts: list[str]
    row: PairRow | None


@dataclass
class Findings:
    """What was found in the data.

    Attributes:
        rows, kept: number of rows, and of those that are kept.
        reasons: reason → number of rows or negatives that are removed for it.
        examples: reason → the first of them.
        lengths: characters of a text: minimum, median, 95th percentile, maximum.
        languages: language → share of the texts; empty if lingua is not installed.
    """

    rows: int = 0
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    lengths: tuple[int, int, int, int] = (0, 0, 0, 0)
    languages: dict[str, float] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        """Count a row or negative that is removed."""
        self.reasons[reason] += 1
        known = self.examples.setdefault(reason, [])
        if len(known) < EXAMPLES:
            known.append(example)


def check_data(
    data: Sequence[Pairs | str],
    tests: Mapping[str, Iterable[str]],
    *,
    similarity: float = 0.8,
    encoder: TextEncoder | None = None,
    margin: float = 0.05,
    write: Path | None = None,
    tell: Callable[[str], object] = lambda said: None,
    progress: Callable[[int], object] = lambda rows: None,
) -> Findings:
    """Check training data, and write the rows that are sound.

    Args:
        data: files of pairs, or of texts: .txt, a file with a column ``text`` and no column of
            queries, ``FILE:text=COLUMN``, ``documents:PATH``, or ``-``, standard input.
        tests: name of a test set → its texts.
        similarity: see `copies.Copies`.
        encoder: used to find false negatives; None does not look for them.
        margin: a negative whose score comes within this share of the positive's is a false one.
        write: a new .jsonl file for the sound rows, with a teacher's scores or vectors if they have
            any; beside it, ``NAME.removed.jsonl`` says what was removed and why.
        tell: called with a line about the columns of each file.
        progress: called with the number of rows read so far.

    Raises:
        DataError: a file or a row cannot be used for training.
        MissingExtraError: datasketch is not installed.
    """
    known = Copies(similarity)
    for name, texts in tests.items():
        for number, text in enumerate(texts, start=1):
            known.add(text, f"text {number:,}{OF}{name}")
    seen, found, sample = Copies(similarity), Findings(), _Sample()
    with ExitStack() as stack:
        keep, drop = _writers(stack, write)
        items = iter(item for given in data for item in items_of(given, tell))
        while chunk := list(islice(items, CHUNK)):
            found.rows += len(chunk)
            sample.add(text for item in chunk for text in item.texts)
            left = [item for item in chunk if _is_good(item, known, seen, found, drop)]
            if encoder is not None:
                left = list(_true_negatives(left, encoder, margin, found, drop))
            found.kept += len(left)
            for item in left:
                keep(_line(item))
            progress(found.rows)
    found.lengths, found.languages = sample.lengths(), sample.languages(tell)
    return found


def items_of(given: Pairs | str, tell: Callable[[str], object]) -> Iterator[Item]:
    """The rows of a data set of pairs or of texts, as training reads them."""
    if isinstance(given, Pairs) and _has_pairs(given):
        for place, row in placed_rows(given, tell=tell, keep=True):
            yield Item(place, [row.query, row.positive, *row.negatives], row)
        return
    source = training_source(given if isinstance(given, str) else given.path)
    empty = True
    for line in source.rows():
        if line.fault is not None:
            raise source.error(line)
        file, empty = source.files[line.file], False
        yield Item(file if source.whole else readers.where(file, line.number), [line.text], None)
    if empty:
        raise source.empty()


def _has_pairs(given: Pairs) -> bool:
    """Whether a data set has pairs, not plain texts, judged by its columns."""
    if given.query or given.positive:
        return True
    source = training_source(given.path)
    if source.whole or not source.again:  # documents, and standard input
        return False
    tables = [file for file in source.files if readers.kind_of(file) != ".txt"]
    there = first_columns(tables[0]) if tables else ["text"]
    return "text" not in there or bool({*NAMES["query"]} & {*there})


def _is_good(item: Item, known: Copies, seen: Copies, found: Findings, drop: Write) -> bool:
    """Whether a row is no copy and has no text of a test set; if it does, that is recorded.

    Args:
        item: the row.
        known: the texts of the test sets.
        seen: the rows before this one, to which it is added.
        found: counts what is removed.
        drop: writes what is removed.
    """
    why = None
    shown = item.texts[0]
    for text in item.texts:
        if copy := known.find(text):
            shown, name = text, copy.of.partition(OF)[2]
            kind = "a text" if copy.share == 1 else "nearly a text"
            why = f"{kind} of {name}", f"{copy.of} ({copy.share:.0%} alike)"
            break
    if why is None:
        whole = "\n".join(item.texts[:2])  # query and positive; negatives may differ
        if copy := seen.find(whole, add_as=item.place):
            kind = "exact" if copy.share == 1 else "near"
            why = f"{kind} copy of another row", f"{copy.of} ({copy.share:.0%} alike)"
    if why is None:
        return True
    found.add(why[0], f"{item.place}: {why[1]}: {shown[:60]}")
    drop({"place": item.place, "why": why[0], "of": why[1], "row": _line(item)})
    return False


def _true_negatives(
    items: Sequence[Item], encoder: TextEncoder, margin: float, found: Findings, drop: Write
) -> Iterator[Item]:
    """The rows without the negatives that score as high as the positive, or within the margin."""
    rows = [item.row for item in items if item.row is not None and item.row.negatives]
    options: dict[str, Any] = {"normalize_embeddings": True, "show_progress_bar": False}
    queries = list(dict.fromkeys(row.query for row in rows))
    documents = list(dict.fromkeys(t for row in rows for t in (row.positive, *row.negatives)))
    asked = dict(zip(queries, encoder.encode_query(queries, **options), strict=True))
    stored = dict(zip(documents, encoder.encode_document(documents, **options), strict=True))
    for item in items:
        row = item.row
        if row is None or not row.negatives:
            yield item
            continue
        query, limit = asked[row.query], float(asked[row.query] @ stored[row.positive])
        scores = [float(query @ stored[text]) for text in row.negatives]
        false = [score > limit - margin * abs(limit) for score in scores]
        for text, score, is_false in zip(row.negatives, scores, false, strict=True):
            if is_false:
                said = f"{score:.2f} to the query, its answer {limit:.2f}"
                found.add("false negative", f"{item.place}: {said}: {text[:60]}")
                drop({"place": item.place, "why": "false negative", "of": said, "negative": text})
        yield item._replace(row=_without_negatives(row, false))


def _without_negatives(row: PairRow, removed: Sequence[bool]) -> PairRow:
    """A row without some of its negatives, and without a teacher's scores or vectors of them."""

    def left(values: Sequence[Any], before: int) -> list[Any]:
        flags = [False] * before + [*removed]
        return [v for v, out in zip(values, flags, strict=True) if not out] if values else []

    negatives, scores = left(row.negatives, 0), left(row.scores, 1)
    return row._replace(negatives=negatives, scores=scores, vectors=left(row.vectors, 2))


def _line(item: Item) -> dict[str, Any]:
    return {"text": item.texts[0]} if item.row is None else line_of(item.row, item.row.negatives)


def _writers(stack: ExitStack, write: Path | None) -> tuple[Write, Write]:
    """Functions that write an object to the file of kept rows, and to that of removed ones."""
    if write is None:
        return lambda line: None, lambda line: None
    files = (stack.enter_context(written_aside(p)) for p in (write, removed_of(write)))

    def into(file: IO[bytes]) -> Write:
        return lambda line: file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    kept, removed = map(into, files)
    return kept, removed


def removed_of(write: Path) -> Path:
    """The file that says what was removed."""
    return write.with_name(f"{write.stem}.removed.jsonl")


class _Sample:
    """Lengths of all texts, and a uniform random sample of them (reservoir sampling)."""

    def __init__(self) -> None:
        self._lengths, self._drawn, self._random = array("Q"), list[str](), random.Random(0)

    def add(self, texts: Iterable[str]) -> None:
        for text in texts:
            self._lengths.append(len(text))
            if len(self._drawn) < SAMPLE:
                self._drawn.append(text)
            elif (place := self._random.randrange(len(self._lengths))) < SAMPLE:
                self._drawn[place] = text  # the n-th text enters with probability SAMPLE / n

    def lengths(self) -> tuple[int, int, int, int]:
        if not self._lengths:
            return 0, 0, 0, 0
        least, median, many, most = np.percentile(self._lengths, [0, 50, 95, 100]).astype(int)
        return int(least), int(median), int(many), int(most)

    def languages(self, tell: Callable[[str], object]) -> dict[str, float]:
        try:
            from lingua import LanguageDetectorBuilder
        except ImportError:
            tell(f"languages are not detected: {MissingExtraError('lingua', 'data')}")
            return {}
        detector = LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()
        named = detector.detect_languages_in_parallel_of(self._drawn)
        counts = Counter(one.name.capitalize() if one else "unknown" for one in named)
        return {name: count / len(named) for name, count in counts.most_common()}
