"""Verbs that judge: evaluate, analyse, doctor."""

from __future__ import annotations

import json
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from unmasked.cli.failures import MISUSED
from unmasked.cli.options import MODEL
from unmasked.errors import OutputError
from unmasked.files.writing import write_text


class Rival(str, Enum):
    """What a model can be compared with."""

    causal = "causal"


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Hub name, folder, or 'nano'; the first is compared.")
    ],
    tasks: Annotated[
        list[str],
        typer.Option(help="A task file or folder, words:FILE, or an mteb name; repeat for more."),
    ],
    languages: Annotated[
        list[str] | None, typer.Option(help="Of public tasks: eng, kor, ...; repeat for more.")
    ] = None,
    against: Annotated[
        Rival | None, typer.Option(help="Also score the causal decoder, with each pooling.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The causal decoder.", show_default="the first's own base")
    ] = None,
    results: Annotated[
        Path, typer.Option(help="Where results of public tasks are kept, to be continued.")
    ] = Path("mteb"),
    every: Annotated[
        bool, typer.Option("--all", help="Every metric, not only the one to report.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the table there.")
    ] = None,
) -> None:
    """Scores with 95 % intervals; of several models, what the first gains on each other."""
    from unmasked.cli import terminal, views
    from unmasked.evaluate.compare import compare_encoders
    from unmasked.evaluate.scorer import make_scorer

    _check_folder(json_file)
    score = make_scorer(tasks, languages, results)
    with terminal.waiting("loading the libraries"):
        from unmasked.compat.llm2vec import LLM2Vec
        from unmasked.evaluate.baselines import causal_baselines, find_base

        terminal.quiet_libraries()
    scored = {}
    baselines = causal_baselines(base or find_base(models[0])) if against else ()
    encoders = ((m, partial(LLM2Vec.from_pretrained, m, allow_partial=True)) for m in models)
    for name, make in (*baselines, *encoders):
        with terminal.waiting(f"scoring {name}"):
            scored[name] = score(make())
    rows = compare_encoders({name: scored[name] for name in dict.fromkeys([*models, *scored])})
    views.score_table(rows, every)
    if json_file:
        write_text(json_file, json.dumps([row.as_dict() for row in rows], indent=2) + "\n")


def _check_folder(json_file: Path | None) -> None:
    """Refuse a file that cannot be written before anything is scored for it."""
    if json_file is not None and not json_file.parent.is_dir():
        raise OutputError(f"--json {json_file}: there is no such folder. Fix: make it first.")


def analyse(
    model: MODEL,
    task: Annotated[
        str | None,
        typer.Option(
            help="Texts that belong together (STS, pairs, reranking, retrieval).",
            show_default="docstrings of this Python",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A folder for the figures.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers there.")
    ] = None,
) -> None:
    """A look inside: closed against open mask by layer, and the shape of the vectors."""
    from unmasked.cli import terminal, views

    _check_folder(json_file)
    with terminal.waiting(f"analysing {model}"):
        from unmasked.evaluate.analysis import analyse as look
        from unmasked.evaluate.analysis import draw

        terminal.quiet_libraries()
        found = look(model, task)
    views.show_analysis(found)
    if json_file:
        write_text(json_file, json.dumps(found.as_dict(), indent=2) + "\n")
    if output:
        for path in draw(found, output):
            terminal.show(f"figure  {path}")


def doctor(
    model: Annotated[str | None, typer.Argument(help="A model to look at, too.")] = None,
    load: Annotated[
        bool, typer.Option("--load", help="Fetch the weights of a hub model and look at them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """This machine, or a model: is it really bidirectional? Exit code 2 if not."""
    from unmasked.cli import terminal
    from unmasked.doctor import environment, examine, lines

    with terminal.waiting(f"examining {model or 'this machine'}"):
        if model:
            terminal.quiet_libraries()
        found = examine(model, load or None) if model else environment()
    if as_json:
        terminal.show(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        terminal.facts(lines(found))
    if not found.get("bidirectional", True):
        raise typer.Exit(MISUSED)
