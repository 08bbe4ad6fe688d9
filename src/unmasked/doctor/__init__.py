"""What can this machine and this model do?

`environment` answers for the machine: what is installed and where it runs. `examine` answers for a
model: is it really bidirectional, how far does it see, what does its tokenizer add, would a stock
loader find the border between a prompt and a text, what has another program to do for the same
vectors? The answer is a dictionary of plain values, ready for JSON; `lines` makes text of it.

Cost: `environment` imports torch. `examine` loads the weights of a local folder and runs the proof;
of a hub model it fetches config and tokenizer only and examines a random miniature, in seconds.
Others may use these three, the type `Facts`, and `miniature.miniature`.
"""

from __future__ import annotations

from pathlib import Path

from unmasked.doctor.machine import Facts, environment

__all__ = ["Facts", "environment", "examine", "lines"]


def examine(name: str, load: bool | None = None) -> Facts:
    """Look at a model.

    Args:
        name: ``nano``, a folder or a hub name.
        load: look at the weights; by default those of a local folder only.

    Returns:
        Facts; ``bidirectional`` is whether it can be used.

    Raises:
        ModelError: it cannot be read at all.
    """
    from unmasked.checkpoint.location import locate
    from unmasked.doctor import checkup  # takes seconds, which `environment` does without

    if load is None:
        load = Path(locate(name).name).is_dir()
    return checkup.examine_weights(name) if load else checkup.examine_config(name)


def lines(found: Facts) -> list[tuple[str, str]]:
    """Label and text of each fact."""
    rows = []
    for key, value in found.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        label = key.replace("_", " ")
        rows += [(f"{label} {name}".rstrip(), _shown(part)) for name, part in parts]
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
