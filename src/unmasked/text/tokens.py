"""Turns texts into token ids, and finds exactly which of them are the text.

Context (BOS, the instruction) steers the model but is not pooled. Earlier implementations found the
border by a separator string or by counting the tokens of the text alone, and were wrong whenever a
token spans the border. Here instruction and text are tokenised together and the border is read from
the character offsets. Truncation shortens the text only.

Cost: one tokenisation per text, of as much as an input can hold. Rows with an instruction or a
template need character offsets, which halves the speed of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from unmasked.errors import DataError, ModelError
from unmasked.text.beginnings import encode_beginnings, reaching, starting
from unmasked.text.special_tokens import MARK, prepare_tokenizer, surrounding_ids
from unmasked.text.templates import PLAIN, Template


@dataclass(frozen=True, slots=True)
class TokenRow:
    """The ids of one input; those in ``[start, stop)`` are pooled.

    `cut` is the number of tokens of the text that do not fit and are left out; for a very long text
    it is a lower bound.
    """

    ids: list[int]
    start: int
    stop: int
    cut: int = field(default=0, compare=False)


class Located(NamedTuple):
    """The ids of instruction and text, and which of them are the text.

    Attributes:
        ids: without the special ids around them.
        first, last: the text's ids are ``ids[first:last]``.
        offsets: (begin, end) characters of the text for each of its ids.
    """

    ids: list[int]
    first: int
    last: int
    offsets: list[tuple[int, int]]


class TextTokenizer:
    """Turns (prompt, text) into ids and the span of the text.

    Args:
        tokenizer: as made by `prepare_tokenizer`.
        max_length: most tokens of an input, context included.
        doc_max_length: most tokens of the text itself; None for no limit besides `max_length`.
        skip_instruction: pool the text only; if False, everything (BOS and instruction too).
        template: the strings around instruction and text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_length: int = 512,
        doc_max_length: int | None = None,
        skip_instruction: bool = True,
        template: Template = PLAIN,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.doc_max_length = doc_max_length
        self.skip_instruction = skip_instruction
        self.template = template
        self.prefix, self.suffix = surrounding_ids(tokenizer)

    @property
    def backend(self) -> Tokenizer:
        """The backend without padding and truncation, which a call of the tokenizer turns on."""
        backend: Tokenizer = self.tokenizer.backend_tokenizer
        if backend.padding or backend.truncation:
            backend.no_padding()
            backend.no_truncation()
        return backend

    def check_mode(self, pooling_mode: str) -> None:
        """Refuse a pooling mode that needs a token that this tokenizer does not add."""
        if pooling_mode == "bos_token" and not self.prefix:
            raise ModelError(
                "pooling 'bos_token' needs a tokenizer that puts BOS before every text; this one "
                "does not. Fix: use pooling 'mean' or 'last_token'."
            )

    def join(self, instruction: str) -> str:
        """The prompt of an instruction."""
        return self.template.join(instruction)

    def __call__(
        self, texts: Sequence[str], prompts: str | Sequence[str] = "", max_length: int | None = None
    ) -> list[TokenRow]:
        """Tokenise texts, each after its prompt.

        Args:
            texts: N texts, taken verbatim.
            prompts: one for all, or one per text; put directly before the text, verbatim.
            max_length: overrides the limit for this call.

        Returns:
            N rows, in order.

        Raises:
            DataError: a prompt leaves no room for any token of its text, or does not fit itself.
        """
        limit = max_length or self.max_length
        if isinstance(prompts, str):
            prompts = [prompts] * len(texts)
        start, end = self.template.prefix, self.template.suffix
        contexts = [start + prompt.removeprefix(MARK) for prompt in prompts]
        bare = not any(contexts) and not end
        # The normalizer removes one leading MARK: with ours there, one in a text is kept.
        encodings = encode_beginnings(
            self.backend,
            texts,
            [MARK + context for context in contexts],
            end,
            limit,
            offsets=not bare,
        )
        rows = []
        for (encoding, length), context in zip(encodings, contexts, strict=True):
            found = (0, len(encoding.ids)) if bare else self._borders(encoding, context, length)
            rows.append(self._row(encoding.ids, *found, limit))
        return rows

    def _borders(self, encoding: Encoding, context: str, length: int) -> tuple[int, int]:
        """(first, last): the text's ids are ``ids[first:last]`` of context, text and suffix.

        A token that spans the border between context and text counts as text.
        """
        before, ids = len(MARK) + len(context), encoding.ids
        first = reaching(encoding.offsets, before) if context else 0
        last = starting(encoding.offsets, before + length) if self.template.suffix else len(ids)
        return first, max(first, last)

    def locate(self, text: str, prompt: str = "") -> Located:
        """The tokens of a whole text after its prompt, without any limit."""
        context = self.template.prefix + prompt.removeprefix(MARK)
        joined = MARK + context + text + self.template.suffix
        encoding = self.backend.encode(joined, add_special_tokens=False)
        first, last = self._borders(encoding, context, len(text))
        before, size = len(MARK) + len(context), len(text)
        offsets = [
            (min(max(begin - before, 0), size), min(max(end - before, 0), size))
            for begin, end in encoding.offsets[first:last]
        ]
        return Located(encoding.ids, first, last, offsets)

    def room(self, prompt: str = "", max_length: int | None = None) -> int:
        """The most tokens that a text after a prompt may have; below 1 if there is no room."""
        found = self.locate("a", prompt)
        context = len(found.ids) - (found.last - found.first)
        room = (max_length or self.max_length) - context - len(self.prefix) - len(self.suffix)
        return room if self.doc_max_length is None else min(room, self.doc_max_length)

    def _row(self, ids: list[int], first: int, last: int, limit: int) -> TokenRow:
        """Truncate the text, ``ids[first:last]``, to the tokens that fit, and make a row of it."""
        fixed = len(self.prefix) + first + len(ids) - last + len(self.suffix)
        room = limit - fixed
        if room < (1 if last > first else 0):  # an empty text needs no room
            raise DataError(
                f"the instruction takes {fixed} of the {limit} tokens of max_length, which leaves "
                "no room for the text. Fix: a shorter instruction, or a larger max_length."
            )
        if self.doc_max_length is not None:
            room = min(room, self.doc_max_length)
        kept = ids[first:last][: max(room, 0)]
        return self.around(kept, ids[:first], ids[last:], last - first - len(kept))

    def of_ids(
        self, ids: Sequence[int], prompt: str = "", max_length: int | None = None
    ) -> TokenRow:
        """The row of a text that is given as token ids, after its prompt.

        The prompt is tokenised alone, so the row equals that of the text itself only if there is no
        prompt or the prompt ends in a newline. Fixed tokens (BOS, EOS) are added, unless the ids
        already begin or end with them.

        Args:
            ids: the ids of the text, with or without the fixed tokens.
            prompt, max_length: as in `__call__`.

        Raises:
            DataError: the prompt leaves no room for any token of the text.
        """
        text = list(ids)
        if self.prefix and text[: len(self.prefix)] == self.prefix:
            del text[: len(self.prefix)]
        if self.suffix and text[-len(self.suffix) :] == self.suffix:
            del text[-len(self.suffix) :]
        before = self._ids(self.template.prefix + prompt.removeprefix(MARK))
        whole = [*before, *text, *self._ids(self.template.suffix)]
        last = len(before) + len(text)
        return self._row(whole, len(before), last, max_length or self.max_length)

    def _ids(self, part: str) -> list[int]:
        """The ids of a string without special tokens."""
        return list(self.backend.encode(part, add_special_tokens=False).ids) if part else []

    def around(
        self, text: list[int], context: list[int], ending: list[int], cut: int = 0
    ) -> TokenRow:
        """The row of a text's ids, with its context before, its ending after, and the fixed ids."""
        ids = [*self.prefix, *context, *text, *ending, *self.suffix]
        start = len(self.prefix) + len(context)
        pools_end = self.template.pool_suffix or bool(self.suffix)
        return self.marked(ids, start, len(ids) if pools_end else start + len(text), cut)

    def marked(self, kept: list[int], start: int, stop: int, cut: int = 0) -> TokenRow:
        """A row of which ``[start, stop)`` is pooled, or everything if that is empty."""
        if not kept:
            kept = [self.tokenizer.pad_token_id]  # "" without BOS still needs one token to pool
            stop = 1
        if start >= stop or not self.skip_instruction:
            start, stop = 0, len(kept)  # an empty text gets the vector of its context
        return TokenRow(kept, start, stop, cut)

    def for_stock(self) -> tuple[PreTrainedTokenizerFast, bool]:
        """The tokenizer to save, and whether the stock loader can reach the same vectors with it.

        The saved tokenizer appends a template's suffix; the prefix is part of every saved prompt.
        The stock loader finds the length of a prompt by tokenising it alone, without one special
        token at its end, so the suffix must be one token and the prefix must not merge with a text.
        That token must be an added token already: to name an ordinary one as special would split
        every text that contains it, here as well after loading. Without the name, that loader takes
        the suffix for a part of the prompt.
        """
        prefix, suffix = self.template.prefix, self.template.suffix
        if not (prefix or suffix):
            return self.tokenizer, True
        ending = self._ids(suffix)
        exact = len(ending) + len(self.suffix) <= 1 and self.template.pool_suffix
        exact &= not prefix or prefix.endswith("\n")
        exact &= not ending or ending[-1] in self.tokenizer.added_tokens_decoder
        append_eos = self.tokenizer.eos_token_id in self.suffix
        return prepare_tokenizer(self.tokenizer, append_eos, ending), exact

    @property
    def fixed_tokens(self) -> int:
        """Number of tokens of an input that are neither instruction nor text."""
        parts = self.prefix, self.suffix, self._ids(self.template.prefix)
        return sum(map(len, (*parts, self._ids(self.template.suffix))))
