"""Tokens of the beginning of a text, and the tokens at its borders, read from character offsets.

A text far longer than an input is cut before it is tokenised: only its beginning decides its ids.
How far a character can change the tokens to its left is bounded for a vocabulary (Berglund and van
der Merwe, arXiv 2309.08715), by a few tokens in practice; `MARGIN` is far beyond that. Where a
beginning turns out to have too few tokens, twice as much of the text is tokenised.

Cost: a megabyte takes as long as the few thousand characters that an input can hold.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

MARGIN = 256
"""Tokens behind the last one that counts which are tokenised with it, so that it stays the same."""
CHARACTERS = 8
"""Characters of a long text that are tried for each token."""


class Beginning(NamedTuple):
    """The tokens of context, text and ending, and the number of characters that were the text."""

    encoding: Encoding
    length: int


def encode_beginnings(
    backend: Tokenizer,
    texts: Sequence[str],
    contexts: Sequence[str],
    end: str,
    tokens: int,
    offsets: bool,
) -> list[Beginning]:
    """Tokens of texts, of which no input holds more than some; a longer text loses its middle.

    Args:
        backend: the tokenizer.
        texts: N texts.
        contexts: what stands before each of them.
        end: what stands behind each of them. It may merge with the end of a text, so that is kept.
        tokens: the most tokens of an input; those up to there are the ones of the whole text.
        offsets: whether the tokens have to know their characters.
    """
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    needed, found = tokens + MARGIN, {}
    todo, most = list(range(len(texts))), needed * CHARACTERS
    while todo:
        tail = most if end else 0
        heads = [
            text if len(text) <= most + tail else text[:most] + text[len(text) - tail :]
            for text in (texts[i] for i in todo)
        ]
        joined = [contexts[i] + head + end for i, head in zip(todo, heads, strict=True)]
        encodings = encode(joined, add_special_tokens=False)
        for i, head, encoding in zip(todo, heads, encodings, strict=True):
            whole = len(head) == len(texts[i])
            if whole or _tokens_until(encoding, len(head) - tail, bool(end)) >= needed:
                found[i] = Beginning(encoding, len(head))
        todo, most = [i for i in todo if i not in found], 2 * most
    return [found[i] for i in range(len(texts))]


def _tokens_until(encoding: Encoding, length: int, other: bool) -> int:
    """Tokens of the first characters, of all if nothing else is there."""
    if not other:
        return len(encoding.ids)
    return bisect_right(encoding.offsets, length, key=itemgetter(1))


def reaching(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """Index of the first token that reaches beyond a character position."""
    for index, (_, end) in enumerate(offsets):
        if end > character:
            return index
    return len(offsets)


def starting(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """Index of the first token that starts at or behind a character position."""
    for index in range(len(offsets) - 1, -1, -1):
        if offsets[index][0] < character:
            return index + 1
    return 0
