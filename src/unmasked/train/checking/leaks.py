"""Texts of the test sets that are in the training data, letter by letter.

A score on such a text says nothing. `checking` also finds near copies, which takes longer.

Cost: eight bytes of memory per text.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from unmasked.train.data.texts import key_of


def keys_in(texts: Iterable[str]) -> np.ndarray:
    """(N,) numbers of texts, which are equal for equal texts."""
    return np.fromiter(map(key_of, texts), np.uint64)


class Leaks:
    """Looks for the texts of test sets in training data.

    Args:
        tests: name of a test set, as the user gave it → its texts.
    """

    def __init__(self, tests: Mapping[str, Iterable[str]]) -> None:
        self._keys = {name: np.unique(keys_in(texts)) for name, texts in tests.items()}

    def told(self, where: str, data: Sequence[str], keys: np.ndarray) -> list[str]:
        """A warning for each test set of which texts are in the training data.

        Args:
            where: the setting that names the training data, such as ``mntp.data``.
            data: its files.
            keys: (N,) `texts.key_of` of each training text.
        """
        lines = []
        for name, known in self._keys.items():
            if count := int(np.isin(known, keys).sum()):
                command = ["unmasked", "data", "check", *data, "--against", name]
                command += ["--write", "checked.jsonl"]
                lines.append(
                    f"{where} has {count:,} of the {len(known):,} texts of {name}, so its scores "
                    f"will be too high. Fix: {shlex.join(command)}, and train on checked.jsonl."
                )
        return lines
