"""How a command ends: what the user can mend is one paragraph and an exit code, no traceback."""

from __future__ import annotations

import errno
import os
from typing import Any

import typer
from typer.core import TyperGroup

from unmasked.errors import UnmaskedError

MISUSED, INTERRUPTED = 2, 130
FULL = os.strerror(errno.ENOSPC)
RESUMABLE = ("demo", "run", "train")
"""Verbs that keep what they have done when they are interrupted."""


class Verbs(TyperGroup):
    """Turns what the user can mend into one paragraph and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception) as error:
            code, message = explain(error, str(ctx.invoked_subcommand))
            if not message or ctx.params.get("debug"):
                raise
            typer.echo(message, err=True)
            raise typer.Exit(code) from error


def explain(error: BaseException, verb: str) -> tuple[int, str]:
    """Exit code and message; an empty message for what is no fault of the user's."""
    if isinstance(error, KeyboardInterrupt):
        if verb in RESUMABLE:
            return INTERRUPTED, "interrupted: saved; run the same command to continue"
        return INTERRUPTED, "interrupted: nothing was written"
    if isinstance(error, UnmaskedError):
        return MISUSED, f"error: {error}"
    if FULL in str(error):  # of the weights' writer too, which has an error of its own
        where = getattr(error, "filename", None)
        place = f"{where}: " if where else ""
        return MISUSED, f"error: {place}{FULL}. Fix: make room and run the same command."
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError) and error.filename:
        return MISUSED, f"error: {error.filename}: {error.strerror}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's; importing it here would take seconds
        return MISUSED, (
            "error: the device is out of memory. Fix: encode with a smaller --batch-size (same "
            "vectors); train with smaller mntp.micro_batch_tokens or supervised.mini_batch_tokens "
            "(same result), or gradient_checkpointing=true in the stage (same result, slower)."
        )
    return 1, ""
