"""How a command ends: an error that the user can correct becomes one paragraph and an exit code.

Any other error is a fault of the program, and its traceback is shown.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from unmasked.errors import UnmaskedError, nearest

MISUSED, INTERRUPTED = 2, 130
FULL = os.strerror(errno.ENOSPC)
_FIXES = {
    errno.ENOENT: "check the name",
    errno.EISDIR: "name a file in it",
    errno.ENOTDIR: "name another place, as a part of this is a file",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.ENAMETOOLONG: "give a shorter name",
}
_CHOICE = re.compile(r"'(.*)' is not one of (.*)\.$")
_CONTINUED = "nothing new was written; run the same command to continue"
KEPT = {
    "run": _CONTINUED,
    "train": _CONTINUED,
    "encode": _CONTINUED,
    "evaluate": "finished public tasks are kept in the folder of --results, nothing else",
    "mine": "every finished shard is kept; run the same command to continue",
    "report": "figures that were drawn are kept",
}
"""Verb → what is on the disk after an interruption. ``run``, ``train`` and ``encode`` handle Ctrl-C
themselves once their work has begun."""
ONE_FILE_KEPT = (
    "nothing was kept; the same command begins again; a folder (-o NAME/) can be continued"
)


class Verbs(TyperGroup):
    """The verbs of `unmasked`; an error in any of them is passed to `end`."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception) as error:
            # typer's message for an unknown choice lists the allowed ones; add the nearest.
            if choice := _CHOICE.search(message := getattr(error, "message", "")):
                near = nearest(choice[1], re.findall("'([^']*)'", choice[2]), end="")
                plain = message.removeprefix("Value error, ")
                error.message = plain + near.replace(", did", " Did")  # type: ignore[union-attr]
            end(error, str(ctx.invoked_subcommand), debug=bool(ctx.params.get("debug")))


def end(error: BaseException, verb: str, debug: bool = False) -> NoReturn:
    """Print an error that the user can correct, and exit.

    Any other error is raised again; with `debug`, every error is.
    """
    code, message = explain(error, verb)
    if debug or not message:
        raise error
    typer.echo(message, err=True)
    raise SystemExit(code) from error


def explain(error: BaseException, verb: str) -> tuple[int, str]:
    """Exit code and message; the message is empty if the user cannot correct the error."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted: {KEPT.get(verb, 'nothing was written')}"
    if isinstance(error, UnmaskedError):
        return MISUSED, f"error: {error}"
    if FULL in str(error):  # safetensors reports a full disk with an error class of its own
        place = f"{where}: " if (where := getattr(error, "filename", None)) else ""
        return MISUSED, f"error: {place}{FULL}. Fix: make room and run the same command."
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError) and error.filename:
        fix = _FIXES.get(error.errno or 0, "name another place, or look at the disk")
        return MISUSED, f"error: {error.filename}: {error.strerror}. Fix: {fix}."
    if type(error).__name__ == "OutOfMemoryError":  # torch's; importing it here would take seconds
        return MISUSED, (
            "error: the device is out of memory. Fix: encode with a smaller --batch-size (the "
            "vectors are the same); train with a smaller mntp.micro_batch_tokens or "
            "supervised.mini_batch_tokens (the result is the same), or with "
            "gradient_checkpointing=true in the stage (the result is the same, and it is slower)."
        )
    return 1, ""
