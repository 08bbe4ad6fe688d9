"""Plain text in: files of lines or JSON lines, then blocks of token ids for MNTP.

Blank lines are skipped, everything else is taken verbatim. A file that is not what it was given as
is refused with its line number before any training begins.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmasked.errors import DataError, nearest
from unmasked.tokens import TextTokenizer

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")


def read_texts(paths: Sequence[str | Path], limit: int | None = None) -> list[str]:
    """The texts of files, in order.

    Args:
        paths: ``.txt`` (a text a line) or ``.jsonl`` (an object with a ``text`` a line), perhaps
            ``.gz``.
        limit: read no more than this many.

    Raises:
        DataError: a file is missing, of another kind, not UTF-8, or there is no text at all.
    """
    if not paths:
        raise DataError("no training text was given. Fix: data=FILE (or [FILE, ...]).")
    texts: list[str] = []
    for path in paths:
        for text in _read_file(Path(path)):
            if limit is not None and len(texts) >= limit:
                return texts
            texts.append(text)
    if not texts:
        raise DataError(f"no text in {', '.join(map(str, paths))}: only empty lines.")
    return texts


def split_held_out(texts: Sequence[str], held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """Shuffle, and set aside `held_out` texts (at most a tenth) that are never trained on."""
    shuffled = list(dict.fromkeys(texts))  # a repeated text must not be on both sides
    random.Random(seed).shuffle(shuffled)
    count = min(held_out, len(shuffled) // 10)
    return shuffled[count:], shuffled[:count]


@dataclass(frozen=True)
class Blocks:
    """Token ids cut into blocks of one length.

    Attributes:
        ids: (N, T) blocks.
        dropped: tokens of the incomplete last block, which is not used.
    """

    ids: np.ndarray
    dropped: int


def make_blocks(texts: Sequence[str], tokens: TextTokenizer, length: int) -> Blocks:
    """Texts one after the other, each behind its own BOS, cut into blocks without padding.

    Raises:
        DataError: all texts together do not fill one block.
    """
    parts: list[np.ndarray] = []
    for start in range(0, len(texts), 4096):
        rows = tokens(texts[start : start + 4096], max_length=1 << 30)
        parts += [np.asarray(row.ids, dtype=np.int32) for row in rows]
    stream = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    count = len(stream) // length
    if count == 0:
        raise DataError(
            f"the training text has {len(stream)} tokens, less than one block of {length}. "
            "Fix: more text, or a smaller block_length."
        )
    used = count * length
    return Blocks(stream[:used].reshape(count, length), len(stream) - used)


def _read_file(path: Path) -> Iterator[str]:
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path} is not a file{nearest(path.name, siblings)}")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file. Allowed: {', '.join(SUFFIXES)}.")
    as_json = ".jsonl" in path.suffixes
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        for number, line in _decoded(file, path):
            text = _json_text(line, path, number) if as_json else line
            if text.strip():
                yield text


def _decoded(file: Iterable[bytes], path: Path) -> Iterator[tuple[int, str]]:
    try:
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not UTF-8 (byte {error.object[error.start]:#x} at "
                    f"position {error.start}). Fix: convert it, as with iconv -f latin1 -t utf-8."
                ) from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}).") from error


def _json_text(line: str, path: Path, number: int) -> str:
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f"{path}, line {number}: expected an object with a string 'text', got {keys}."
        )
    return str(row["text"])
