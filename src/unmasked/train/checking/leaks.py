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
        """A warning if texts of any test sets are in the training data; else none.

        Args:
            where: the setting that names the training data, such as ``mntp.data``.
            data: its files, as arguments of a command.
            keys: (N,) `texts.key_of` of each training text.
        """
        counts = {name: int(np.isin(known, keys).sum()) for name, known in self._keys.items()}
        found = [name for name, count in counts.items() if count]
        if not found:
            return []
        # One command for all of them: a second one could not write the same file.
        command = ["unmasked", "data", "check", *data]
        command += [word for name in found for word in ("--against", name)]
        command += ["--write", "checked.jsonl"]
        shares = [f"{counts[n]:,} of the {len(self._keys[n]):,} texts of {n}" for n in found]
        return [
            f"{where} has {', and '.join(shares)}, so its scores will be too high. "
            f"Fix: {shlex.join(command)}, and train on checked.jsonl."
        ]
