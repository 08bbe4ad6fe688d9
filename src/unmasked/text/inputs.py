"""Checks the inputs of `encode`: a list of strings or of pairs; anything else is refused by name.

A data frame or a mapping can be iterated too, but would yield the vectors of its column names; a
set would yield vectors in no known order. Cost: one pass over the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from typing import Any

import numpy as np

from unmasked.errors import DataError, unknown
from unmasked.text.templates import PLAIN


def listed(inputs: Any) -> list[Any]:
    """The inputs of `encode` as a list; they may be a tuple, an array or a generator.

    Raises:
        DataError: they are not a sequence of inputs.
    """
    _refuse_container(inputs)
    if isinstance(inputs, np.ndarray) and inputs.ndim:
        inputs = inputs.tolist()  # a row of a two-dimensional array is a pair
    if isinstance(inputs, Iterable) and not isinstance(inputs, bytes):
        with suppress(TypeError):  # from an array of zero dimensions
            return list(inputs)
    raise DataError(
        f"inputs are {_describe(inputs)}. Allowed: a string, a list of strings, or a list of "
        "[instruction, text] pairs. Fix: encode(['a text'])."
    )


def _refuse_container(inputs: Any) -> None:
    """Refuse iterables that are not lists of texts: files, sets, mappings, frames and data sets."""
    if hasattr(inputs, "readline"):
        raise DataError(
            f"inputs are an open file ({type(inputs).__name__}); the line break at the end of each "
            "line would be a part of its text. Fix: encode([line.rstrip() for line in file])."
        )
    if isinstance(inputs, set | frozenset):
        raise DataError(
            f"inputs are a {type(inputs).__name__}, which has no order, so vectors could not be "
            "matched to texts. Fix: encode(sorted(texts))."
        )
    names = inputs.keys() if isinstance(inputs, Mapping) else getattr(inputs, "column_names", None)
    if names is None:
        names = getattr(inputs, "columns", None)
    if names is not None and not callable(names):
        columns = [str(name) for name in names]
        column = "text" if "text" in columns or not columns else columns[0]
        by_id = isinstance(inputs, Mapping) and isinstance(next(iter(inputs.values()), None), str)
        fix = f"encode(list(data{'.values()' if by_id else f'[{column!r}]'}))"
        raise DataError(
            f"inputs are a {type(inputs).__name__} of columns ({', '.join(columns[:10])}), not a "
            f"list of texts. Fix: {fix}."
        )


def split_pairs(
    inputs: Sequence[Any], join: Callable[[str], str] = PLAIN.join
) -> tuple[list[str], list[str]]:
    """(texts, prompts) of inputs that are all strings, or all ``[instruction, text]`` pairs.

    Args:
        inputs: the inputs.
        join: turns an instruction into a prompt.

    Raises:
        DataError: an input is neither, or strings and pairs are mixed; names the index.
    """
    pairs = bool(inputs) and isinstance(inputs[0], list | tuple)
    texts, prompts = [], []
    for index, item in enumerate(inputs):
        if isinstance(item, str) and not pairs:
            texts.append(item)
            prompts.append("")
        elif pairs and isinstance(item, list | tuple) and _is_pair(item):
            texts.append(item[1])
            prompts.append(join(item[0]))
        else:
            expected = "an [instruction, text] pair like the first" if pairs else "a string"
            raise DataError(
                f"input {index} is {_describe(item)}, expected {expected}. "
                "Allowed: all strings, or all [instruction, text] pairs. "
                f"Fix: {_as_text(item)}."
            )
        if not (prompts[-1].isascii() and texts[-1].isascii()):  # isascii is much faster
            _check_surrogates(index, prompts[-1] + texts[-1])
    return texts, prompts


def check_prompt(prompt: Any) -> None:
    """Refuse a prompt that is not one string.

    Raises:
        DataError: it is something else, such as a list with a prompt for each text.
    """
    if not isinstance(prompt, str | None):
        raise DataError(
            f"prompt is {_describe(prompt)}. Allowed: one string, which is put before every input. "
            "Fix: prompt='Find the answer:', or for a prompt of its own for each text, "
            "encode([[instruction, text], ...])."
        )


def _check_surrogates(index: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"input {index} has half a surrogate pair ({text[error.start]!r}), which is not a "
            "character. Fix: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from error


def _is_pair(item: Sequence[Any]) -> bool:
    # The original package also passed [instruction, text, 0]; the third item has no meaning.
    return len(item) in (2, 3) and isinstance(item[0], str) and isinstance(item[1], str)


def _as_text(item: Any) -> str:
    """What to give instead of an input that is neither a string nor a pair like the first."""
    if isinstance(item, str | list | tuple):
        return "give texts without an instruction as ['', text]"
    if str(item) in ("None", "nan", "NaT", "<NA>"):
        return "leave out inputs without a text, or give '' in their place"
    if isinstance(item, bytes):
        return "[item.decode('utf-8') for item in inputs]"
    if isinstance(item, Mapping):
        name = "text" if "text" in item else next(iter(item), "text")
        return f"[item[{name!r}] for item in inputs]"
    return "[str(item) for item in inputs]"


def _describe(item: Any) -> str:
    length = f" of {len(item)}" if isinstance(item, list | tuple) else ""
    return f"{type(item).__name__}{length}"


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of 1 or more; numpy's count, booleans do not."""
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 1


def check_numbers(options: Mapping[str, Any]) -> None:
    """Refuse, with a `DataError`, numbers among options of `encode` that are not 1 or more."""
    for name, (meaning, default) in _NUMBERS.items():
        if (value := options.get(name)) is not None and not is_count(value):
            raise DataError(
                f"{name} {value!r}: it is the number of {meaning}. "
                f"Fix: a whole number of 1 or more, or None for {default}."
            )


def requested_length(options: Mapping[str, Any] | None) -> int | None:
    """The ``max_length`` in the `processing_kwargs` of a call; None if there is none.

    Raises:
        DataError: there is another option, or a value that is not supported.
    """
    length: int | None = None
    for kind, values in (options or {}).items():
        for name, value in dict(values).items():
            if (kind, name) not in _OPTIONS:
                allowed = map(".".join, _OPTIONS)
                raise DataError(unknown("processing option", f"{kind}.{name}", allowed))
            if name == "max_length" and value is not None:
                if not is_count(value):
                    raise DataError(
                        f"processing_kwargs: {kind}.max_length={value!r} is not a number of "
                        "tokens. Fix: give a whole number of 1 or more, or leave it out."
                    )
                length = value
            elif value not in (True, None):
                raise DataError(
                    f"processing_kwargs: {kind}.{name}={value!r} is not supported. "
                    f"Fix: leave {name} out; the encoder truncates and pads as it needs to."
                )
    return length


_OPTIONS = [(k, n) for k in ("text", "common") for n in ("max_length", "padding", "truncation")]
_NUMBERS = {
    "batch_size": ("rows of a forward", "as many as a number of tokens allows"),
    "truncate_dim": ("dimensions to keep of each vector", "all"),
    "chunk_size": ("inputs that a process is given at once", "a number that suits the inputs"),
}
