"""Where a long text is divided: passages of so many tokens, along the ends of sentences.

A passage is a span of characters of its document. It ends behind the last sentence that fits; where
none does, at the end of a line, then between words, and at the border of a token at last. Tokens
are counted as the passage has them alone, and only as much of the document is tokenised as the next
passage can hold, so a document of any size costs the memory of one passage.

For late pooling (`windows_of`) the tokens of the whole document are laid into one input, or into
overlapping ones if it is longer than the model's positions, and each passage is a span of them.

Cost: about three tokenisations of the text; two more, of the whole document, for late pooling.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from unmasked.errors import DataError
from unmasked.text.beginnings import CHARACTERS
from unmasked.text.tokens import TextTokenizer, TokenRow

_CLOSING = "\"'”’»)\\]"
_BORDERS = tuple(
    re.compile(pattern)
    for pattern in (
        # The end of a sentence, unless a small letter follows; of a paragraph; of a CJK sentence.
        rf"[.!?…]+[{_CLOSING}]*(?=\s+[^\sa-z])|\S(?=[^\S\n]*\n\s*?\n)|[。！？]+[{_CLOSING}」』）]*",
        r"\S(?=[^\S\n]*\n)",  # of a line
        r"\S(?=\s)",  # of a word
    )
)
_AHEAD = 16
"""Tokens behind a passage that are looked at, to see how a sentence goes on."""
_SPARE = 16
"""Positions that late pooling leaves free: in its document a passage may have a token more."""


@dataclass(frozen=True)
class Chunks:
    """How documents become passages.

    Attributes:
        tokens: the most tokens of a passage.
        overlap: the most tokens that a passage shares with the one before it.
        late: pool each passage from one forward over its whole document, so that it knows what
            stands around it (late chunking, arXiv 2409.04701), and not from a forward of its own.
    """

    tokens: int
    overlap: int = 0
    late: bool = False

    def check_sizes(self) -> None:
        """Refuse an overlap that leaves nothing of a passage.

        Raises:
            DataError: says what can be given.
        """
        if self.tokens < 1 or not 0 <= self.overlap < self.tokens:
            raise DataError(
                f"an overlap of {self.overlap} tokens should be at least 0 and less than the "
                f"{self.tokens} of a passage. Fix: --chunk 256 --overlap 32."
            )

    def check(self, tokens: TextTokenizer, prompt: str = "", positions: int | None = None) -> None:
        """Refuse what would leave nothing of a passage, cut it, or misplace it.

        Args:
            tokens: the tokenizer of the model.
            prompt: what stands before every text.
            positions: the most tokens of an input for late pooling; None for those of the model's
                ``max_length``.

        Raises:
            DataError: says what can be given.
        """
        self.check_sizes()
        if self.late:
            self._check_late(tokens)
        most = tokens.room(prompt, positions) - (_SPARE if self.late else 0)
        if self.tokens > most:
            limit = positions if self.late and positions else tokens.max_length
            # A model without any room says so itself, with its instruction.
            fix = f"--chunk {most}" if most > 0 else "a shorter instruction"
            more = "" if self.late else ", or a model that is loaded with a larger max_length"
            raise DataError(
                f"a passage of {self.tokens} tokens is longer than the {max(most, 0)} that an "
                f"input of {limit} tokens has for its text. Fix: {fix}{more}."
            )

    def _check_late(self, tokens: TextTokenizer) -> None:
        template, why = tokens.template, None
        if type(tokens) is not TextTokenizer:
            why = "this model counts the tokens of a text from the end (compat llm2vec-0.2)"
        elif template.suffix and template.pool_suffix:
            why = f"the template of this model ends a text with {template.suffix!r} and pools that"
        elif not tokens.skip_instruction:
            why = "this model pools what stands before a text as well (skip_instruction=False)"
        if why is not None:
            raise DataError(f"{why}, which has no place inside a document. Fix: leave out --late.")


def divide(tokens: TextTokenizer, text: str, chunks: Chunks) -> list[tuple[int, int]]:
    """The passages of a text, in order, as spans of characters without white space around.

    A text that is one passage is the whole text, white space included.

    Args:
        tokens: counts.
        text: the document.
        chunks: the sizes.
    """
    spans: list[tuple[int, int]] = []
    begin = reached = 0
    while (begin := _skip(text, begin)) < len(text):
        found = _next(tokens, text, begin, chunks)
        if found.end <= reached:  # the shared part is all that fits: go on behind it
            begin = reached
            found = _next(tokens, text, _skip(text, begin), chunks)
            begin = _skip(text, begin)
        spans.append((begin, found.end))
        reached = found.end
        if _skip(text, reached) == len(text):
            break
        begin = found.following
    return [(0, len(text))] if len(spans) < 2 else spans


class Passage(NamedTuple):
    """A part of a document: the place of that among others, and a span of its characters."""

    document: int
    begin: int
    end: int


class _Found(NamedTuple):
    """The end of a passage, and where the next one begins."""

    end: int
    following: int


def _next(tokens: TextTokenizer, text: str, begin: int, chunks: Chunks) -> _Found:
    """The longest passage from a character on that ends well and has not too many tokens."""
    encode, limit = tokens.tokenizer.backend_tokenizer.encode, chunks.tokens
    size = (limit + _AHEAD) * CHARACTERS
    while True:
        head = text[begin : begin + size]
        encoding = encode(head, add_special_tokens=False)
        if len(head) < size or len(encoding.ids) > limit + _AHEAD:
            break
        size *= 2
    if len(encoding.ids) <= limit:
        return _Found(begin + len(head.rstrip()), len(text))
    most = limit
    while True:
        end = max(_border(head, encoding.offsets[most][0]), 1)
        count = len(encode(head[:end], add_special_tokens=False).ids)
        if count <= limit or most == 0:
            break
        most = max(most - (count - limit), 0)  # alone it has more tokens than in its text
    following = end
    if chunks.overlap:
        last = bisect_left(encoding.offsets, end, key=itemgetter(0))
        least = encoding.offsets[max(last - chunks.overlap, 0)][0]
        following = _start(head, least, end)
    return _Found(begin + end, begin + following)


def _border(head: str, most: int) -> int:
    """The last good end of a passage at or before a character; that character if there is none."""
    for pattern in _BORDERS:
        last = 0
        for match in pattern.finditer(head, 0, min(len(head), most + 256)):
            if match.end() > most:
                break
            last = match.end()
        if last:
            return last
    return most


def _start(head: str, least: int, end: int) -> int:
    """The first good beginning between two characters; the second one if there is none."""
    for pattern in (_BORDERS[0], _BORDERS[-1]):
        for match in pattern.finditer(head, max(least - 1, 0), end):
            begin = _skip(head, match.end())
            if least <= begin < end:
                return begin
    return end


def _skip(text: str, begin: int) -> int:
    """The first character from `begin` on that is no white space, or the length of the text."""
    found = _VISIBLE.search(text, begin)
    return found.start() if found else len(text)


_VISIBLE = re.compile(r"\S")


class Window(NamedTuple):
    """An input for late pooling.

    Attributes:
        row: ids of the document, or of a part of it, behind the prompt.
        passages: which passages of the document are pooled from it.
        spans: their tokens in the row, (start, stop) each.
    """

    row: TokenRow
    passages: list[int]
    spans: list[tuple[int, int]]


def windows_of(
    tokens: TextTokenizer, text: str, passages: Sequence[tuple[int, int]], prompt: str, limit: int
) -> Iterator[Window]:
    """The inputs that the passages of a document are pooled from: one, or overlapping ones.

    Beyond the limit, each passage is pooled from the window in which it has the most around it.

    Args:
        tokens: the tokenizer of the model.
        text: the document.
        passages: spans of its characters, as `divide` gives them.
        prompt: what stands before it.
        limit: the most tokens of an input.
    """
    found = tokens.locate(text, prompt)
    count, context = found.last - found.first, found.ids[: found.first]
    own, ending = found.ids[found.first : found.last], found.ids[found.last :]
    room = limit - len(tokens.prefix) - len(tokens.suffix) - len(context) - len(ending)
    spans = [_tokens_of(found.offsets, span, count) for span in passages]
    starts = [0]
    if count > room:
        longest = max(stop - start for start, stop in spans)
        step = max(min(3 * room // 4, room - longest), 1)
        starts = [*range(0, count - room, step), count - room]
    members: dict[int, list[int]] = {}
    for index, span in enumerate(spans):
        members.setdefault(_best_window(starts, span, room, count), []).append(index)
    for start, inside in sorted(members.items()):
        row = tokens.around(own[start : start + room], context, ending)
        shift = len(tokens.prefix) + len(context) - start
        # What ends every input and is pooled with a text (EOS) belongs to the last passage.
        ends = [row.stop if spans[i][1] == count else spans[i][1] + shift for i in inside]
        begins = [row.start if spans[i][0] == 0 else spans[i][0] + shift for i in inside]
        yield Window(row, inside, list(zip(begins, ends, strict=True)))


def _tokens_of(
    offsets: Sequence[tuple[int, int]], span: tuple[int, int], count: int
) -> tuple[int, int]:
    """The tokens that stand for some characters; at least one, where there is any."""
    start = bisect_right(offsets, span[0], key=itemgetter(1))
    stop = bisect_left(offsets, span[1], key=itemgetter(0))
    start = max(min(start, count - 1), 0)
    return start, max(stop, min(start + 1, count))


def _best_window(starts: Sequence[int], span: tuple[int, int], room: int, count: int) -> int:
    """The start of the window in which a passage has the most tokens on its poorer side."""

    def around(start: int) -> int:
        before = count if start == 0 else span[0] - start
        behind = count if start + room >= count else start + room - span[1]
        return min(before, behind)

    return max(starts, key=around)
