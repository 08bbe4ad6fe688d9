"""The original package's rules for finding and cutting a text, which count tokens.

The original tokenises the text alone, and takes that many tokens from the end of the whole input as
the text. If a token spans the border between instruction and text, it pools one token too few or
too many; and a long instruction pushes the text out of the input. Published vectors were computed
like this, and ``compat="llm2vec-0.2"`` does the same. Cost: each text is tokenised twice and in
full length, because the original cuts by words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, where

from unmasked.forward.pooling import TextPooling, pool
from unmasked.text.special_tokens import MARK
from unmasked.text.tokens import TextTokenizer, TokenRow


class CountingTokenizer(TextTokenizer):
    """A `TextTokenizer` that finds the text by counting its tokens from the end of the input."""

    def join(self, instruction: str) -> str:
        return instruction.strip() + " " if instruction else ""

    def __call__(
        self, texts: Sequence[str], prompts: str | Sequence[str] = "", max_length: int | None = None
    ) -> list[TokenRow]:
        limit = max_length or self.max_length
        prompts = [prompts] * len(texts) if isinstance(prompts, str) else prompts
        whole_texts, texts = texts, [self._cut_by_words(text, limit) for text in texts]
        start, end = self.template.prefix, self.template.suffix
        joined = [
            MARK + start + prompt.removeprefix(MARK) + text + end
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        encode = self.backend.encode_batch_fast
        inputs = encode(joined, add_special_tokens=False)
        alone = encode([text + end for text in texts], add_special_tokens=False)
        rows = [
            self._counted_row(whole.ids, len(text.ids), limit)
            for whole, text in zip(inputs, alone, strict=True)
        ]
        shorter = (len(t) < len(w.rstrip()) for t, w in zip(texts, whole_texts, strict=True))
        # The number of tokens of the words that were cut off is not known; it is at least one.
        return [
            replace(row, cut=row.cut + 1) if less else row
            for row, less in zip(rows, shorter, strict=True)
        ]

    def _counted_row(self, ids: list[int], count: int, limit: int) -> TokenRow:
        """A row cut at the right, of which the last `count` tokens (and the suffix) are pooled."""
        fitting = [*self.prefix, *ids][: limit - len(self.suffix)]
        cut = len(self.prefix) + len(ids) - len(fitting)
        kept = fitting + self.suffix
        count = min(min(count, limit) + len(self.suffix), len(kept))
        return self.marked(kept, len(kept) - count, len(kept), cut)

    def _cut_by_words(self, text: str, limit: int) -> str:
        """Cut a text to `doc_max_length` as the original does: by words, with single spaces.

        The original leaves nothing of a text without spaces; such a text is cut by tokens here.
        """
        backend = self.backend

        def count(part: str) -> int:
            return min(len(backend.encode(part, add_special_tokens=False).ids), limit)

        most = self.doc_max_length
        while most is not None and (length := count(text)) > most:
            words = text.split()
            kept = int(len(words) * most / length)
            if kept == 0:
                end = backend.encode(text, add_special_tokens=False).offsets[most - 1][1]
                text = text[:end]
                break
            text = " ".join(words[:kept])
        return text.rstrip() if self.template.suffix else text


class CountingPooling(TextPooling):
    """A `TextPooling` whose ``weighted_mean`` counts from the first token that is pooled."""

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        rows, is_text = features["packed_rows"], features["packed_is_text"]
        batch = len(features["input_ids"])
        moved = positions_in_text(rows, features["packed_positions"], is_text, batch)
        return super().forward({**features, "packed_positions": moved}, **options)


def positions_in_text(rows: Tensor, positions: Tensor, is_text: Tensor, batch: int) -> Tensor:
    """Positions (N,) counted from the first token of each row that is pooled.

    Takes the row of each token (N,), its position in the row, whether it is pooled, and the number
    of rows.
    """
    if not len(positions):
        return positions
    last = positions.amax()
    candidates = where(is_text, positions, last)  # other tokens must not become the minimum
    first = candidates.new_full((batch,), int(last))
    first = first.scatter_reduce(0, rows, candidates, "amin")  # (B,)
    return positions - first[rows]


def pool_padded(
    features: Mapping[str, Tensor], padded: Tensor, mode: str, pools_all: bool, counted: bool
) -> Tensor:
    """(B, D) vectors of (B, T, D) states with padding on either side, as by `get_pooling`.

    Args:
        features: ``attention_mask`` and optionally the tokens to pool, ``text_mask`` or
            ``embed_mask``: (B, T) each.
        padded, mode: the states, and how they become a vector.
        pools_all: pool the tokens of the instruction, too.
        counted: count positions as `CountingPooling`.
    """
    attention = features["attention_mask"]
    chosen = features.get("text_mask", features.get("embed_mask", attention))
    rows, columns = attention.nonzero(as_tuple=True)  # (N,), (N,): the real tokens
    positions = columns - attention.argmax(dim=1)[rows]  # from the first real token of the row
    is_text = (attention if pools_all else chosen)[rows, columns].bool()
    if counted:
        positions = positions_in_text(rows, positions, is_text, len(attention))
    return pool(padded[rows, columns], rows, positions, is_text, len(attention), mode)
