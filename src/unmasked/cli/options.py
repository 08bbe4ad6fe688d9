"""Arguments and options that several verbs share, and the checks of where a verb may write."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from unmasked.errors import DataError, OutputError

if TYPE_CHECKING:
    from unmasked.text.passages import Chunks

Pooling = Literal["mean", "weighted_mean", "last_token", "eos_token", "bos_token"]
Dtype = Literal["auto", "checkpoint", "float32", "bfloat16", "float16"]


def complete_recipe(incomplete: str) -> list[str]:
    """The shipped recipes that begin so; the shell adds files itself."""
    from unmasked.recipe.files import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def complete_setting(incomplete: str) -> list[str]:
    """The settings that begin so, as far as their equals sign."""
    from unmasked.recipe.settings import settings

    found = [f"{one.name}=" for one in settings() if not one.section]
    return [name for name in found if name.startswith(incomplete)]


MODEL = Annotated[str, Argument(help="Hub name, folder, or 'nano', the bundled decoder.")]
RECIPE = Annotated[
    str,
    Argument(help="YAML file, or the name of a shipped recipe.", autocompletion=complete_recipe),
]
OVERRIDES = Annotated[
    list[str] | None,
    Argument(
        metavar="SECTION.KEY=VALUE",
        help="Settings to change: mntp.steps=500; 'unmasked recipes explain' lists them.",
        autocompletion=complete_setting,
    ),
]
DTYPE = Annotated[
    Dtype,
    Option(
        help="Number type of the weights. auto: bfloat16 where the hardware has it; "
        "checkpoint: the same, but never less than the checkpoint has."
    ),
]


def check_new(path: Path) -> Path:
    """Refuse to write over a file, or into a folder that is not empty, with `OutputError`."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        filled = " and is not empty" if path.is_dir() else ""
        raise OutputError(f"{path} exists{filled}. Fix: give another name.")
    return path


def check_parent(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written, before any work is done for it."""
    if path is None:
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


COLUMN = Annotated[str, Option(help="Column that holds the text (ignored for .txt).")]
PROMPT_NAME = Annotated[str | None, Option(help="Name of a prompt of the model.")]
WHOLE = Annotated[
    bool,
    Option(
        "--whole-files",
        help="Each file of the folder is one text, with its path as id: .txt, .md, .rst, .html, "
        ".pdf, .docx.",
    ),
]
CHUNK = Annotated[
    int | None,
    Option(
        min=1,
        metavar="TOKENS",
        help="Divide texts into passages of at most so many tokens, along sentences.",
        show_default="a text is cut at the model's max_length, and counted",
    ),
]
OVERLAP = Annotated[
    int, Option(min=0, metavar="TOKENS", help="Tokens that a passage shares with the one before.")
]
LATE = Annotated[
    bool,
    Option("--late", help="Pool each passage from one forward over its whole document."),
]


def divided(chunk: int | None, overlap: int, late: bool) -> Chunks | None:
    """How texts become passages; None if they stay whole."""
    from unmasked.corpus import Chunks

    if chunk is None and (overlap or late):
        given = "--late" if late else f"--overlap {overlap}"
        raise DataError(f"{given} is about passages. Fix: --chunk 256 {given}.")
    return None if chunk is None else Chunks(chunk, overlap, late)


def documents(texts: str, whole_files: bool) -> str:
    """The name of texts, or of a folder of which each file is one."""
    from unmasked.files.documents import PREFIX

    return f"{PREFIX}{texts}" if whole_files and not texts.startswith(PREFIX) else texts


NEW_FOLDER = Annotated[Path, Option("-o", "--output", callback=check_new, help="New folder.")]
JSON_FILE = Annotated[
    Path | None,
    Option("--json", callback=check_parent, help="Also write the numbers to this file."),
]
