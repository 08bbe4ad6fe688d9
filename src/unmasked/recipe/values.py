"""How a value is written in a recipe or behind an option: numbers, one for a list, data sets.

Each function is given what stands there, before the schema looks at it, and raises `ValueError` for
what it cannot read. Cost: nothing worth a number.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field


def number(value: object) -> object:
    """PyYAML reads ``2e-4`` as text, and pydantic takes ``true`` for 1."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    if isinstance(value, str | bool):
        raise ValueError("should be a number")
    return value


def one_or_more(value: object) -> object:
    """One path stands for a list of one."""
    if isinstance(value, str | os.PathLike):
        value = [value]
    if isinstance(value, list | tuple):
        return [os.fspath(item) if isinstance(item, os.PathLike) else item for item in value]
    return value


def data_sets(value: object) -> object:
    """A path stands for a data set whose other settings have their defaults."""
    given = one_or_more(value)
    items = given if isinstance(given, list) else [given]
    return [_data_set(item) if isinstance(item, str) else item for item in items]


_WITH_COLUMNS = re.compile(r"(.+?):(\w+=[^,]+(?:,\w+=[^,]+)*)")


def _data_set(text: str) -> dict[str, Any]:
    """``FILE``, or ``FILE:query=anchor,positive=text`` with settings of `Pairs` behind it."""
    match = _WITH_COLUMNS.fullmatch(text)
    if match is None:
        return {"path": text}
    given: dict[str, Any] = {"path": match[1]}
    for setting in match[2].split(","):
        key, _, name = setting.partition("=")
        if key == "path" or (key in given and key != "negative"):
            raise ValueError(f"'{text}' gives '{key}' twice")
        given[key] = [*given.get(key, []), name] if key == "negative" else name
    return given


Count = Annotated[int, Field(ge=1), BeforeValidator(number)]
AtLeastTwo = Annotated[Count, Field(ge=2)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32), BeforeValidator(number)]
Whole = Annotated[int, Field(ge=0), BeforeValidator(number)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(number)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(number)]
Share = Annotated[float, Field(gt=0, le=1), BeforeValidator(number)]
Dropout = Annotated[float, Field(ge=0, lt=1), BeforeValidator(number)]
Strings = Annotated[list[str], BeforeValidator(one_or_more)]


STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
"""Of every section of a recipe: a key that it does not know is an error."""
