"""How values are written in a recipe or an option: numbers, lists, data sets.

Each function converts a value before the schema checks it, and raises `ValueError` if it cannot.
Cost: negligible.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def number(value: object) -> object:
    """Convert text to a number, because PyYAML reads ``2e-4`` as text, and refuse booleans."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    if isinstance(value, str | bool):
        raise ValueError("should be a number")
    return value


_WITH_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)e[-+]?\d+", re.IGNORECASE)


def arguments(value: object) -> object:
    """Convert text such as ``1e-8`` among values whose types are not known; ``"2024"`` is text."""
    if not isinstance(value, dict):
        return value
    exponents = {k for k, v in value.items() if isinstance(v, str) and _WITH_EXPONENT.fullmatch(v)}
    return {key: float(item) if key in exponents else item for key, item in value.items()}


def one_or_more(value: object) -> object:
    """Turn a single path or text into a list, and paths into strings."""
    if isinstance(value, str | os.PathLike):
        value = [value]
    if isinstance(value, list | tuple):
        return [os.fspath(item) if isinstance(item, os.PathLike) else item for item in value]
    return value


def data_sets(value: object) -> object:
    """Turn paths into the settings of data sets, with defaults for all but the path."""
    given = one_or_more(value)
    items = given if isinstance(given, list) else [given]
    return [_data_set(item) if isinstance(item, str) else item for item in items]


_WITH_COLUMNS = re.compile(r"(.+?):(\w+=[^,]+(?:,\w+=[^,]+)*)")


def _data_set(text: str) -> dict[str, Any]:
    """The settings in ``FILE``, or in ``FILE:query=anchor,positive=text``."""
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
AtLeastTwo = Annotated[int, Field(ge=2), BeforeValidator(number)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32), BeforeValidator(number)]
Whole = Annotated[int, Field(ge=0), BeforeValidator(number)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(number)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(number)]
Share = Annotated[float, Field(gt=0, le=1), BeforeValidator(number)]
Dropout = Annotated[float, Field(ge=0, lt=1), BeforeValidator(number)]
Arguments = Annotated[dict[str, Any], BeforeValidator(arguments)]
Strings = Annotated[list[str], BeforeValidator(one_or_more)]


def changed_from_default(section: BaseModel, *names: str) -> str:
    """Those of the named settings that differ from their default, with their values, in words."""
    fields, given = type(section).model_fields, [(name, getattr(section, name)) for name in names]
    return ", ".join(f"{name} {value}" for name, value in given if value != fields[name].default)


STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
"""The configuration of every section of a recipe: an unknown key is an error."""
