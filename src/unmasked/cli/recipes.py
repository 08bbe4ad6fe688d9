"""The recipes that come with the package: list, show, copy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmasked.errors import OutputError, RecipeError, unknown

app = typer.Typer(no_args_is_help=True, help="The recipes that come with the package.")


@app.command("list")
def list_recipes() -> None:
    """Names and base models."""
    from unmasked.cli import terminal
    from unmasked.recipe.files import load_recipe, shipped_recipes

    recipes = {name: load_recipe(name) for name in shipped_recipes()}
    terminal.facts([(name, recipe.model.base) for name, recipe in recipes.items()])


@app.command()
def show(name: Annotated[str, typer.Argument()]) -> None:
    """The recipe, as it is written."""
    typer.echo(_shipped(name).read_text(encoding="utf-8"), nl=False)


@app.command()
def copy(
    name: Annotated[str, typer.Argument()],
    to: Annotated[Path | None, typer.Argument(help="New file.", show_default="NAME.yaml")] = None,
) -> None:
    """A copy to change and run."""
    from unmasked.cli import terminal

    source, target = _shipped(name), to or Path(f"{name}.yaml")
    if target.exists():
        raise OutputError(f"{target} exists. Fix: another name.")
    target.write_bytes(source.read_bytes())
    terminal.closing(target, ["unmasked", "run", f"./{target}"])


def _shipped(name: str) -> Path:
    from unmasked.recipe.files import shipped_recipes

    recipes = shipped_recipes()
    if name not in recipes:
        raise RecipeError(unknown("recipe", name, recipes))
    return recipes[name]
