"""merge: several encoders that were trained from one base become one."""

from __future__ import annotations

from typing import Annotated, Literal

from typer import Argument, Option

from unmasked.cli import terminal
from unmasked.cli.options import ALLOW_PARTIAL, DTYPE, NEW_FOLDER
from unmasked.errors import ModelError


def _shares(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ModelError(
            f"--weights '{text}' should be numbers separated by commas. Fix: --weights 0.7,0.3"
        ) from None


def merge(
    models: Annotated[
        list[str],
        Argument(
            metavar="A B [C ...]",
            help="Encoders or adapters trained from one base; settings and prompts are A's.",
        ),
    ],
    output: NEW_FOLDER,
    weights: Annotated[
        str | None,
        Option(help="Share of each encoder, with sum 1: 0.7,0.3.", show_default="equal shares"),
    ] = None,
    method: Annotated[
        Literal["linear", "slerp"],
        Option(help="linear: weighted mean; slerp: spherical interpolation, for two encoders."),
    ] = "linear",
    dtype: DTYPE = "checkpoint",
    allow_partial: ALLOW_PARTIAL = False,
) -> None:
    """Merge encoders or adapters of one base into one, weight by weight, and prove the result.

    The merged encoder often keeps more of what each part has learned than the other part does.
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
