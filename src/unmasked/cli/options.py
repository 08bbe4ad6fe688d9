"""Arguments and options that several verbs share, and the checks of their output paths."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from unmasked.errors import DataError, OutputError
from unmasked.files.writing import is_special

if TYPE_CHECKING:
    from unmasked.text.passages import Chunks

Pooling = Literal["mean", "weighted_mean", "last_token", "eos_token", "bos_token"]
Dtype = Literal["auto", "checkpoint", "float32", "bfloat16", "float16"]


def complete_recipe(incomplete: str) -> list[str]:
    """The shipped recipes whose names begin with `incomplete`; the shell completes file names."""
    from unmasked.recipe.files import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def complete_setting(incomplete: str) -> list[str]:
    """The settings whose names begin with `incomplete`, each followed by ``=``."""
    from unmasked.recipe.settings import settings

    found = [f"{one.name}=" for one in settings() if not one.section]
    return [name for name in found if name.startswith(incomplete)]


MODEL = Annotated[
    str, Argument(help="Hub name or folder of a model, or 'nano', the bundled decoder.")
]
RECIPE = Annotated[
    str,
    Argument(
        help="YAML file, or a name of 'unmasked recipes list'.", autocompletion=complete_recipe
    ),
]
OVERRIDES = Annotated[
    list[str] | None,
    Argument(
        metavar="SECTION.KEY=VALUE",
        help="Settings to change, e.g. mntp.steps=500; 'unmasked recipes explain' lists them.",
        autocompletion=complete_setting,
    ),
]
DTYPE = Annotated[
    Dtype,
    Option(
        help="Number type of the weights. auto: bfloat16 if the hardware supports it, else "
        "float32; checkpoint: as auto, but never less precise than the checkpoint."
    ),
]


def check_named(path: Path) -> Path:
    """The path itself; `OutputError` for ``-``, which is standard input but no place to write."""
    if str(path) == "-":
        said = "the output is -, but nothing is written to standard output"
        raise OutputError(f"{said}. Fix: give the name of a file or folder.")
    return path


def check_new(path: Path) -> Path:
    """Raise `OutputError` if the path is a file or a filled folder, or cannot become a folder."""
    if check_named(path).is_file() or (path.is_dir() and any(path.iterdir())):
        filled = " and is not empty" if path.is_dir() else ""
        raise OutputError(f"{path} exists{filled}. Fix: give another name.")
    check_folder(path)
    return path


def check_folder(path: Path) -> None:
    """Raise `OutputError` if a part of a folder's path is a file."""
    place = next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())
    if not place.is_dir():
        said = f"{path} cannot be written: {place} is not a folder"
        raise OutputError(f"{said}. Fix: give another name.")


def check_parent(path: Path | None) -> Path | None:
    """Raise `OutputError` if a file cannot be written, before any work is done for it."""
    if path is None or is_special(check_named(path)):
        return path
    if not path.parent.is_dir():
        fix = f"mkdir -p {shlex.quote(str(path.parent))}, or give another name"
        raise OutputError(f"{path} cannot be written: {path.parent} is not a folder. Fix: {fix}.")
    if path.is_dir():
        raise OutputError(f"{path} cannot be written: it is a folder. Fix: give another name.")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-"):
            pass
    except OSError as error:
        reason = f"{path} cannot be written: {error.strerror}"
        raise OutputError(f"{reason}. Fix: give a place where files can be made.") from error
    return path


def check_new_rows(path: Path, option: str) -> None:
    """Raise `OutputError` unless the path of an option can be a new .jsonl file."""
    check_parent(check_new(path))
    if path.suffix != ".jsonl":
        fix = f"{option} {shlex.quote(str(path.with_suffix('.jsonl')))}"
        raise OutputError(f"{path} should end in .jsonl, which training reads. Fix: {fix}.")


COLUMN = Annotated[str, Option(help="Column of the texts (ignored for .txt).")]
PROMPT_NAME = Annotated[
    str | None, Option(help="Use the model's prompt of this name, instead of --prompt.")
]
WHOLE = Annotated[
    bool,
    Option(
        "--whole-files",
        help="Read each file of the folder as one text, with its path as id: .txt, .md, .rst, "
        ".html, .pdf, .docx.",
    ),
]
CHUNK = Annotated[
    int | None,
    Option(
        min=1,
        metavar="TOKENS",
        help="Split texts into passages of at most this many tokens, along sentences.",
        show_default="a text is cut at the model's max_length",
    ),
]
OVERLAP = Annotated[
    int, Option(min=0, metavar="TOKENS", help="Tokens that a passage repeats from the one before.")
]
LATE = Annotated[
    bool,
    Option("--late", help="Pool each passage from one forward pass over its whole document."),
]


def check_used(option: str, given: object, used: bool, needs: str) -> None:
    """Raise `DataError` for an option that would have no effect, as it needs another one."""
    if given is not None and not used:
        said = f"{option} {given} has no effect without {needs}"
        raise DataError(f"{said}. Fix: add {needs}, or leave out {option}.")


def divided(chunk: int | None, overlap: int, late: bool) -> Chunks | None:
    """How texts are split into passages; None if they are not. `DataError` without `chunk`."""
    from unmasked.corpus import Chunks

    if chunk is None and (overlap or late):
        given = "--late" if late else f"--overlap {overlap}"
        raise DataError(f"{given} needs --chunk, which makes passages. Fix: --chunk 256 {given}.")
    return None if chunk is None else Chunks(chunk, overlap, late)


def documents(texts: str, whole_files: bool) -> str:
    """The name of a source of texts; with `whole_files`, that of a folder whose files are texts."""
    from unmasked.files.documents import PREFIX

    return f"{PREFIX}{texts}" if whole_files and not texts.startswith(PREFIX) else texts


NEW_FOLDER = Annotated[Path, Option("-o", "--output", callback=check_new, help="New folder.")]
JSON_FILE = Annotated[
    Path | None,
    Option("--json", callback=check_parent, help="Also write the results to this file, as JSON."),
]
AS_JSON = Annotated[bool, Option("--json", help="Print JSON, for programs.")]
ALLOW_PARTIAL = Annotated[
    bool, Option("--allow-partial", help="Accept a model that keeps causal layers (hybrids).")
]
