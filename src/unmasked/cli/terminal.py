"""What the commands print: results on stdout, progress on stderr, as one line while they work.

On a terminal the progress line is live; otherwise a plain line is written every few seconds.
``NO_COLOR`` and ``COLUMNS`` are honoured by rich. Cost: importing rich (0.1 s).
"""

from __future__ import annotations

import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from unmasked.files.readers import fault_error, read_txt, where

if TYPE_CHECKING:
    from unmasked.compat.llm2vec import LLM2Vec

PLAIN_EVERY = 5.0  # seconds between two progress lines if stderr is not a terminal


def _console(stderr: bool) -> Console:
    quiet = os.environ.get("RANK", "0") != "0"  # of several processes, only the first prints
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False, quiet=quiet)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 10_000  # a file has no right edge
    return made


def say(text: str) -> None:
    """Print a line of progress or advice on stderr."""
    _console(stderr=True).print(Text(text), soft_wrap=True)


def show(text: str) -> None:
    """Print a line of the result on stdout, never wrapped."""
    _console(stderr=False).print(Text(text), soft_wrap=True)


def facts(rows: Sequence[tuple[str, str]], *, stderr: bool = False) -> None:
    """Print pairs of label and value in two columns."""
    console = _console(stderr)
    width = max((len(label) for label, _ in rows), default=0)
    for label, value in rows:
        console.print(Text.assemble((label.ljust(width), "dim"), "  ", value), soft_wrap=True)


def show_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[int] = ()
) -> None:
    """Print a table on stdout; a table wider than the terminal is printed as paragraphs.

    Args:
        columns: titles. The first column is aligned to the left, all others to the right.
        marked: indices of the rows in bold.
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, title in enumerate(columns):
        made.add_column(Text(title), justify="right" if index else "left", overflow="fold")
    for index, row in enumerate(rows):
        made.add_row(*map(Text, row), style="bold" if index in marked else None)
    console = _console(stderr=False)
    unbounded = console.options.update(max_width=10_000)
    if made.columns and console.measure(made, options=unbounded).maximum > console.width:
        _print_paragraphs(console, columns, rows, marked)
    else:
        console.print(made)


def _print_paragraphs(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[int]
) -> None:
    """Print each row as a paragraph: its first cell, then a line for each other column."""
    width = max(map(len, columns[1:]), default=0)
    for index, (first, *others) in enumerate(rows):
        style = "bold" if index in marked else ""
        console.print(Text(first, style=style), soft_wrap=True)
        for title, cell in zip(columns[1:], others, strict=True):
            if cell.strip():
                console.print(Text(f"  {title.ljust(width)}  {cell}", style=style), soft_wrap=True)


def closing(saved: Path, following: Sequence[str] = (), done: bool = False) -> None:
    """Print the closing box: where the result is, and the next command.

    Args:
        saved: what was written.
        following: the words of the next command; by default, encode with the saved encoder.
        done: whether the result existed before the command.
    """
    following = following or ["unmasked", "encode", str(saved), "texts.txt", "-o", "vectors.npy"]
    label = "done " if done else "saved"
    lines = [f"{label}  {shlex.quote(str(saved))}", f"next   {shlex.join(following)}"]
    console = _console(stderr=False)
    if console.is_terminal and max(map(len, lines)) + 4 <= console.width:
        console.print(Panel.fit(Text("\n".join(lines)), border_style="green"))
    else:
        console.print(Text("\n".join(lines)), soft_wrap=True)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a spinner during work whose progress is unknown; without a terminal, print one line."""
    console = _console(stderr=True)
    if console.is_terminal:
        with console.status(Text(text)):
            yield
    else:
        say(text)
        yield


@contextmanager
def loading(text: str) -> Iterator[None]:
    """`waiting` during work that imports the libraries; their messages are silenced for good."""
    with waiting(text):
        quiet_libraries()
        yield


def load_encoder(model: str, **options: Any) -> LLM2Vec:
    """`LLM2Vec.from_pretrained`, with a spinner."""
    with loading(f"loading {model}"):
        from unmasked.compat.llm2vec import LLM2Vec

        return LLM2Vec.from_pretrained(model, **options)


def quiet_libraries() -> None:
    """Silence the progress bars and warnings of the libraries, except for downloads from the hub.

    What matters in their warnings is an error in this package: weights that a checkpoint lacks, or
    a hub that cannot be reached.
    """
    # Deprecations between the libraries concern their authors only.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT corrects this by itself
    from datasets.utils.logging import disable_progress_bar
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    disable_progress_bar()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def duration(seconds: float) -> str:
    """``0:01:05``, ``1 day, 2:03:04``."""
    return str(timedelta(seconds=int(seconds)))


def short(number: float, unit: str = "") -> str:
    """``6.5 M``, ``1.2 kB``, ``512 B``."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.1f} {letter}{unit}"
    return f"{number:g} {unit}".rstrip()


class Line:
    """The progress line: a name, how much is done, what was measured, and the time left.

    Use as a context manager. Everything is written to stderr.
    """

    def __init__(self) -> None:
        self._console = _console(stderr=True)
        self._plain = not self._console.is_terminal
        self._live = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=self._plain,
        )
        self._task = self._live.add_task("", visible=False)
        self._name = ""
        self._printed_at = -PLAIN_EVERY
        self._first: tuple[float, int] | None = None  # time and count of the first `advance`

    def __enter__(self) -> Line:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def begin(self, name: str) -> None:
        """Begin a new piece of work, whose length is not known yet."""
        self._name, self._first, self._printed_at = name, None, -PLAIN_EVERY
        self._live.reset(self._task, description=name, visible=True)
        if self._plain:
            self.note(name)

    def counted(self, name: str, done: int, total: int) -> None:
        """Show how much of a piece of work is done; a new name begins a new one."""
        if name != self._name:
            self.begin(name)
        self.advance(done, total)

    def note(self, text: str) -> None:
        """Print a line that stays above the progress line."""
        self._console.print(Text(text, style="dim"), soft_wrap=True)

    def advance(self, done: int, total: int | None, *notes: str) -> None:
        """Show how much is done, then notes, then the time left if it can be estimated."""
        now = time.monotonic()
        begun, first = self._first = self._first or (now, done)
        count = f"{done:,}/{total:,}" if total else f"{done:,}"
        parts = [f"{self._name} {count}", *notes]
        if total and first < done < total:
            left = (total - done) * (now - begun) / (done - first)
            parts.append(f"ETA {duration(left)}")
        text = "  ".join(parts)
        self._live.update(self._task, description=text)
        if self._plain and (now - self._printed_at >= PLAIN_EVERY or done == total):
            self._printed_at = now
            self.note(text)


def queries() -> Iterator[str]:
    """The lines of standard input up to an empty one; on a terminal, with a prompt.

    Raises:
        DataError: a line is not UTF-8.
    """
    if sys.stdin.isatty():
        with suppress(EOFError):
            while line := input("query: ").strip():
                yield line
        return
    for cells in read_txt("-", "query"):
        if cells.fault is not None:
            raise fault_error(where("-", cells.number), cells.fault)
        if not (line := cells.values["query"].strip()):
            return
        yield line
