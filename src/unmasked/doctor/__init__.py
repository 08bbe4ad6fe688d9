"""What this machine and a model can do, one fact a line, for people and for bug reports.

`environment` says what is installed and where it runs. `examine` looks at a model: is it really
bidirectional, how far does it see, what does its tokenizer add, would a stock loader find the
border between a prompt and a text, which engines would give its vectors? A local folder is loaded;
of a hub model only config and tokenizer are fetched, and a random miniature of it is examined.

Facts are plain values, ready for JSON; `lines` makes text of them.
"""

from __future__ import annotations

from unmasked.doctor.checkup import examine
from unmasked.doctor.machine import Facts, environment

__all__ = ["Facts", "environment", "examine", "lines"]


def lines(found: Facts) -> list[tuple[str, str]]:
    """Label and text of each fact."""
    rows = []
    for key, value in found.items():
        if isinstance(value, dict):
            rows += [(f"{key.replace('_', ' ')} {name}", _shown(v)) for name, v in value.items()]
        else:
            rows.append((key.replace("_", " "), _shown(value)))
    return rows


def _shown(value: object) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.1g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
