"""Texts to train on, as a recipe or a command names them: a path, perhaps with its column behind.

Cost: none; the files are read when the texts are asked for.
"""

from __future__ import annotations

import re
from pathlib import Path

from unmasked.errors import DataError
from unmasked.files.source import Source

_WITH_COLUMN = re.compile(r"(.+):(\w+)=(.+)")


def training_source(given: str | Path) -> Source:
    """Texts to train on: what `Source` reads, with the column behind it where it is another one.

    Args:
        given: a path, or ``PATH:text=COLUMN``.

    Raises:
        DataError: something else than ``text`` is named there.
    """
    match = _WITH_COLUMN.fullmatch(str(given))
    if match is None:
        return Source(str(given), skip_blank=True)
    if match[2] != "text":
        fix = f"{match[1]}:text={match[3]}"
        raise DataError(f"{given}: a stage on texts has one column, 'text'. Fix: {fix}.")
    return Source(match[1], match[3], skip_blank=True)
