"""What can this machine and this model do?

`environment` describes the machine: what is installed, and on which devices it runs. `examine`
describes a model: is it really bidirectional, how far does it see, what does its tokenizer add,
would a stock loader find where a prompt ends, and what must another program do to give the same
vectors? The answer is a dictionary of plain values, ready for JSON; `lines` turns it into text.

Cost: `environment` imports torch. `examine` loads the weights of a local folder and runs the proof;
for a hub model it fetches only config and tokenizer and examines a random miniature, in seconds.
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
        load: examine the weights; by default, only if the model is a local folder.

    Returns:
        The facts; ``bidirectional`` says whether the model can be used.

    Raises:
        ModelError: the model cannot be read.
    """
    from unmasked.checkpoint.location import locate
    from unmasked.doctor import checkup  # takes seconds to import; `environment` does not need it

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
