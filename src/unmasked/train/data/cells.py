"""What stands in a cell of a training file: one text, several, passages with titles, or nothing.

.jsonl and .parquet have lists; in .csv a list is written as JSON, or as Python prints it, and
taken for one text it would train on brackets and quotes. Tevatron's passages are objects of title
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
from typing import Any, NamedTuple

from unmasked.files.content import Fault
from unmasked.files.readers import string_fault


class GivenText(NamedTuple):
    """A text, and what stands before it if its cell says so."""

    text: str
    instruction: str = ""


class FaultyCell(ValueError):
    """A cell that holds no texts.

    Attributes:
        fault: what is wrong with it and how to correct it.
    """

    def __init__(self, given: str, fix: str) -> None:
        super().__init__(given)
        self.fault: Fault = given, fix


def passages_of(column: str, value: object, fix: str = "remove it") -> list[GivenText]:
    """The texts of a cell, in order; none where it is null or an empty string.

    Args:
        column: the column, for errors.
        value: what stands there.
        fix: how to correct an empty text.

    Raises:
        FaultyCell: it holds something else than texts.
    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, str):
        value = written_list(column, value)
    if isinstance(value, Mapping | str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise FaultyCell(f"'{column}' is a {type(value).__name__}", "give a list")
    return [_passage(column, item, fix) for item in value]


def query_of(column: str, value: object) -> GivenText:
    """The query of a cell: a text, or GritLM's pair of an instruction and a text.

    Raises:
        FaultyCell: it holds something else.
    """
    return _passage(column, value, "remove the row")


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
    """Title and text of a passage, as retrieval tasks join them."""
    title, text = item.get("title") or "", item.get("text")
    if not (isinstance(title, str) and isinstance(text, str)):
        given = f"'{column}' is a dict of {', '.join(map(str, item)) or 'nothing'}"
        raise FaultyCell(given, "give texts, or objects with a string 'text' and perhaps 'title'")
    return text if text.startswith(title) else f"{title} {text}".strip()


def written_list(column: str, value: str) -> object:
    """The list that a cell was written from, as JSON or as Python prints it; else the text itself.

    Raises:
        FaultyCell: it looks like a list of texts and cannot be read as one.
    """
    if not (value.startswith("[") and value.rstrip().endswith("]")):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        try:
            found = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError):
            found = None
        if isinstance(found, list) and _strings(value) > len(_flat(found)):
            found = None  # strings without commas between them, which Python joins: numpy's way
    if isinstance(found, list) and all(isinstance(item, str | dict | list) for item in found):
        return found
    if value[1:].lstrip().startswith(("'", '"')):
        given = f"'{column}' looks like a list and cannot be read as one: {value[:40]!r}"
        fix = "write it as JSON: frame.to_json('FILE.jsonl', orient='records', lines=True)"
        raise FaultyCell(given, fix)
    return value


def _strings(code: str) -> int:
    """How many strings are written in a list that Python can read."""
    words = tokenize.generate_tokens(io.StringIO(code).readline)
    return sum(word.type == tokenize.STRING for word in words)


def _flat(items: list[Any]) -> list[object]:
    """Every string of a list, and those of the lists and dictionaries in it, keys included."""
    flat: list[object] = []
    for item in items:
        if isinstance(item, dict):
            flat += [part for part in (*item, *item.values()) if isinstance(part, str)]
        elif isinstance(item, list | tuple):
            flat += _flat(list(item))
        else:
            flat.append(item)
    return flat
