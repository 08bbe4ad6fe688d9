"""Tokenises only the beginning of a long text, and finds tokens by character offsets.

A text much longer than an input is shortened before it is tokenised, because only its beginning
determines the ids that are kept. How far a character can change the tokens to its left is bounded
for a vocabulary (Berglund and van der Merwe, arXiv 2309.08715), in practice by a few tokens;
`MARGIN` is far beyond that. If a beginning turns out to have too few tokens, twice as much of the
text is tokenised.

Cost: a text of a megabyte takes as long as the few thousand characters that an input can hold.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

MARGIN = 256
"""Number of tokens beyond the limit that are tokenised too, so that those before it are final."""
CHARACTERS = 8
"""Number of characters that are tokenised at first for each token that is needed."""


class Beginning(NamedTuple):
    """The tokens of context, text and ending, and how many characters of the text they cover."""

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
    """Tokenise each text between its context and the ending, leaving out the middle of long texts.

    The first `tokens` tokens are the same as those of the whole text.

    Args:
        backend: the tokenizer.
        texts: N texts.
        contexts: N strings; each is put before its text.
        end: put after every text. It may merge with the end of a text, so the end of a long text is
            kept too.
        tokens: the most tokens that an input keeps.
        offsets: whether the encodings need character offsets.
    """
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    needed, found = tokens + MARGIN, {}
    todo, head = list(range(len(texts))), needed * CHARACTERS
    while todo:
        tail = head if end else 0
        shortened = [
            text if len(text) <= head + tail else text[:head] + text[len(text) - tail :]
            for text in (texts[i] for i in todo)
        ]
        joined = [contexts[i] + text + end for i, text in zip(todo, shortened, strict=True)]
        encodings = encode(joined, add_special_tokens=False)
        for i, text, encoding in zip(todo, shortened, encodings, strict=True):
            whole = len(text) == len(texts[i])
            if whole or _tokens_until(encoding, head if end else None) >= needed:
                found[i] = Beginning(encoding, len(text))
        todo, head = [i for i in todo if i not in found], 2 * head
    return [found[i] for i in range(len(texts))]


def _tokens_until(encoding: Encoding, character: int | None) -> int:
    """The number of tokens that end at or before a character position; None counts all."""
    if character is None:
        return len(encoding.ids)
    return bisect_right(encoding.offsets, character, key=itemgetter(1))


def reaching(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """Index of the first token that ends after a character position."""
    for index, (_, end) in enumerate(offsets):
        if end > character:
            return index
    return len(offsets)


def starting(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """Index of the first token that starts at or after a character position."""
    for index in range(len(offsets) - 1, -1, -1):
        if offsets[index][0] < character:
            return index + 1
    return 0
