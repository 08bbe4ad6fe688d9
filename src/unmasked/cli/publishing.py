"""Verbs that show a result to others: report, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where.", show_default="RUN/report.html")
    ] = None,
) -> None:
    """One page about a run: stages, curves, maps, searches. Opens without a network."""
    from unmasked.cli import terminal

    with terminal.waiting("drawing the report"):
        from unmasked.cli.running import write_report

        terminal.quiet_libraries()
        path = write_report(run, output)
    terminal.show(f"report  {path}")


def push(
    folder: Annotated[Path, typer.Argument(help="A saved model: RUN/model.")],
    repository: Annotated[str, typer.Argument(help="NAME or ORGANISATION/NAME on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent, send nothing.")
    ] = False,
) -> None:
    """Puts a saved model on the Hugging Face hub, private by default."""
    from unmasked.checkpoint.push import check_name, list_files
    from unmasked.checkpoint.push import push as upload
    from unmasked.cli import terminal

    check_name(repository)
    files = list_files(folder)
    total = sum(size for _, size in files)
    terminal.table(["file", "size"], [[name, terminal.short(size, "B")] for name, size in files])
    who = "public" if public else "private"
    terminal.show(f"{len(files)} files, {terminal.short(total, 'B')}, to {repository} ({who})")
    if dry_run:
        terminal.show("dry run: nothing was sent")
        return
    with terminal.waiting("uploading"):
        address = upload(folder, repository, private=not public)
    terminal.show(f"pushed  {address}")
