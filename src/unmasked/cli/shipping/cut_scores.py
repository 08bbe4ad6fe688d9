"""evaluate --layers --dimensions: scores and costs of one encoder with fewer layers and numbers."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from unmasked.cli import terminal
from unmasked.errors import DataError
from unmasked.files.writing import write_text

if TYPE_CHECKING:
    from unmasked.evaluate.scorer import Scorer


def score_cuts(
    models: list[str],
    against: str | None,
    score: Scorer,
    layers: list[int],
    dimensions: list[int],
    json_file: Path | None,
) -> None:
    """Score one encoder with every combination of layers and dimensions, and show its cost."""
    if len(models) > 1 or against:
        raise DataError(
            "--layers and --dimensions work on one model alone, but "
            f"{'--against is' if against else f'{len(models)} models are'} given. "
            f"Fix: unmasked evaluate {shlex.quote(models[0])} with these options alone."
        )
    from unmasked.cli import tables
    from unmasked.evaluate.compare import compare_encoders
    from unmasked.evaluate.trade_off import cut_encoders

    scored, cuts = {}, []
    with terminal.loading(f"scoring {models[0]}"):
        for cut, encoder in cut_encoders(models[0], layers, dimensions, allow_partial=True):
            scored[cut.name] = score(encoder)
            cuts.append(cut)
    rows = compare_encoders(scored)
    tables.trade_off_table(cuts, rows)
    if json_file:
        costs = {cut.name: asdict(cut) for cut in cuts}
        found = [row.as_dict() | {"cost": costs[row.encoder]} for row in rows]
        write_text(json_file, json.dumps(found, indent=2) + "\n")
