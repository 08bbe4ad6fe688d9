"""Texts to train on, as a recipe or a command names them: a path, perhaps followed by a column.

Cost: none; the files are read only when texts are read from the source.
"""

from __future__ import annotations

import re
from pathlib import Path

from unmasked.errors import DataError
from unmasked.files.source import Source

_WITH_COLUMN = re.compile(r"(.+):(\w+)=(.+)")


def training_source(given: str | Path) -> Source:
    """Texts to train on: ``PATH``, as `Source` reads it, or ``PATH:text=COLUMN``.

    Raises:
        DataError: another role than ``text`` is named.
    """
    match = _WITH_COLUMN.fullmatch(str(given))
    if match is None:
        return Source(str(given), skip_blank=True)
    if match[2] != "text":
        fix = f"{match[1]}:text={match[3]}"
        raise DataError(f"{given}: a stage on texts has one column, 'text'. Fix: {fix}.")
    return Source(match[1], match[3], skip_blank=True)
