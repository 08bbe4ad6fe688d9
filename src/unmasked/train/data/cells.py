"""What a cell of a training file contains: one text, several, passages with titles, or nothing.

In .csv a list is written as JSON, or as Python prints it; read as one text, it would train the
model on brackets and quotes. .jsonl and .parquet have real lists, so there a string that merely
begins like a list is a text, as in documentation of code. Tevatron's passages are objects of title
and text, GritLM's are pairs of an instruction and a text.

Cost: a look at the first character of each cell.
"""

from __future__ import annotations

import ast
import io
import json
import math
import tokenize
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from typing import Any, NamedTuple

from unmasked.files.content import Fault
from unmasked.files.readers import string_fault


class GivenText(NamedTuple):
    """A text, and the instruction that its cell gives for it, if any."""

    text: str
    instruction: str = ""


class FaultyCell(ValueError):
    """A cell with something else than texts.

    Attributes:
        fault: what is wrong with it, and how to correct it.
    """

    def __init__(self, given: str, fix: str) -> None:
        super().__init__(given)
        self.fault: Fault = given, fix


class ListsInStrings(Enum):
    """Whether a string may be a written list of texts; depends on the file and the column."""

    ONLY = "the file can have no other lists, or the column has lists: what looks like one is one"
    PERHAPS = "a string that can be read as a list from beginning to end is taken as one"
    NEVER = "the column has one text, and the file would have a real list for several"


def passages_of(
    column: str,
    value: object,
    fix: str = "remove it",
    written: ListsInStrings = ListsInStrings.ONLY,
) -> list[GivenText]:
    """The texts of a cell, in order; none if it is null or an empty string.

    Args:
        column: the column, for errors.
        value: the content of the cell.
        fix: how to correct an empty text.
        written: whether a string may be a written list.

    Raises:
        FaultyCell: it contains something else than texts.
    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, str) and written is not ListsInStrings.NEVER:
        value = written_list(column, value, strict=written is ListsInStrings.ONLY)
    if isinstance(value, Mapping | str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise FaultyCell(f"'{column}' is a {type(value).__name__}", "give a list")
    return [_passage(column, item, fix) for item in value]


def query_of(column: str, value: object) -> GivenText:
    """The query of a cell: a text, or GritLM's pair of an instruction and a text.

    Raises:
        FaultyCell: it contains something else.
    """
    return _passage(column, value, "remove the row")


def numbers_of(column: str, value: object, count: int) -> list[float]:
    """The scores of a cell: `count` finite numbers.

    Raises:
        FaultyCell: it contains something else, or another number of them.
    """
    found = _written_numbers(column, value)
    items = found if isinstance(found, list | tuple) else [] if found is None else [found]
    numbers = [_number(column, item) for item in items]
    if len(numbers) != count:
        given = f"'{column}' has {len(numbers)} numbers, and the row has {count} documents"
        raise FaultyCell(given, "give one of each positive, then one of each negative")
    return numbers


def vectors_of(column: str, value: object, count: int) -> list[list[float]]:
    """The vectors of a cell: `count` vectors of the same width.

    Raises:
        FaultyCell: it contains something else, or another number of them.
    """
    found = _written_numbers(column, value)
    if not isinstance(found, list | tuple) or not all(isinstance(v, list | tuple) for v in found):
        given = f"'{column}' is a {type(found).__name__}"
        raise FaultyCell(given, "give a list of vectors, which are lists of numbers")
    vectors = [[_number(column, item) for item in vector] for vector in found]
    if len(vectors) != count or len({*map(len, vectors)}) != 1 or not vectors[0]:
        widths = ", ".join(map(str, sorted({*map(len, vectors)})))
        given = f"'{column}' has {len(vectors)} vectors of {widths or 'no'} numbers, and the row "
        fix = "give one of the query, of each positive, then of each negative, of one width"
        raise FaultyCell(given + f"has {count} texts", fix)
    return vectors


def _written_numbers(column: str, value: object) -> object:
    """Parse a string of numbers, as .csv has them; return anything else unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        given = f"'{column}' is {value!r:.40}"
        raise FaultyCell(given, "give numbers, a list of them as JSON: [0.9, 0.1]") from None


def _number(column: str, item: object) -> float:
    number = math.nan
    if isinstance(item, int | float) and not isinstance(item, bool):
        with suppress(OverflowError):  # a whole number may be larger than any float
            number = float(item)
    if not math.isfinite(number):
        given = f"a {type(item).__name__}" if isinstance(item, list | dict) else f"{item!r:.40}"
        raise FaultyCell(f"'{column}' holds {given}", "give finite numbers")
    return number


def _passage(column: str, item: object, fix: str) -> GivenText:
    instruction = ""
    if isinstance(item, list | tuple):
        if len(item) != 2 or not all(isinstance(part, str) for part in item):
            given = f"'{column}' has a {type(item).__name__} of {len(item)}"
            raise FaultyCell(given, "give texts, or pairs of an instruction and a text")
        instruction, item = item
    elif isinstance(item, Mapping):
        item = _titled(column, item)
    if (fault := string_fault(column, item)) is not None:
        raise FaultyCell(*fault)
    if not str(item).strip():
        raise FaultyCell(f"'{column}' is empty, which has no vector", fix)
    return GivenText(str(item), str(instruction))


def _titled(column: str, item: Mapping[str, Any]) -> str:
    """Title and text of a passage, joined as in retrieval tasks."""
    title, text = item.get("title") or "", item.get("text")
    if not (isinstance(title, str) and isinstance(text, str)):
        given = f"'{column}' is a dict of {', '.join(map(str, item)) or 'nothing'}"
        raise FaultyCell(given, "give texts, or objects with a string 'text' and perhaps 'title'")
    return text if text.startswith(title) else f"{title} {text}".strip()


def written_list(column: str, value: str, strict: bool = True) -> object:
    """Read a list that is written as JSON or as Python prints it; return other strings unchanged.

    Raises:
        FaultyCell: it looks like a list of texts and cannot be read as one, and `strict` is True.
    """
    if not (value.startswith("[") and value.rstrip().endswith("]")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            found = None  # among them a dict with a list as its key, and thousands of brackets
        if isinstance(found, list) and _strings(value) > len(_flat(found)):
            # numpy prints strings without commas between them, and Python joins such literals.
            found = None
    if isinstance(found, list) and all(isinstance(item, str | dict | list) for item in found):
        return found
    if strict and value[1:].lstrip().startswith(("'", '"')):
        given = f"'{column}' looks like a list and cannot be read as one: {value[:40]!r}"
        fix = "write it as JSON: frame.to_json('FILE.jsonl', orient='records', lines=True)"
        raise FaultyCell(given, fix)
    return value


def _strings(code: str) -> int:
    """The number of string literals in a list that Python can read."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return sum(token.type == tokenize.STRING for token in tokens)


def _flat(items: list[Any]) -> list[object]:
    """Every item of a list and of the lists in it, and every string of the dictionaries in it."""
    flat: list[object] = []
    for item in items:
        if isinstance(item, dict):
            flat += [part for part in (*item, *item.values()) if isinstance(part, str)]
        elif isinstance(item, list | tuple):
            flat += _flat(list(item))
        else:
            flat.append(item)
    return flat
