"""Verbs for training: demo, run, reproduce, train, mine, plan, report, and the shipped recipes."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import TyperCommand

from unmasked.cli import options, terminal
from unmasked.errors import MissingExtraError, RecipeError, unknown

STAGES = ("mntp", "simcse", "supervised")
STAGE = "unmasked.stage"
recipes = typer.Typer(no_args_is_help=True, help="The recipes that come with the package.")


def demo(
    output: Annotated[Path, Option("-o", "--output", help="Run folder.")] = Path("runs/demo"),
    quick: Annotated[
        bool, Option("--quick", help="Train for a few steps only, as a test.")
    ] = False,
) -> None:
    """Train the bundled decoder on the docstrings of the installed Python packages, in minutes."""
    from unmasked.cli import run_display, tables

    with terminal.loading("loading the libraries"):
        from unmasked.demo import METRICS, demo_run, run_demo
    with (
        run_display.saying_what_is_kept(partial(demo_run, output, quick=quick)),
        terminal.Line() as line,
    ):
        searches = run_demo(output, quick=quick, listener=run_display.listener(line))
    tables.stage_table(output, metrics=METRICS)
    tables.show_searches(searches)
    run_display.keep_command(output)
    try:
        report(output)
    except MissingExtraError as error:
        terminal.say(f"no report: {error}")
    terminal.closing(output / "model")


def run(
    recipe: options.RECIPE,
    overrides: options.OVERRIDES = None,
    output: Annotated[
        Path | None, Option("-o", "--output", help="Run folder.", show_default="runs/NAME")
    ] = None,
) -> None:
    """Train all stages of a recipe, and score the model before and after each stage.

    The same command continues an interrupted run.
    """
    from unmasked.cli.run_display import run_recipe
    from unmasked.recipe.files import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    run_recipe(resolved, output or Path("runs") / resolved.name)


def reproduce(
    recipe: options.RECIPE,
    overrides: options.OVERRIDES = None,
    output: Annotated[
        Path | None,
        Option("-o", "--output", help="Run folder.", show_default="runs/NAME-reproduced"),
    ] = None,
    every: Annotated[
        bool, Option("--all", help="Score every published benchmark, not only the cheapest.")
    ] = False,
) -> None:
    """Run a recipe and compare its scores with the published ones, stage by stage.

    The same command continues an interrupted run. With --all it also continues a finished run:
    nothing is trained or scored twice.
    """
    from unmasked.cli.run_display import run_recipe
    from unmasked.recipe.files import as_published, load_recipe

    resolved = as_published(load_recipe(recipe, overrides or []))
    stages = [name for name, _ in resolved.stages()]
    anchors = [anchor for anchor in resolved.published() if anchor.of_stages(stages)]
    if not anchors:
        bases = dict.fromkeys(anchor.base for anchor in resolved.anchors)
        given = f"model.base={resolved.model.base}, stages {', '.join(stages) or 'none'}"
        there = f"for {', '.join(bases)}" if bases else "none at all"
        raise RecipeError(
            f"{resolved.name} has no published figures ({given}); its anchors: {there}. "
            "Fix: unmasked reproduce sheared-llama-1.3b, or add anchors to the recipe."
        )
    for anchor in anchors if every else anchors[:1]:
        run_recipe(resolved, output or Path("runs") / f"{resolved.name}-reproduced", anchor)
    if not every and len(anchors) > 1:
        left = ", ".join(anchor.benchmark for anchor in anchors[1:])
        terminal.show(f"also published: {left}; the same command with --all scores them too")


class StageCommand(TyperCommand):
    """A command whose help also shows the settings of the stage that is named in the arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Remember the stage: ``--help`` ends the command before its arguments are parsed."""
        ctx.meta[STAGE] = next((word for word in args if word in STAGES), None)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the usual help, then the settings."""
        super().format_help(ctx, formatter)
        if stage := ctx.meta.get(STAGE):
            from unmasked.cli.tables import settings_text

            typer.echo(f"Settings, as NAME=VALUE:\n\n{settings_text(stage)}")


def train(
    stage: Annotated[
        Literal["mntp", "simcse", "supervised"],
        Argument(metavar="STAGE", help="mntp, simcse or supervised; with --help, its settings."),
    ],
    base: Annotated[str, Option(help="Model or adapter to start from: hub name or folder.")],
    data: Annotated[
        list[str],
        Option(
            help="File of texts, or of pairs (supervised); repeat for more. Columns with unusual "
            "names: FILE:text=body, or FILE:query=anchor,positive=text."
        ),
    ],
    output: Annotated[
        Path, Option("-o", "--output", callback=options.check_named, help="Run folder.")
    ],
    overrides: options.OVERRIDES = None,
) -> None:
    """Train one stage: mntp on a decoder; simcse or supervised on any model or adapter.

    An encoder keeps the max_length that it was saved with, unless model.max_length is given. The
    same command continues an interrupted run.
    """
    from unmasked.checkpoint.folder import SETTINGS_NAME
    from unmasked.checkpoint.location import locate
    from unmasked.cli.run_display import run_recipe
    from unmasked.recipe.files import make_recipe

    name = re.sub(r"[^\w.-]", "-", output.resolve().name).lstrip("-.") or stage
    length = locate(base).read_json(SETTINGS_NAME).get("max_length")
    model = {"base": base} | ({"max_length": length} if length else {})
    run_recipe(
        make_recipe({"name": name, "model": model, stage: {"data": data}}, overrides or []), output
    )


