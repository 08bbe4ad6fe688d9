"""merge: one encoder of several that were trained from one base."""

from __future__ import annotations

from typing import Annotated, Literal

from typer import Argument, Option

from unmasked.cli import terminal
from unmasked.cli.options import DTYPE, NEW_FOLDER
from unmasked.errors import ModelError


def _shares(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ModelError(
            f"--weights '{text}' should be numbers with commas. Fix: --weights 0.7,0.3"
        ) from None


def merge(
    models: Annotated[
        list[str],
        Argument(metavar="A B [C ...]", help="Encoders or adapters of one base; A gives prompts."),
    ],
    output: NEW_FOLDER,
    weights: Annotated[
        str | None, Option(help="Share of each: 0.7,0.3.", show_default="the same for all")
    ] = None,
    method: Annotated[
        Literal["linear", "slerp"],
        Option(help="linear: weighted mean; slerp: along the sphere, for two."),
    ] = "linear",
    dtype: DTYPE = "checkpoint",
    allow_partial: Annotated[
        bool, Option("--allow-partial", help="Accept layers that stay causal (hybrids).")
    ] = False,
) -> None:
    """Merge encoders or adapters of one base into one, weight by weight; proved, then saved.

    It often keeps more of what each part knows than either part does.
    """
    shares = _shares(weights)
    with terminal.loading(f"merging {len(models)} encoders"):
        from unmasked.train import blending

        given = blending.check_weights(models, shares, method)
        options = {"dtype": dtype, "allow_partial": allow_partial}
        encoder = blending.merge_encoders(models, given, method, **options)
    terminal.show(encoder.report.summary())
    with terminal.waiting("saving"):
        encoder.save(output, card=blending.merge_card(encoder, models, given, method))
    terminal.closing(output, ["unmasked", "evaluate", str(output), *models, "--tasks", "TASK"])
