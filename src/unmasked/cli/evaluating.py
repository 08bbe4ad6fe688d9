"""Verbs that judge: evaluate, doctor."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from unmasked.cli.failures import MISUSED
from unmasked.cli.options import MODEL


class Rival(str, Enum):
    """What a model can be compared with."""

    causal = "causal"


def evaluate(
    model: MODEL,
    tasks: Annotated[
        list[str], typer.Option(help="A .tsv of scored pairs or a BEIR folder; repeat for more.")
    ],
    against: Annotated[
        Rival | None, typer.Option(help="Also score the causal decoder, with each pooling.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The causal decoder.", show_default="the model's own base")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the table there.")
    ] = None,
) -> None:
    """Scores on local tasks, each with its 95 % interval."""
    from unmasked.cli import terminal, views
    from unmasked.evaluate.compare import compare_encoders
    from unmasked.evaluate.scorer import make_scorer

    score = make_scorer(tasks)
    with terminal.waiting("loading the libraries"):
        from unmasked.evaluate.baselines import causal_baselines, find_base
        from unmasked.model import LLM2Vec

        terminal.quiet_libraries()
    baselines = {}
    for name, make in causal_baselines(base or find_base(model)) if against else ():
        with terminal.waiting(f"scoring {name}"):
            baselines[name] = score(make())
    with terminal.waiting(f"scoring {model}"):
        ours = score(LLM2Vec.from_pretrained(model, allow_partial=True))
    rows = compare_encoders({model: ours, **baselines})
    views.score_table(rows)
    if json_file:
        json_file.write_text(json.dumps([row.as_dict() for row in rows], indent=2) + "\n")


def doctor(
    model: Annotated[str | None, typer.Argument(help="A model to look at, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """This machine, or a model: is it really bidirectional? Exit code 2 if not."""
    from unmasked.cli import terminal
    from unmasked.doctor import environment, examine, lines

    with terminal.waiting(f"examining {model or 'this machine'}"):
        if model:
            terminal.quiet_libraries()
        found = examine(model) if model else environment()
    if as_json:
        terminal.show(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        terminal.facts(lines(found))
    if not found.get("bidirectional", True):
        raise typer.Exit(MISUSED)
