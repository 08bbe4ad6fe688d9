"""A vector for every word of a sentence: the states of its sub-words, averaged.

The paper's word-level tasks (arXiv 2404.05961, section 4 and appendix D): a word is the mean of the
states of its sub-words, or, since masked next token prediction trains the state at i-1 to know
token i, of the states one position before each of them. The words are joined by single spaces and
go through the same tokenisation as every text, so nothing here can differ from what was trained.

Cost: `encode`, without pooling; 4 bytes x width x tokens for `CHUNK` sentences at a time.

Shapes: T tokens of a sentence, W words, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from unmasked.errors import DataError, ModelError
from unmasked.text.tokens import MARK, TextTokenizer

CHUNK = 512  # sentences whose token states are held at a time


class TokenEncoder(Protocol):
    """What is asked of a model: states of tokens, and its tokenizer."""

    def encode(self, inputs: Any, **options: Any) -> Any:
        """As `SentenceTransformer.encode`."""


def word_vectors(
    model: TokenEncoder,
    tokens: TextTokenizer,
    sentences: Sequence[Sequence[str]],
    previous: bool = False,
) -> list[np.ndarray]:
    """Vectors of the words of sentences.

    Args:
        model: gives token states under ``output_value="token_embeddings"``.
        tokens: the tokenizer of that model.
        sentences: each a sequence of words, at least one.
        previous: take the states one position earlier. The first token of a tokenizer without BOS
            has none before it and keeps its own, so no word is ever lost.

    Returns:
        For each sentence (W, D) float32.

    Raises:
        DataError: a sentence has no words, or is longer than the model reads.
        ModelError: the model has a chat template, which would stand around every sentence.
    """
    if tokens.template.prefix or tokens.template.suffix:
        raise ModelError("words have no chat template. Fix: load with template='none'.")
    found: list[np.ndarray] = []
    for start in range(0, len(sentences), CHUNK):
        part = sentences[start : start + CHUNK]
        spans = list(_word_tokens(tokens, part, start))
        texts = [" ".join(words) for words in part]
        states = model.encode(texts, output_value="token_embeddings", show_progress_bar=False)
        for of_sentence, (positions, starts) in zip(states, spans, strict=True):
            known = of_sentence.float().cpu().numpy()  # (T, D)
            chosen = known[np.maximum(positions - previous, 0)]
            sums = np.add.reduceat(chosen, starts, axis=0)
            counts = np.diff(np.append(starts, len(positions)))
            found.append((sums / counts[:, None]).astype(np.float32))
    return found


def _word_tokens(
    tokens: TextTokenizer, sentences: Sequence[Sequence[str]], first: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of each sentence's sub-words, word by word, and where each word's begin."""
    texts = [" ".join(words) for words in sentences]
    backend = tokens.tokenizer.backend_tokenizer
    encodings = backend.encode_batch([MARK + text for text in texts], add_special_tokens=False)
    for index, (row, encoding) in enumerate(zip(tokens(texts), encodings, strict=True), first):
        words = sentences[index - first]
        if not words or not all(words):
            raise DataError(f"sentence {index}: empty, or with an empty word. Fix: leave it out.")
        kept = len(row.ids) - len(tokens.prefix) - len(tokens.suffix)
        if kept < len(encoding.ids):
            raise DataError(
                f"sentence {index} has {len(encoding.ids)} tokens and the model reads {kept}: "
                f"'{texts[index - first][:60]}'. Fix: split it, or load with a larger max_length."
            )
        yield _align(words, encoding.offsets, len(tokens.prefix))


def _align(
    words: Sequence[str], offsets: Sequence[tuple[int, int]], shift: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that overlap each word or the space before it; every word has at least one."""
    positions: list[int] = []
    starts: list[int] = []
    begin, low = len(MARK) - 1, 0
    for word in words:
        end = begin + 1 + len(word)
        starts.append(len(positions))
        while low < len(offsets) and offsets[low][1] <= begin:
            low += 1
        high = low
        while high < len(offsets) and offsets[high][0] < end:
            high += 1
        own = range(low, high) if high > low else [max(low - 1, 0)]  # a word without any token
        positions += [shift + token for token in own]
        begin = end
    return np.array(positions), np.array(starts)
