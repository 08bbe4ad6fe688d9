"""The commands: how does one work with the package from a shell?

There is one function per verb, which calls the rooms below. Results go to stdout, progress to
stderr. Exit codes: 0 for success; 2 for an error that the user can correct (the message says how,
and ``--debug`` shows the traceback); 130 after an interruption.

Cost: ``unmasked --help`` answers in a fifth of a second, because nothing heavy is imported before
a verb needs it. Others use `main`, the entry point of the installed script; tests also use `app`.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from typer import Option

from unmasked import __version__
from unmasked.cli.data.data_verbs import data
from unmasked.cli.encode_verb import encode
from unmasked.cli.failures import Verbs
from unmasked.cli.model_verbs import analyse, convert, doctor, evaluate, push, search
from unmasked.cli.shipping.export_verbs import export, prove, verify
from unmasked.cli.shipping.merge_verb import merge
from unmasked.cli.shipping.serve_verb import serve
from unmasked.cli.training_verbs import (
    StageCommand,
    demo,
    mine,
    plan,
    recipes,
    report,
    reproduce,
    run,
    train,
)

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn any decoder-only language model into a text encoder.",
    epilog="Begin with: unmasked demo",
)
VERBS = (
    *(demo, convert, run, reproduce, train, mine, merge, plan, encode, search, serve, evaluate),
    *(analyse, doctor, report, push, export, verify, prove),
)
for verb in VERBS:
    app.command(cls=StageCommand if verb is train else None)(verb)
app.add_typer(recipes, name="recipes")
app.add_typer(data, name="data")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unmasked {__version__}")
        raise typer.Exit


@app.callback()
def of_every_verb(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options that come before any verb; `Verbs` reads ``debug``."""


def main() -> None:
    """The ``unmasked`` command."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars would break our progress line
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    # typer accepts --debug only before the verb; move it there.
    debug = ["--debug"] if len(arguments) < len(sys.argv[1:]) else []
    app([*debug, *arguments])