def mine(
    model: options.MODEL,
    data: Annotated[str, Argument(help="File of pairs, as for 'unmasked train supervised'.")],
    output: Annotated[Path, Option("-o", "--output", help="New .jsonl file.")],
    negatives: Annotated[int, Option(min=1, help="Maximum number of new negatives per row.")] = 5,
    margin: Annotated[
        float,
        Option(min=0, max=1, help="Negatives score below (1 - MARGIN) times the positive's score."),
    ] = 0.05,
    skip: Annotated[int, Option(min=0, help="Skip the nearest SKIP documents of a query.")] = 0,
    depth: Annotated[int, Option(min=1, help="Look at the nearest DEPTH documents only.")] = 100,
    corpus: Annotated[
        str | None,
        Option(help="More documents: texts as for 'unmasked train mntp', e.g. FILE:text=body."),
    ] = None,
    instruction: Annotated[
        str, Option(help="Text put before every query; written to rows without their own.")
    ] = "",
) -> None:
    """Find hard negatives for supervised training: wrong answers that the encoder ranks highly.

    The same command continues an interrupted search.
    """
    from unmasked.files.training_source import training_source
    from unmasked.recipe.files import make_recipe

    options.check_new_rows(output, "-o")
    more = (text for _, text, _ in training_source(corpus).records()) if corpus else ()
    given: dict[str, Any] = {"name": "mine", "model": {"base": model}}
    stage = make_recipe(given | {"supervised": {"data": data}}).supervised
    assert stage is not None
    (pairs,) = stage.data
    if instruction:
        pairs = pairs.model_copy(update={"instruction": [instruction]})
    encoder = terminal.load_encoder(model)
    from unmasked.train.mining.mining import mine

    settings: dict[str, Any] = {"negatives": negatives, "skip": skip, "depth": depth}
    with terminal.Line() as line:
        settings |= {"tell": terminal.say, "progress": line.counted}
        found = mine(encoder, pairs, output, margin=margin, corpus=more, **settings)
    terminal.show(
        f"{found.rows:,} rows, {found.negatives:,} negatives, {found.without:,} rows without any"
    )
    if 2 * found.without > found.rows:
        terminal.say(
            "most rows have none: the documents nearest to their query score within --margin "
            f"{margin:g} of the positive, or above it. Fix: --depth 1000 looks further down, "
            "--margin 0 also accepts scores just below the positive's."
        )
    if found.answers:
        terminal.say(f"left out {found.answers:,} negatives that are positives of another row")
    following = ["unmasked", "train", "supervised", "--base", model, "--data", str(output)]
    terminal.closing(output, [*following, "-o", "runs/supervised"])


def plan(
    recipe: options.RECIPE,
    overrides: options.OVERRIDES = None,
    probe: Annotated[
        bool, Option("--probe", help="Also estimate the time, from a few real steps.")
    ] = False,
    show_recipe: Annotated[bool, Option("--recipe", help="Also show all settings.")] = False,
) -> None:
    """Show what a recipe would cost: steps, tokens, FLOPs, memory, disk and time.

    No weights are downloaded.
    """
    from unmasked.cli import tables
    from unmasked.recipe.files import load_recipe, recipe_text

    resolved = load_recipe(recipe, overrides or [])
    with terminal.loading("measuring" if probe else "counting"):
        from unmasked.train.plan.cost import make_plan

        found = make_plan(resolved, probe)
    if show_recipe:
        terminal.show(recipe_text(resolved))
    tables.plan_table(resolved, found)


def report(
    run: Annotated[Path, Argument(help="Run folder.")],
    output: Annotated[
        Path | None, Option("-o", "--output", help="HTML file.", show_default="RUN/report.html")
    ] = None,
) -> None:
    """Write a run's report, one HTML page that needs no network: stages, curves, maps, searches."""
    with terminal.loading("drawing the report"):
        from unmasked.doctor import environment, lines
        from unmasked.evaluate.report.page import write_report

        path = write_report(run, output, lines(environment()))
    terminal.show(f"report  {path}")


@recipes.command("list")
def list_recipes() -> None:
    """List the recipes with their base models and the licences of these models."""
    from unmasked.recipe.files import load_recipe, shipped_recipes

    models = {name: load_recipe(name).model for name in shipped_recipes()}
    terminal.facts([(name, f"{m.base}, {m.licence or 'bundled'}") for name, m in models.items()])


SHIPPED = Annotated[
    str, Argument(help="Name of a shipped recipe.", autocompletion=options.complete_recipe)
]


@recipes.command("show")
def show_recipe(name: SHIPPED) -> None:
    """Print the YAML file of a recipe."""
    typer.echo(_shipped(name).read_text(encoding="utf-8"), nl=False)


@recipes.command("copy")
def copy_recipe(
    name: SHIPPED,
    to: Annotated[Path | None, Argument(help="New file.", show_default="NAME.yaml")] = None,
    explain: Annotated[
        bool, Option("--explain", help="Add a comment above each setting that says what it does.")
    ] = False,
) -> None:
    """Copy a recipe to a file that you can change and run."""
    source, target = _shipped(name), to or Path(f"{name}.yaml")
    options.check_parent(options.check_new(target))
    if explain:
        from unmasked.recipe.settings import explained

        target.write_text(explained(source.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        target.write_bytes(source.read_bytes())
    place = str(target) if target.is_absolute() else f"./{target}"
    terminal.closing(target, ["unmasked", "run", place])


@recipes.command("explain")
def explain_settings(
    name: Annotated[
        str,
        Argument(metavar="[NAME]", help="Setting or section, e.g. mntp.learning_rate or mntp."),
    ] = "",
) -> None:
    """Explain the settings of a recipe: what each does, its default, and the allowed values."""
    from unmasked.cli.tables import settings_text

    terminal.show(settings_text(name))


def _shipped(name: str) -> Path:
    from unmasked.recipe.files import shipped_recipes

    shipped = shipped_recipes()
    if name not in shipped:
        raise RecipeError(unknown("recipe", name, shipped))
    return shipped[name]
