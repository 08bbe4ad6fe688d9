"""Verbs that train: demo, run, train."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

OVERRIDES = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings to change: mntp.steps=500."),
]


class Stage(str, Enum):
    """The stages that can be trained alone."""

    mntp = "mntp"
    simcse = "simcse"


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder.")] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Few steps: shows the way, not the gain.")
    ] = False,
) -> None:
    """Everything, on the bundled decoder and this machine's own documentation, in minutes."""
    from unmasked.cli import running, terminal, views

    with terminal.waiting("loading the libraries"):
        from unmasked.demo import METRICS, run_demo

        terminal.quiet_libraries()
    with terminal.Line() as line:
        searches = run_demo(output, quick=quick, listener=running.listener(line))
    views.stage_table(output, metrics=METRICS)
    views.show_searches(searches)
    running.finish_demo(output)


def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a shipped recipe.")],
    overrides: OVERRIDES = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Run folder.", show_default="runs/NAME"),
    ] = None,
) -> None:
    """All stages of a recipe, scored before and after each. The same command continues."""
    from unmasked.cli.running import run_recipe
    from unmasked.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    run_recipe(resolved, output or Path("runs") / resolved.name)


def train(
    stage: Annotated[Stage, typer.Argument()],
    base: Annotated[str, typer.Option(help="Model to start from: hub name, folder or adapter.")],
    data: Annotated[list[str], typer.Option(help="File of texts; repeat for more.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder.")],
    overrides: OVERRIDES = None,
) -> None:
    """One stage: mntp on a decoder, simcse on any model or on the adapter mntp left."""
    from unmasked.cli.running import run_recipe, stage_recipe

    run_recipe(stage_recipe(stage.value, base, data, output, overrides or []), output)
