"""A vector for every word of a sentence: the mean of the states of its sub-words.

The word-level tasks of the paper (arXiv 2404.05961, section 4 and appendix D) take the states of a
word's sub-words or, since masked next token prediction trains the state at i - 1 to know token i,
the states one position before each of them. The words are joined by single spaces and tokenised as
every other text, so nothing here can differ from what was trained.

Costs `encode` without pooling, and 4 bytes x width x tokens for `CHUNK` sentences at a time.

Shapes: T tokens of a sentence, W words, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from unmasked.errors import DataError, ModelError
from unmasked.text.special_tokens import MARK
from unmasked.text.tokens import TextTokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CHUNK = 512
"""Sentences whose token states are held at a time."""


def word_vectors(
    model: SentenceTransformer,
    tokens: TextTokenizer,
    sentences: Sequence[Sequence[str]],
    previous: bool = False,
) -> list[np.ndarray]:
    """Vectors of the words of sentences.

    Args:
        model: gives token states (T, D) under ``output_value="token_embeddings"``.
        tokens: the tokenizer of that model.
        sentences: each a sequence of words, at least one.
        previous: take the states one position earlier. The first token of a tokenizer without BOS
            has none before it and keeps its own, so no word is ever lost.

    Returns:
        One float32 array (W, D) per sentence.

    Raises:
        DataError: a sentence has no words, or is longer than the model reads.
        ModelError: the model has a chat template, which would stand around every sentence.
    """
    if tokens.template.prefix or tokens.template.suffix:
        raise ModelError(
            "words are encoded without a chat template, and this model has one. "
            "Fix: load it with template='none'."
        )
    found: list[np.ndarray] = []
    for start in range(0, len(sentences), CHUNK):
        part = sentences[start : start + CHUNK]
        spans = list(_word_tokens(tokens, part, start))
        texts = [" ".join(words) for words in part]
        states = model.encode(texts, output_value="token_embeddings", show_progress_bar=False)
        for of_sentence, (positions, firsts) in zip(states, spans, strict=True):
            known = of_sentence.float().cpu().numpy()  # (T, D)
            chosen = known[np.maximum(positions - previous, 0)]
            sums = np.add.reduceat(chosen, firsts, axis=0)  # (W, D)
            counts = np.diff(np.append(firsts, len(positions)))
            found.append((sums / counts[:, None]).astype(np.float32))
    return found


def _word_tokens(
    tokens: TextTokenizer, sentences: Sequence[Sequence[str]], first: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of each sentence's sub-words, word by word, and where those of each word begin."""
    texts = [" ".join(words) for words in sentences]
    backend = tokens.backend
    encodings = backend.encode_batch([MARK + text for text in texts], add_special_tokens=False)
    rows = zip(sentences, texts, tokens(texts), encodings, strict=True)
    for index, (words, text, row, encoding) in enumerate(rows, first):
        if not words or not all(words):
            raise DataError(f"sentence {index} is empty or has an empty word. Fix: leave it out.")
        kept = len(row.ids) - len(tokens.prefix) - len(tokens.suffix)
        if kept < len(encoding.ids):
            raise DataError(
                f"sentence {index} has {len(encoding.ids)} tokens and the model reads {kept}: "
                f"'{text[:60]}'. Fix: split it, or load with a larger max_length."
            )
        yield _align(words, encoding.offsets, len(tokens.prefix))


def _align(
    words: Sequence[str], offsets: Sequence[tuple[int, int]], shift: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that overlap each word or the space before it; every word has at least one."""
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T  # of the tokens, in order
    lengths = np.array([1 + len(word) for word in words])  # with the space
    stops = len(MARK) - 1 + lengths.cumsum()
    low = np.searchsorted(ends, stops - lengths, side="right")
    high = np.searchsorted(starts, stops, side="left")
    positions: list[int] = []
    firsts: list[int] = []
    for begin, stop in zip(low, high, strict=True):
        firsts.append(len(positions))
        positions += range(begin, stop) if stop > begin else [max(begin - 1, 0)]  # no own token
    return shift + np.array(positions), np.array(firsts)
