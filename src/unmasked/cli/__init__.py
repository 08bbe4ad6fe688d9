"""The commands: one function a verb, the work in the modules.

Nothing heavy is imported before it is needed: ``unmasked --help`` answers without torch. Results go
to stdout, progress to stderr. Exit codes: 0 done; 2 the user can mend it (the message says how, and
``--debug`` shows where); 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from unmasked import __version__
from unmasked.cli import encoding, evaluating, publishing, recipes, training
from unmasked.cli.failures import Verbs

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn any decoder-only language model into a text encoder.",
    epilog="Begin with: unmasked demo",
)
VERBS = (
    training.demo,
    encoding.convert,
    training.run,
    training.train,
    training.mine,
    training.plan,
    encoding.encode,
    evaluating.evaluate,
    evaluating.analyse,
    evaluating.doctor,
    publishing.report,
    publishing.push,
)
for verb in VERBS:
    app.command()(verb)
app.add_typer(recipes.app, name="recipes")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unmasked {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every verb; `Verbs` reads ``debug``."""


def main() -> None:
    """The ``unmasked`` command."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars would cut through our line
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = ["--debug"] if len(arguments) < len(sys.argv[1:]) else []  # also behind the verb
    app([*debug, *arguments])
