"""`unmasked data check`: is training data safe to train on?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from unmasked.cli import terminal
from unmasked.cli.options import check_new, check_new_rows

if TYPE_CHECKING:
    from unmasked.train.checking.checking import Findings

data = typer.Typer(no_args_is_help=True, help="Check training data before it is used.")


@data.command("check")
def check_files(
    files: Annotated[
        list[str],
        Argument(help="Files of texts or of pairs; columns as in 'unmasked train --data'."),
    ],
    against: Annotated[
        list[str] | None,
        Option(help="Task of 'unmasked evaluate' that must not be trained on; repeat for more."),
    ] = None,
    similarity: Annotated[
        float,
        Option(
            min=0.1,
            max=1,
            help="Jaccard similarity of two near copies, over runs of 5 characters; 1 finds exact "
            "copies only.",
        ),
    ] = 0.8,
    model: Annotated[
        str | None, Option(help="Encoder that looks for false negatives.", show_default="none")
    ] = None,
    margin: Annotated[
        float,
        Option(min=0, max=1, help="False negatives score above (1 - MARGIN) times the positive."),
    ] = 0.05,
    write: Annotated[
        Path | None, Option(help="New .jsonl file of what is left; what is removed goes beside it.")
    ] = None,
) -> None:
    """Look for copies, for texts of tests, and for false negatives in training data.

    The files are not changed; --write makes a new file without what was found.
    """
    from unmasked.evaluate.tasks.tested import texts_of_task
    from unmasked.recipe.files import make_recipe

    if write is not None:
        check_new_rows(write, "--write")
    # All other files are parsed as pairs; `check_data` finds those that have plain texts.
    texts = [file for file in files if ":text=" in file]
    pairs = [file for file in files if file not in texts]
    settings = {"name": "check", "model": {"base": "none"}, "supervised": {"data": pairs}}
    stage = make_recipe(settings).supervised
    assert stage is not None
    with terminal.loading("loading the libraries"):
        from unmasked.train.checking.checking import check_data, removed_of
    if write is not None:
        check_new(removed_of(write))
    tests = {task: texts_of_task(task) for task in against or []}
    encoder = None if model is None else terminal.load_encoder(model)
    options: dict[str, Any] = {"similarity": similarity, "margin": margin, "write": write}
    with terminal.Line() as line:
        line.begin("rows")
        options |= {"tell": terminal.say, "progress": lambda rows: line.advance(rows, None)}
        found = check_data([*stage.data, *texts], tests, encoder=encoder, **options)
    _show(found)
    if write is not None:
        terminal.show(f"removed  {removed_of(write)}")
        terminal.show(f"saved    {write}")


def _show(found: Findings) -> None:
    least, median, percentile95, most = found.lengths
    lengths = f"{least:,} to {most:,}; half up to {median:,}, 95 % up to {percentile95:,}"
    rows = [("rows", f"{found.rows:,}"), ("characters", lengths)]
    if found.languages:
        shares = [f"{name} {share:.0%}" for name, share in list(found.languages.items())[:5]]
        rows.append(("languages", ", ".join(shares)))
    for reason, count in found.reasons.most_common():
        rows.append((reason, f"{count:,}"))
    rows.append(("left", f"{found.kept:,}"))
    terminal.facts(rows)
    for reason, examples in found.examples.items():
        terminal.show("\n".join([f"{reason}:", *(f"  {example}" for example in examples)]))
