"""From texts to token ids, and the exact answer to "which of them are the text?".

Context (BOS, the instruction) steers the model but is not pooled. Earlier implementations looked
for the border with a separator string or by counting tokens of the text alone, and were wrong
whenever a token spans the border. Here instruction and text are tokenised together and the border
is read from the character offsets. Truncation shortens the text only.

Cost: one tokenisation per text, of what an input can hold. Rows with an instruction or a template
need character offsets, which halves the speed of the tokenizer.
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

    `cut` tokens of the text do not fit and are left out; of a very long text, at least so many.
    """

    ids: list[int]
    start: int
    stop: int
    cut: int = field(default=0, compare=False)


class Located(NamedTuple):
    """The ids of instruction and text, and where the text is among them.

    Attributes:
        ids: without the special ids around.
        first, last: the text's ids are ``ids[first:last]``.
        offsets: the characters of the text that each of those ids stands for, (begin, end).
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
        doc_max_length: most tokens of the text itself; None for whatever `max_length` leaves.
        skip_instruction: pool the text only; if False, everything (BOS and instruction too).
        template: what stands around instruction and text.
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
        """What tokenises, and neither pads nor cuts: a call of the tokenizer leaves both behind."""
        backend: Tokenizer = self.tokenizer.backend_tokenizer
        if backend.padding or backend.truncation:
            backend.no_padding()
            backend.no_truncation()
        return backend

    def check_mode(self, pooling_mode: str) -> None:
        """Refuse a pooling mode that needs a token this tokenizer does not add."""
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
        """Tokenise texts, each behind its prompt.

        Args:
            texts: N texts, taken verbatim.
            prompts: one for all, or one a text; put directly before the text, verbatim.
            max_length: overrides the tokenizer's own limit for this call.

        Returns:
            N rows, in order.

        Raises:
            DataError: a prompt leaves no room for any token of its text.
        """
        limit = max_length or self.max_length
        if isinstance(prompts, str):
            prompts = [prompts] * len(texts)
        start, end = self.template.prefix, self.template.suffix
        contexts = [start + prompt.removeprefix(MARK) for prompt in prompts]
        bare = not any(contexts) and not end
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
        """Where the text begins and ends among the tokens of context, text and suffix."""
        before, ids = len(MARK) + len(context), encoding.ids
        first = reaching(encoding.offsets, before) if context else 0
        last = starting(encoding.offsets, before + length) if self.template.suffix else len(ids)
        return first, max(first, last)

    def locate(self, text: str, prompt: str = "") -> Located:
        """The tokens of a whole text behind its prompt, however long it is."""
        context = self.template.prefix + prompt.removeprefix(MARK)
        joined = MARK + context + text + self.template.suffix
        encoding = self.tokenizer.backend_tokenizer.encode(joined, add_special_tokens=False)
        first, last = self._borders(encoding, context, len(text))
        before, size = len(MARK) + len(context), len(text)
        offsets = [
            (min(max(begin - before, 0), size), min(max(end - before, 0), size))
            for begin, end in encoding.offsets[first:last]
        ]
        return Located(encoding.ids, first, last, offsets)

    def room(self, prompt: str = "", max_length: int | None = None) -> int:
        """The most tokens that a text behind a prompt may have; below 1 if there is no room."""
        found = self.locate("a", prompt)
        around = len(found.ids) - found.last + found.first
        room = (max_length or self.max_length) - around - len(self.prefix) - len(self.suffix)
        return room if self.doc_max_length is None else min(room, self.doc_max_length)

    def _row(self, ids: list[int], first: int, last: int, limit: int) -> TokenRow:
        """Cut the text (`ids[first:last]`) to what fits, and make it a row."""
        fixed = len(self.prefix) + first + len(ids) - last + len(self.suffix)
        room = limit - fixed
        if room < 1 and last > first:
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
        """The row of a text that comes as token ids, behind its prompt.

        The prompt is tokenised alone, so the row is that of the text itself where the prompt ends
        in a newline, or where there is none. Fixed tokens (BOS, EOS) are added; those that the ids
        begin or end with already are not doubled.

        Args:
            ids: of the text, with or without the fixed tokens.
            prompt, max_length: as for `__call__`.

        Raises:
            DataError: the prompt leaves no room for any token of the text.
        """
        text = list(ids)
        if self.prefix and text[: len(self.prefix)] == self.prefix:
            del text[: len(self.prefix)]
        if self.suffix and text[-len(self.suffix) :] == self.suffix:
            del text[-len(self.suffix) :]
        around = self.template.prefix + prompt.removeprefix(MARK), self.template.suffix
        encode = self.backend.encode
        before, after = (encode(a, add_special_tokens=False).ids if a else [] for a in around)
        last = len(before) + len(text)
        whole = [*before, *text, *after]
        return self._row(whole, len(before), last, max_length or self.max_length)

    def around(
        self, text: list[int], context: list[int], ending: list[int], cut: int = 0
    ) -> TokenRow:
        """The row of a text's ids, with context before, ending behind, and the fixed ids around."""
        kept = [*self.prefix, *context, *text, *ending, *self.suffix]
        start = len(self.prefix) + len(context)
        pooled_end = self.template.pool_suffix or bool(self.suffix)
        return self.marked(kept, start, len(kept) if pooled_end else start + len(text), cut)

    def marked(self, kept: list[int], start: int, stop: int, cut: int = 0) -> TokenRow:
        """A row of which ``[start, stop)`` is pooled, or everything if that is empty."""
        if not kept:
            kept = [self.tokenizer.pad_token_id]  # "" without BOS: one token to look at
            stop = 1
        if start >= stop or not self.skip_instruction:
            start, stop = 0, len(kept)  # an empty text has the vector of its context
        return TokenRow(kept, start, stop, cut)

    def for_stock(self) -> tuple[PreTrainedTokenizerFast, bool]:
        """The tokenizer to save, and whether the stock loader can reach the same vectors with it.

        A template's suffix is appended by the saved tokenizer, its prefix is part of every saved
        prompt. The stock loader measures a prompt by tokenising it alone, less one special token
        at its end, so that the suffix has to be one token, and the prefix must not merge.
        """
        if not (self.template.prefix or self.template.suffix):
            return self.tokenizer, True
        encode = self.backend.encode
        ending = encode(self.template.suffix, add_special_tokens=False).ids
        exact = len(ending) + len(self.suffix) <= 1 and self.template.pool_suffix
        prefix = self.template.prefix
        exact &= not prefix or prefix.endswith("\n")
        append_eos = self.tokenizer.eos_token_id in self.suffix
        return prepare_tokenizer(self.tokenizer, append_eos, ending), exact

    @property
    def fixed_tokens(self) -> int:
        """Tokens of an input that are neither instruction nor text."""
        around = self.template.prefix, self.template.suffix
        encode = self.backend.encode
        lengths = [len(encode(part, add_special_tokens=False).ids) for part in around if part]
        return len(self.prefix) + len(self.suffix) + sum(lengths)
