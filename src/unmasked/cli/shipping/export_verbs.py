"""prove, verify and export: does it still see both ways, and is it still the same, elsewhere?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from unmasked.cli import terminal
from unmasked.cli.failures import MISUSED
from unmasked.cli.options import NEW_FOLDER

if TYPE_CHECKING:
    from unmasked.export.verifying import Verification

AS_JSON = Annotated[bool, Option("--json", help="Write JSON, for programs.")]


def prove(
    model: Annotated[str, Argument(help="Hub name or folder of any model, or 'nano'.")],
    opened: Annotated[
        bool, Option("--open", help="Take the mask off first; by default it is proved as it is.")
    ] = False,
    allow_partial: Annotated[
        bool, Option("--allow-partial", help="Accept layers that stay causal (hybrids).")
    ] = False,
    as_json: AS_JSON = False,
) -> None:
    """Prove that any model sees both ways, as it is. Exit code 2 if it does not.

    Also shows the largest number in each layer, and whether float16 would overflow.
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
        verdict = {None: "not known", True: "overflows", False: "is wide enough"}
        said = verdict[found.float16_overflows]
        terminal.show(f"float16 (largest number {LARGEST_FLOAT16:.0f}): {said}")
    if found.proof.verdict not in ("full", *(["partial"] if allow_partial else [])):
        raise typer.Exit(MISUSED)


def verify(
    target: Annotated[
        str, Argument(metavar="URL|DIR", help="Address of a running server, or another folder.")
    ],
    against: Annotated[str, Option(help="Folder of the encoder that it should be.")],
    model: Annotated[
        str | None, Option(help="The server's name of the model.", show_default="its first")
    ] = None,
    least: Annotated[
        float, Option(min=0.0, max=1.0, help="Least cosine that counts as the same.")
    ] = 0.9999,
    as_json: AS_JSON = False,
) -> None:
    """Compare a server's vectors with a folder's, and say why they differ. Exit code 2 if so.

    The server may speak as OpenAI's API or as text-embeddings-inference. A key for it is read
    from the variable UNMASKED_API_KEY.
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
    rows = zip(parity.texts, parity.cosines, strict=True)
    low = sorted((cosine, number) for number, cosine in rows if cosine < parity.limit)
    for cosine, number in low[:5]:
        terminal.show(f"{cosine:.6f}  {shown(number)}")
    count = f"{len(low)} of {len(parity.texts)} texts are lower"
    verdict = "the same" if parity.same else count
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
        terminal.show("why   not found: none of the usual mistakes comes nearer")
    elif found.explanation.least < parity.limit:
        terminal.show(f"      this explains most of it ({nearest} read that way), not all")
    else:
        terminal.show(f"      this explains it ({nearest} read that way)")


def export(
    model: Annotated[str, Argument(help="Folder or hub name of an encoder.")],
    to: Annotated[
        Literal["onnx", "openvino", "gguf", "vllm", "tei"], Option(help="For which engine.")
    ],
    output: NEW_FOLDER,
    weights: Annotated[
        Literal["float32", "float16", "bfloat16", "int8"] | None,
        Option(
            help="Numbers of the weights.",
            show_default="float32; gguf, tei: float16; vllm: bfloat16",
        ),
    ] = None,
    opset: Annotated[
        int | None, Option(min=18, help="Opset of ONNX.", show_default="the newest")
    ] = None,
    accept: Annotated[
        bool, Option("--accept", help="Keep it although the engine gives other vectors.")
    ] = False,
) -> None:
    """Write an encoder for another engine, and compare twenty texts with torch.

    Other vectors are an error: a cosine below 0.9999, or 0.999 with weights of 8 bits.
    """
    with terminal.loading(f"exporting {model}"):
        from unmasked.export.exporting import export_model

        found = export_model(model, to, output, weights, opset, accept)
    for note in found.notes:
        terminal.show(f"note   {note}")
    if found.parity is not None:
        least, limit = found.parity.least, found.parity.limit
        terminal.show(f"least cosine {least:.6f} (limit {limit}): {found.engine}, {found.weights}")
    terminal.closing(output, ["unmasked", "verify", str(output), "--against", model])
