"""Verbs that train, and one that finds what to train on: demo, run, train, mine."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from unmasked.cli.options import MODEL
from unmasked.errors import OutputError

OVERRIDES = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings to change: mntp.steps=500."),
]


class Stage(str, Enum):
    """The stages that can be trained alone."""

    mntp = "mntp"
    simcse = "simcse"
    supervised = "supervised"


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
    from unmasked.recipe.files import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    run_recipe(resolved, output or Path("runs") / resolved.name)


def train(
    stage: Annotated[Stage, typer.Argument()],
    base: Annotated[str, typer.Option(help="Model to start from: hub name, folder or adapter.")],
    data: Annotated[list[str], typer.Option(help="File of texts, or of pairs; repeat for more.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder.")],
    overrides: OVERRIDES = None,
) -> None:
    """One stage: mntp on a decoder; simcse or supervised on any model, or on an adapter."""
    from unmasked.cli.running import run_recipe, stage_recipe

    run_recipe(stage_recipe(stage.value, base, data, output, overrides or []), output)


def mine(
    model: MODEL,
    data: Annotated[Path, typer.Argument(help="Rows of query and positive.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="New .jsonl file.")],
    negatives: Annotated[int, typer.Option(min=1, help="Most of each row.")] = 5,
    margin: Annotated[
        float, typer.Option(min=0, max=1, help="How much farther than the positive, at least.")
    ] = 0.05,
    skip: Annotated[int, typer.Option(min=0, help="Nearest documents to leave out.")] = 0,
    depth: Annotated[int, typer.Option(min=1, help="Nearest documents to look at.")] = 100,
    corpus: Annotated[
        Path | None, typer.Option(help="More documents: .txt, .jsonl or .csv.")
    ] = None,
    instruction: Annotated[str, typer.Option(help="Put before every query.")] = "",
) -> None:
    """Hard negatives for supervised training: what the encoder takes for the answer wrongly."""
    from unmasked.cli import terminal
    from unmasked.files.source import Source
    from unmasked.recipe.schema import Pairs

    if output.exists():
        raise OutputError(f"{output} exists. Fix: another name.")
    if output.suffix != ".jsonl":
        raise OutputError(f"{output} should end in .jsonl, which training reads.")
    if not output.parent.is_dir():
        raise OutputError(f"{output.parent} is no folder. Fix: make it, or another name.")
    more = [text for _, text, _ in Source(str(corpus)).records()] if corpus else []
    with terminal.waiting(f"loading {model}"):
        from unmasked.compat.llm2vec import LLM2Vec
        from unmasked.train.data.mining import mine

        terminal.quiet_libraries()
        encoder = LLM2Vec.from_pretrained(model)
    pairs = Pairs(path=str(data), instruction=[instruction] if instruction else [])
    with terminal.waiting("searching negatives"):
        settings = {"negatives": negatives, "skip": skip, "depth": depth}
        found = mine(encoder, pairs, output, margin=margin, corpus=more, **settings)
    terminal.show(
        f"{found.rows:,} rows, {found.negatives:,} negatives, {found.without:,} rows without any"
    )
    following = ["unmasked", "train", "supervised", "--base", model, "--data", str(output)]
    terminal.closing(output, [*following, "-o", "runs/supervised"])


def plan(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a shipped recipe.")],
    overrides: OVERRIDES = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Also measure the time of a step on this machine.")
    ] = False,
    show_recipe: Annotated[
        bool, typer.Option("--recipe", help="Also show the recipe with every default.")
    ] = False,
) -> None:
    """What a recipe would cost: steps, tokens, FLOPs, memory, disk, time. Fetches no weights."""
    from unmasked.cli import terminal, views
    from unmasked.recipe.files import load_recipe, recipe_text

    resolved = load_recipe(recipe, overrides or [])
    with terminal.waiting("measuring" if probe else "counting"):
        from unmasked.train.plan.cost import make_plan

        terminal.quiet_libraries()
        found = make_plan(resolved, probe)
    if show_recipe:
        terminal.show(recipe_text(resolved))
    views.plan_table(resolved, found)
