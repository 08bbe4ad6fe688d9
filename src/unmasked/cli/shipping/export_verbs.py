"""prove, verify and export: is a model bidirectional, and are its vectors the same elsewhere?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from unmasked.cli import terminal
from unmasked.cli.failures import MISUSED
from unmasked.cli.options import ALLOW_PARTIAL, AS_JSON, NEW_FOLDER, check_used

if TYPE_CHECKING:
    from unmasked.export.verifying import Verification


def prove(
    model: Annotated[str, Argument(help="Hub name or folder of any model, or 'nano'.")],
    opened: Annotated[
        bool,
        Option(
            "--open", help="Remove the causal mask first, instead of testing the model as it is."
        ),
    ] = False,
    allow_partial: ALLOW_PARTIAL = False,
    as_json: AS_JSON = False,
) -> None:
    """Prove whether any model attends in both directions, as it is (exit code 2 if not).

    Also shows the largest activation of each layer, and whether float16 would overflow.
    """
    with terminal.loading(f"proving {model}"):
        from unmasked.doctor.proving import LARGEST_FLOAT16, prove_model

        found = prove_model(model, open=opened)
    if as_json:
        terminal.show(json.dumps(found.as_dict(), indent=2))
    else:
        terminal.show(found.proof.summary())
        rows = [[p.layer, f"{p.largest:.4g}", p.module or "itself"] for p in found.peaks]
        terminal.show_table(["layer", "largest number", "of its module"], rows)
        verdicts = {None: "not known", True: "overflows", False: "is wide enough"}
        verdict = verdicts[found.float16_overflows]
        terminal.show(f"float16 (largest number {LARGEST_FLOAT16:.0f}): {verdict}")
    if found.proof.verdict not in ("full", *(["partial"] if allow_partial else [])):
        raise typer.Exit(MISUSED)


def verify(
    target: Annotated[
        str,
        Argument(metavar="URL|DIR", help="Address of a server, or folder of an encoder or export."),
    ],
    against: Annotated[str, Option(help="Folder or hub name of the encoder to compare with.")],
    model: Annotated[
        str | None, Option(help="The server's name for the model.", show_default="its first")
    ] = None,
    least: Annotated[
        float, Option(min=0.0, max=1.0, help="Minimum cosine of vectors that count as the same.")
    ] = 0.9999,
    as_json: AS_JSON = False,
) -> None:
    """Compare a server's vectors with an encoder's; if they differ (exit code 2), find out why.

    The server may implement OpenAI's API or that of text-embeddings-inference. If it needs an API
    key, set the environment variable UNMASKED_API_KEY.
    """
    with terminal.loading(f"asking {target}"):
        from unmasked.export.verifying import verify_target

        found = verify_target(target, against, model, least)
    if as_json:
        terminal.show(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        _show_verification(found)
    if not found.parity.same:
        raise typer.Exit(MISUSED)


def _show_verification(found: Verification) -> None:
    from unmasked.export.parity import shown

    parity = found.parity
    compared = zip(parity.cosines, parity.texts, strict=True)
    low = sorted((cosine, number) for cosine, number in compared if cosine < parity.limit)
    for cosine, number in low[:5]:
        terminal.show(f"{cosine:.6f}  {shown(number)}")
    verdict = "the same" if parity.same else f"{len(low)} of {len(parity.texts)} texts are lower"
    terminal.show(
        f"{found.target}: least cosine {parity.least:.6f} (limit {parity.limit}): {verdict}"
    )
    for note in found.notes:
        terminal.show(f"note  {note}")
    if found.explanation is None:
        return
    for fault in found.explanation.faults:
        terminal.show(f"why   {fault}")
    nearest = f"least cosine {found.explanation.least:.6f}"
    if not found.explanation.faults:
        terminal.show("why   not found: none of the usual mistakes brings the vectors nearer")
    elif found.explanation.least < parity.limit:
        terminal.show(f"      this explains most of it ({nearest} read that way), not all")
    else:
        terminal.show(f"      this explains it ({nearest} read that way)")


def export(
    model: Annotated[str, Argument(help="Folder or hub name of an encoder.")],
    to: Annotated[
        Literal["onnx", "openvino", "gguf", "vllm", "tei"],
        Option(help="Engine; gguf is for llama.cpp, tei is text-embeddings-inference."),
    ],
    output: NEW_FOLDER,
    weights: Annotated[
        Literal["float32", "float16", "bfloat16", "int8"] | None,
        Option(
            help="Number type of the weights.",
            show_default="float32; gguf, tei: float16; vllm: bfloat16",
        ),
    ] = None,
    opset: Annotated[
        int | None, Option(min=18, help="With --to onnx: the opset.", show_default="the newest")
    ] = None,
    accept: Annotated[
        bool, Option("--accept", help="Keep the export even if the engine's vectors differ.")
    ] = False,
) -> None:
    """Export an encoder to another engine, and compare the vectors of twenty texts with torch's.

    A cosine below 0.9999, or 0.999 with 8-bit weights, is an error, and nothing is kept.
    """
    check_used("--opset", opset, to == "onnx", "--to onnx")
    with terminal.loading(f"exporting {model}"):
        from unmasked.export.exporting import export_model

        found = export_model(model, to, output, weights, opset, accept)
    for note in found.notes:
        terminal.show(f"note   {note}")
    if found.parity is not None:
        least, limit = found.parity.least, found.parity.limit
        terminal.show(f"least cosine {least:.6f} (limit {limit}): {found.engine}, {found.weights}")
    terminal.closing(output, ["unmasked", "verify", str(output), "--against", model])
