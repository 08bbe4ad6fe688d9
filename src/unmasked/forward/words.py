"""A vector for every word of a sentence: the mean of the states of its sub-words.

The word-level tasks of the paper (arXiv 2404.05961, section 4 and appendix D) take the states of a
word's sub-words, or the states one position before each of them, because masked next token
prediction trains the state at i - 1 to know token i. The words are joined by single spaces and
tokenised as every other text, as in training. No prompt is put before them, not even the model's
default prompt: words have no instruction, and the probe is trained and tested on the same states.

Cost: that of `encode` without pooling, and 4 bytes x width x tokens for `CHUNK` sentences at a
time.

Shapes: T tokens of a sentence, W words, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from unmasked.errors import DataError, ModelError
from unmasked.text.special_tokens import MARK
from unmasked.text.tokens import TextTokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CHUNK = 512
"""Number of sentences whose token states are in memory at a time."""


def word_vectors(
    model: SentenceTransformer,
    tokens: TextTokenizer,
    sentences: Sequence[Sequence[str]],
    previous: bool = False,
) -> list[np.ndarray]:
    """Vectors of the words of sentences.

    Args:
        model: returns token states (T, D) for ``output_value="token_embeddings"``.
        tokens: the tokenizer of that model.
        sentences: each a sequence of words, at least one; a string is not split.
        previous: take the states one position earlier. Without BOS, the first token has no earlier
            position and keeps its own state.

    Returns:
        One float32 array (W, D) per sentence.

    Raises:
        DataError: a sentence is a string or has no words, a word is not a string or is empty, or a
            sentence is longer than the model reads.
        ModelError: the model has a chat template, which would be put around every sentence.
    """
    if tokens.template.prefix or tokens.template.suffix:
        raise ModelError(
            "words are encoded without a chat template, and this model has one. "
            "Fix: load it with template='none'."
        )
    _check_words(sentences)
    vectors: list[np.ndarray] = []
    for start in range(0, len(sentences), CHUNK):
        part = sentences[start : start + CHUNK]
        spans = list(_word_tokens(tokens, part, start))
        texts = [" ".join(words) for words in part]
        states = model.encode(  # the empty prompt keeps the model's default prompt away
            texts, prompt="", output_value="token_embeddings", show_progress_bar=False
        )
        for sentence_states, (positions, firsts) in zip(states, spans, strict=True):
            of_tokens = sentence_states.float().cpu().numpy()  # (T, D)
            chosen = of_tokens[np.maximum(positions - previous, 0)]  # (sub-words, D)
            sums = np.add.reduceat(chosen, firsts, axis=0)  # (W, D)
            counts = np.diff(np.append(firsts, len(positions)))  # sub-words per word
            vectors.append((sums / counts[:, None]).astype(np.float32))
    return vectors


def _check_words(sentences: Sequence[Sequence[Any]]) -> None:
    """Refuse what is not a list of lists of words.

    Raises:
        DataError: names the index of the faulty sentence.
    """
    if isinstance(sentences, str):
        raise DataError("sentences are one string. Fix: encode_words([text.split()]).")
    for index, words in enumerate(sentences):
        if isinstance(words, str):
            raise DataError(
                f"sentence {index} is a string ('{words[:60]}'), expected a list of words. "
                "Fix: encode_words([text.split() for text in texts])."
            )
        for word in words:
            if not isinstance(word, str):
                kind = type(word).__name__
                raise DataError(
                    f"sentence {index} has a word that is not a string: {word!r} ({kind}). "
                    "Fix: encode_words([[str(word) for word in words] for words in sentences])."
                )
        if not len(words) or not all(words):
            raise DataError(f"sentence {index} is empty or has an empty word. Fix: leave it out.")


def _word_tokens(
    tokens: TextTokenizer, sentences: Sequence[Sequence[str]], first: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per sentence: the positions of its sub-words, word by word, and where each word begins."""
    texts = [" ".join(words) for words in sentences]
    backend = tokens.backend
    encodings = backend.encode_batch([MARK + text for text in texts], add_special_tokens=False)
    rows = zip(sentences, texts, tokens(texts), encodings, strict=True)
    for index, (words, text, row, encoding) in enumerate(rows, first):
        kept = len(row.ids) - len(tokens.prefix) - len(tokens.suffix)
        if kept < len(encoding.ids):
            raise DataError(
                f"sentence {index} has {len(encoding.ids)} tokens and the model reads only {kept}: "
                f"'{text[:60]}'. Fix: split it, or load with a larger max_length."
            )
        yield _align(words, encoding.offsets, len(tokens.prefix))


def _align(
    words: Sequence[str], offsets: Sequence[tuple[int, int]], shift: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that overlap each word or the space before it; every word has at least one."""
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T  # characters of each token
    lengths = np.array([1 + len(word) for word in words])  # with the space before the word
    word_ends = len(MARK) - 1 + lengths.cumsum()  # MARK is where the first word's space would be
    first_tokens = np.searchsorted(ends, word_ends - lengths, side="right")
    stop_tokens = np.searchsorted(starts, word_ends, side="left")
    positions: list[int] = []
    firsts: list[int] = []
    for first, stop in zip(first_tokens, stop_tokens, strict=True):
        firsts.append(len(positions))
        # A word without a token of its own shares the one before.
        positions += range(first, stop) if stop > first else [max(first - 1, 0)]
    return shift + np.array(positions), np.array(firsts)
