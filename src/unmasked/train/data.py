"""Texts to train on: read, split, and cut into blocks of token ids for MNTP.

Blank lines are skipped, everything else is taken verbatim. All texts are held in memory.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmasked.errors import DataError
from unmasked.source import Source
from unmasked.tokens import TextTokenizer


def read_texts(paths: Sequence[str | Path], limit: int | None = None) -> list[str]:
    """The texts of files, in order.

    Args:
        paths: ``.txt`` (a text a line), ``.jsonl`` or ``.csv`` (``text``), perhaps ``.gz``.
        limit: read no more than this many.

    Raises:
        DataError: a file is missing, of another kind, not UTF-8, or has no text in it.
    """
    if not paths:
        raise DataError("no training text was given. Fix: data=FILE (or [FILE, ...]).")
    texts: list[str] = []
    for path in paths:
        for _, text, _ in Source(str(path), skip_blank=True).records():
            if limit is not None and len(texts) >= limit:
                return texts
            texts.append(text)
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
