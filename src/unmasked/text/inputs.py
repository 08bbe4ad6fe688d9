"""What may be given to `encode`: strings or pairs, in a list; anything else is refused by name.

A frame, a set or a mapping can be passed through too, and would give vectors of its column names,
or vectors that nobody can assign. Cost: one pass over the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from unmasked.errors import DataError, unknown
from unmasked.text.templates import PLAIN


def listed(inputs: Any) -> list[Any]:
    """The inputs of `encode` as a list, also where they are a tuple, an array or a generator.

    Raises:
        DataError: they are not a sequence of inputs.
    """
    _refuse_container(inputs)
    if isinstance(inputs, np.ndarray) and inputs.ndim:
        inputs = inputs.tolist()  # a row of a two-dimensional array is a pair
    if isinstance(inputs, Iterable) and not isinstance(inputs, bytes):
        with suppress(TypeError):  # an array without an axis
            return list(inputs)
    raise DataError(
        f"inputs are {_describe(inputs)}. Allowed: a string, a list of strings, or a list of "
        "[instruction, text] pairs. Fix: encode(['a text'])."
    )


def _refuse_container(inputs: Any) -> None:
    """Refuse what can be passed through and is no list of texts: columns, and sets."""
    if isinstance(inputs, set | frozenset):
        raise DataError(
            f"inputs are a {type(inputs).__name__}, which has no order, so nobody knows which "
            "vector is whose. Fix: encode(sorted(texts))."
        )
    names = inputs.keys() if isinstance(inputs, Mapping) else getattr(inputs, "column_names", None)
    if names is None:
        names = getattr(inputs, "columns", None)
    if names is not None and not callable(names):
        columns = [str(name) for name in names]
        column = "text" if "text" in columns or not columns else columns[0]
        raise DataError(
            f"inputs are a {type(inputs).__name__} of columns ({', '.join(columns[:10])}), and "
            f"the texts are one of them. Fix: encode(list(data[{column!r}]))."
        )


def split_pairs(
    inputs: Sequence[Any], join: Callable[[str], str] = PLAIN.join
) -> tuple[list[str], list[str]]:
    """(texts, prompts) of inputs that are all strings, or all ``[instruction, text]`` pairs.

    Args:
        inputs: the inputs.
        join: how an instruction becomes a prompt.

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
                "Fix: give texts without an instruction as ['', text]."
            )
        if not (prompts[-1].isascii() and texts[-1].isascii()):
            _check_whole(index, prompts[-1] + texts[-1])
    return texts, prompts


def _check_whole(index: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"input {index} has half a surrogate pair ({text[error.start]!r}), which is not a "
            "character. Fix: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from error


def _is_pair(item: Sequence[Any]) -> bool:
    # The original package also passed [instruction, text, 0]; its third item has no meaning.
    return len(item) in (2, 3) and isinstance(item[0], str) and isinstance(item[1], str)


def _describe(item: Any) -> str:
    of = f" of {len(item)}" if isinstance(item, list | tuple) else ""
    return f"{type(item).__name__}{of}"


def requested_length(options: Mapping[str, Any] | None) -> int | None:
    """The limit of an input among the `processing_kwargs` of a call; None if they name none.

    Raises:
        DataError: they name anything else.
    """
    length: int | None = None
    for kind, values in (options or {}).items():
        for name, value in dict(values).items():
            if (kind, name) not in _OPTIONS:
                allowed = map(".".join, _OPTIONS)
                raise DataError(unknown("processing option", f"{kind}.{name}", allowed))
            if not (name == "max_length" and isinstance(value, int)) and value not in (True, None):
                raise DataError(
                    f"processing_kwargs: {kind}.{name}={value!r} is not supported. "
                    f"Fix: leave {name} out; texts are cut and padded as the encoder needs it."
                )
            length = value if name == "max_length" else length
    return length


_OPTIONS = [(k, n) for k in ("text", "common") for n in ("max_length", "padding", "truncation")]
