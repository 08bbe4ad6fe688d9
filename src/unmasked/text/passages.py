"""Divides a long text into passages with a limited number of tokens, at the ends of sentences.

A passage is a span of characters of its document. It ends after the last sentence that fits; if
none does, at the end of a line, else between words, else between tokens. Its tokens are counted as
if it were a text of its own. Only as much of the document is tokenised at a time as the next
passage can hold, so a document of any size takes the memory of one passage.

For late pooling (`windows_of`) the tokens of the whole document become one input, or overlapping
ones if the document is longer than the model's positions, and each passage is a span of them.

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
from unmasked.text.inputs import is_count
from unmasked.text.tokens import TextTokenizer, TokenRow

_CLOSING = "\"'”’»)\\]"
_BORDERS = tuple(
    re.compile(pattern)
    for pattern in (
        # The end of a sentence, unless a lower-case letter follows; of a paragraph; of a CJK
        # sentence.
        rf"[.!?…]+[{_CLOSING}]*(?=\s+[^\sa-z])|\S(?=[^\S\n]*\n\s*?\n)|[。！？]+[{_CLOSING}」』）]*",
        r"\S(?=[^\S\n]*\n)",  # the end of a line
        r"\S(?=\s)",  # the end of a word
    )
)
"""The ends at which a passage may stop, best ones first."""
_AHEAD = 16
"""Number of tokens after a passage that are looked at to see whether a sentence has ended."""
_SPARE = 16
"""Positions that late pooling leaves free, as a passage may have more tokens in its document."""


@dataclass(frozen=True)
class Chunks:
    """How documents are divided into passages.

    Attributes:
        tokens: the most tokens of a passage.
        overlap: the most tokens that a passage shares with the one before it.
        late: pool each passage from one forward over its whole document instead of a forward of its
            own, so that its vector depends on its context (late chunking, arXiv 2409.04701).
    """

    tokens: int
    overlap: int = 0
    late: bool = False

    def check_sizes(self) -> None:
        """Refuse an overlap that is as long as a passage.

        Raises:
            DataError: the sizes do not fit each other.
        """
        whole = is_count(self.tokens) and (is_count(self.overlap) or self.overlap == 0)
        if not whole or self.overlap >= self.tokens:
            raise DataError(
                f"an overlap of {self.overlap} tokens should be at least 0 and less than the "
                f"{self.tokens} tokens of a passage. Fix: --chunk 256 --overlap 32."
            )

    def check(self, tokens: TextTokenizer, prompt: str = "", positions: int | None = None) -> None:
        """Refuse sizes that the model would truncate, and late pooling that it does not support.

        Args:
            tokens: the tokenizer of the model.
            prompt: put before every text.
            positions: the most tokens of an input for late pooling; None for the model's
                ``max_length``.

        Raises:
            DataError: the message says what is allowed.
        """
        self.check_sizes()
        if self.late:
            self._check_late(tokens)
        most = tokens.room(prompt, positions) - (_SPARE if self.late else 0)
        if self.tokens > most:
            limit = positions if self.late and positions else tokens.max_length
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
            why = f"the template of this model ends a text with {template.suffix!r} and pools it"
        elif not tokens.skip_instruction:
            why = "this model pools BOS and the instruction too (skip_instruction=False)"
        if why is not None:
            raise DataError(
                f"{why}, which passages inside a document cannot have. Fix: leave out --late."
            )


def divide(tokens: TextTokenizer, text: str, chunks: Chunks) -> list[tuple[int, int]]:
    """The passages of a text, in order, as spans of characters without surrounding white space.

    A text that fits into one passage is one span, white space included.

    Args:
        tokens: counts the tokens.
        text: the document.
        chunks: the sizes.
    """
    spans: list[tuple[int, int]] = []
    reached = 0  # end of the last passage
    begin = _skip_space(text, 0)
    while begin < len(text):
        found = _next(tokens, text, begin, chunks)
        if found.end <= reached:  # nothing but the overlap fits: continue after it
            begin = _skip_space(text, reached)
            found = _next(tokens, text, begin, chunks)
        spans.append((begin, found.end))
        reached = found.end
        if _skip_space(text, reached) == len(text):
            break
        begin = _skip_space(text, found.following)
    return [(0, len(text))] if len(spans) < 2 else spans


class Passage(NamedTuple):
    """A part of a document: the index of the document, and a span of its characters."""

    document: int
    begin: int
    end: int


class _Found(NamedTuple):
    """The end of a passage, and where the next one begins."""

    end: int
    following: int


def _next(tokens: TextTokenizer, text: str, begin: int, chunks: Chunks) -> _Found:
    """The longest passage that begins at a character, fits, and stops at the best kind of end."""
    encode, limit = tokens.backend.encode, chunks.tokens
    size = (limit + _AHEAD) * CHARACTERS
    while True:  # tokenise more of the text until it is longer than the passage
        head = text[begin : begin + size]
        encoding = encode(head, add_special_tokens=False)
        if len(head) < size or len(encoding.ids) > limit + _AHEAD:
            break
        size *= 2
    if len(encoding.ids) <= limit:
        return _Found(begin + len(head.rstrip()), len(text))
    most = limit
    while True:  # a passage may have more tokens alone than inside the text
        end = max(_last_end(head, encoding.offsets[most][0]), 1)
        count = len(encode(head[:end], add_special_tokens=False).ids)
        if count <= limit or most == 0:
            break
        most = max(most - (count - limit), 0)
    following = end
    if chunks.overlap:
        stop = bisect_left(encoding.offsets, end, key=itemgetter(0))
        earliest = encoding.offsets[max(stop - chunks.overlap, 0)][0]
        following = _first_begin(head, earliest, end)
    return _Found(begin + end, begin + following)


def _last_end(head: str, most: int) -> int:
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


def _first_begin(head: str, earliest: int, end: int) -> int:
    """The first good beginning from `earliest` on: of a sentence, else of a word, else `end`."""
    for pattern in (_BORDERS[0], _BORDERS[-1]):
        for match in pattern.finditer(head, max(earliest - 1, 0), end):
            begin = _skip_space(head, match.end())
            if earliest <= begin < end:
                return begin
    return end


def _skip_space(text: str, begin: int) -> int:
    """The first character from `begin` on that is not white space, or the length of the text."""
    found = _VISIBLE.search(text, begin)
    return found.start() if found else len(text)


_VISIBLE = re.compile(r"\S")


class Window(NamedTuple):
    """An input for late pooling.

    Attributes:
        row: ids of the document, or of a part of it, after the prompt.
        passages: indices of the passages that are pooled from it.
        spans: (start, stop) of their tokens in the row.
    """

    row: TokenRow
    passages: list[int]
    spans: list[tuple[int, int]]


def windows_of(
    tokens: TextTokenizer, text: str, passages: Sequence[tuple[int, int]], prompt: str, limit: int
) -> Iterator[Window]:
    """The inputs from which the passages of a document are pooled: one, or overlapping ones.

    In a document beyond the limit, each passage is pooled from the window in which it has the most
    context.

    Args:
        tokens: the tokenizer of the model.
        text: the document.
        passages: spans of its characters, from `divide`.
        prompt: put before the document.
        limit: the most tokens of an input.
    """
    found = tokens.locate(text, prompt)
    count, context = found.last - found.first, found.ids[: found.first]
    own, ending = found.ids[found.first : found.last], found.ids[found.last :]
    room = limit - len(tokens.prefix) - len(tokens.suffix) - len(context) - len(ending)
    spans = [_tokens_of(found.offsets, span, count) for span in passages]
    starts = [0]
    if count > room:  # overlap by a quarter, or by more so that some window holds each passage
        longest = max(stop - start for start, stop in spans)
        step = max(min(3 * room // 4, room - longest), 1)
        starts = [*range(0, count - room, step), count - room]
    members: dict[int, list[int]] = {}
    for index, span in enumerate(spans):
        members.setdefault(_best_window(starts, span, room, count), []).append(index)
    for start, inside in sorted(members.items()):
        row = tokens.around(own[start : start + room], context, ending)
        shift = len(tokens.prefix) + len(context) - start
        # The last passage includes the tokens after a text that are pooled with it (EOS).
        ends = [row.stop if spans[i][1] == count else spans[i][1] + shift for i in inside]
        begins = [row.start if spans[i][0] == 0 else spans[i][0] + shift for i in inside]
        yield Window(row, inside, list(zip(begins, ends, strict=True)))


def _tokens_of(
    offsets: Sequence[tuple[int, int]], span: tuple[int, int], count: int
) -> tuple[int, int]:
    """The tokens of a span of characters; at least one, if the text has any."""
    start = bisect_right(offsets, span[0], key=itemgetter(1))
    stop = bisect_left(offsets, span[1], key=itemgetter(0))
    start = max(min(start, count - 1), 0)
    return start, max(stop, min(start + 1, count))


def _best_window(starts: Sequence[int], span: tuple[int, int], room: int, count: int) -> int:
    """The start of the window in which the shorter of a passage's two contexts is longest."""

    def shorter_context(start: int) -> int:
        # At either end of the document nothing is missing, so that side does not count.
        before = count if start == 0 else span[0] - start
        after = count if start + room >= count else start + room - span[1]
        return min(before, after)

    return max(starts, key=shorter_context)
