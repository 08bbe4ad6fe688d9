"""Files of training data, row by row: what is copied, what is tested on, what is a false negative.

A row that repeats another one, or has a text of a test, is taken out; a negative that an encoder
places as near to the query as its answer is taken out of its row. Lengths are of all texts,
languages of `SAMPLE` of them, drawn at random and named by lingua.

Cost: `copies`, and with an encoder the encoding of all rows that have negatives.
"""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from unmasked.errors import MissingExtraError
from unmasked.files import readers
from unmasked.files.source import find_files
from unmasked.files.training_source import training_source
from unmasked.files.writing import written_aside
from unmasked.model import TextEncoder
from unmasked.recipe.schema import Pairs
from unmasked.train.checking.copies import Copies
from unmasked.train.data.columns import NAMES
from unmasked.train.data.pairs import PairRow, line_of, read_rows

SAMPLE = 2000
"""Texts whose language is named."""
CHUNK = 512
"""Rows that are encoded at once."""
EXAMPLES = 3
OF = " of "
Write = Callable[[dict[str, Any]], object]


class Item(NamedTuple):
    """A row: where it is from, its texts, and the row itself where it is one of pairs."""

    place: str
    texts: list[str]
    row: PairRow | None


@dataclass
class Findings:
    """What was found in the data.

    Attributes:
        rows, kept: how many there are, and how many are left.
        reasons: why rows or negatives are taken out → how many.
        examples: the same → the first of them.
        lengths: characters of a text: least, median, 95 %, most.
        languages: name of a language → the share of texts in it; empty where nothing names them.
    """

    rows: int = 0
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    lengths: tuple[int, int, int, int] = (0, 0, 0, 0)
    languages: dict[str, float] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        """Count what is taken out."""
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
    """Look through training data, and write what is left of it.

    Args:
        data: files of pairs, or of texts: .txt, with a column ``text`` and none of a query, or as
            ``FILE:text=COLUMN``.
        tests: what a test is called → its texts.
        similarity: see `copies.Copies`.
        encoder: finds false negatives; None looks for none.
        margin: a negative whose score comes within this share of the positive's is a false one.
        write: new .jsonl file of what is left; beside it, ``NAME.removed.jsonl`` says what was
            taken out and why.
        tell: given a line about what was recognised in each file.
        progress: given the number of rows that were read.

    Raises:
        DataError: a file or a row that cannot be trained on.
        MissingExtraError: datasketch is not installed.
    """
    known = Copies(similarity)
    for name, texts in tests.items():
        for number, text in enumerate(texts, start=1):
            known.find(text, add_as=f"text {number:,}{OF}{name}")
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
    """The rows of a data set of pairs or of texts."""
    if isinstance(given, Pairs) and _has_pairs(given):
        for row in read_rows(given, tell=tell):
            texts = [row.query, row.positive, *row.negatives]
            yield Item(f"{given.path}, row {row.number + 1:,}", texts, row)
    else:
        source = training_source(given if isinstance(given, str) else given.path)
        for file in source.files:
            part = replace(source, path=file)
            for line, text, _ in part.records():
                yield Item(f"{part.name}, line {line:,}", [text], None)


def _has_pairs(given: Pairs) -> bool:
    """Whether a data set is one of pairs, by the columns that are named or that it has."""
    if given.query or given.positive:
        return True
    file = find_files(given.path)[0]
    if readers.kind_of(file) == ".txt":
        return False
    first = next(iter(readers.read(file, {})), None)
    there = first.values if first else {}
    return "text" not in there or bool({*NAMES["query"]} & {*there})


def _is_good(item: Item, known: Copies, seen: Copies, found: Findings, drop: Write) -> bool:
    """Whether a row is neither a copy nor in a test; else it is noted."""
    why = None
    shown = item.texts[0]
    for text in item.texts:
        if why is not None or (copy := known.find(text)) is None:
            continue
        shown, name = text, copy.of.partition(OF)[2]
        kind = "a text" if copy.share == 1 else "nearly a text"
        why = f"{kind} of {name}", f"{copy.of} ({copy.share:.0%} alike)"
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
    """The rows without the negatives that lie as near to the query as its answer."""
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
        pairs = list(zip(row.negatives, scores, false, strict=True))
        for text, score, is_false in pairs:
            if is_false:
                said = f"{score:.2f} to the query, its answer {limit:.2f}"
                found.add("false negative", f"{item.place}: {said}: {text[:60]}")
                drop({"place": item.place, "why": "false negative", "of": said, "negative": text})
        yield item._replace(row=row._replace(negatives=[t for t, _, out in pairs if not out]))


def _line(item: Item) -> dict[str, Any]:
    return {"text": item.texts[0]} if item.row is None else line_of(item.row, item.row.negatives)


def _writers(stack: ExitStack, write: Path | None) -> tuple[Write, Write]:
    """Functions that write a line of what is kept, and of what is taken out."""
    if write is None:
        return lambda line: None, lambda line: None
    files = (stack.enter_context(written_aside(p)) for p in (write, removed_of(write)))

    def into(file: IO[bytes]) -> Write:
        return lambda line: file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    kept, removed = map(into, files)
    return kept, removed


def removed_of(write: Path) -> Path:
    """The file that says what was taken out."""
    return write.with_name(f"{write.stem}.removed.jsonl")


class _Sample:
    """Lengths of all texts, and some texts drawn from all with equal chances."""

    def __init__(self) -> None:
        self._lengths, self._drawn, self._random = array("Q"), list[str](), random.Random(0)

    def add(self, texts: Iterable[str]) -> None:
        for text in texts:
            self._lengths.append(len(text))
            if len(self._drawn) < SAMPLE:
                self._drawn.append(text)
            elif (place := self._random.randrange(len(self._lengths))) < SAMPLE:
                self._drawn[place] = text

    def lengths(self) -> tuple[int, int, int, int]:
        if not self._lengths:
            return 0, 0, 0, 0
        least, median, many, most = np.percentile(self._lengths, [0, 50, 95, 100]).astype(int)
        return int(least), int(median), int(many), int(most)

    def languages(self, tell: Callable[[str], object]) -> dict[str, float]:
        try:
            from lingua import LanguageDetectorBuilder
        except ImportError:
            tell(f"languages are not named: {MissingExtraError('lingua', 'data')}")
            return {}
        detector = LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()
        named = detector.detect_languages_in_parallel_of(self._drawn)
        counts = Counter(one.name.capitalize() if one else "none told" for one in named)
        return {name: count / len(named) for name, count in counts.most_common()}
