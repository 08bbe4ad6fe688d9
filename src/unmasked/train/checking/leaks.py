"""Texts of the tests that stand in the training data, letter by letter.

A score on such a text says nothing. Near copies take longer to find: `checking` does.

Cost: eight bytes for each text.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from unmasked.train.data.texts import key_of


def keys_in(texts: Iterable[str]) -> np.ndarray:
    """A number for each text, equal for equal texts."""
    return np.fromiter(map(key_of, texts), np.uint64)


class Leaks:
    """The texts of the tests, to be looked for.

    Args:
        tests: what the user calls a test → its texts.
    """

    def __init__(self, tests: Mapping[str, Iterable[str]]) -> None:
        self._keys = {name: np.unique(keys_in(texts)) for name, texts in tests.items()}

    def told(self, where: str, data: Sequence[str], keys: np.ndarray) -> list[str]:
        """A line for each test that has texts among those with the keys (N,).

        Args:
            where: what the texts are for, such as ``mntp.data``.
            data: the files that they are from.
            keys: `texts.key_of` each of them.
        """
        lines = []
        for name, known in self._keys.items():
            if count := int(np.isin(known, keys).sum()):
                command = ["unmasked", "data", "check", *data, "--against", name]
                command += ["--write", "checked.jsonl"]
                lines.append(
                    f"{where} has {count:,} of the {len(known):,} texts of {name}, so that its "
                    f"scores will be too high. Fix: {shlex.join(command)}, and train on that file."
                )
        return lines
