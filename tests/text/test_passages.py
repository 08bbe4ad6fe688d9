"""Where a text is divided: along sentences, within the limit, with nothing left out."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from unmasked.errors import DataError
from unmasked.text.passages import Chunks, divide, windows_of
from unmasked.text.special_tokens import prepare_tokenizer
from unmasked.text.templates import Template
from unmasked.text.tokens import TextTokenizer


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokens(request, tiny_tokenizer, sentencepiece_tokenizer):
    chosen = tiny_tokenizer if request.param == "byte_level" else sentencepiece_tokenizer
    return TextTokenizer(prepare_tokenizer(chosen), 128)


@pytest.fixture
def document(sentences):
    draw = random.Random(0)
    parts = draw.choices([*sentences, "\n\n", "x" * 300, "👩‍👩‍👧가나다", "- a line\n"], k=120)
    return "  " + " ".join(parts) + " \n"


def count(tokens, text: str) -> int:
    return len(tokens.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("chunk, overlap", [(16, 0), (32, 8), (64, 63), (128, 0), (12, 11)])
def test_every_character_is_in_a_passage_that_fits(tokens, document, chunk, overlap):
    spans = divide(tokens, document, Chunks(chunk, overlap))
    seen = {i for begin, end in spans for i in range(begin, end)}
    assert all(document[i].isspace() for i in range(len(document)) if i not in seen)
    assert max(count(tokens, document[begin:end]) for begin, end in spans) <= chunk
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(spans))
    shared = [document[b[0] : a[1]] for a, b in pairwise(spans) if b[0] < a[1]]
    assert bool(shared) == bool(overlap)
    # In its text a passage begins without the space that some tokenizers put before a text alone.
    assert all(count(tokens, text) <= overlap + 2 for text in shared)


def test_passages_end_with_sentences_where_they_can(tokens):
    text = (
        'One is here. Two is e.g. there! Three (is it?) "was." Four\n\nA heading\n\nFive, Dr. no.'
    )
    ends = {text[:end].rsplit(" ", 1)[-1] for _, end in divide(tokens, text, Chunks(16))}
    assert not ends & {"e.g.", "Two", "is"}
    unbroken = "word " * 100
    assert {unbroken[end - 4 : end] for _, end in divide(tokens, unbroken, Chunks(16))} == {"word"}


def test_a_text_that_fits_is_one_passage_as_it_stands(tokens):
    for text in ("", " ", "  a short one \n", "Two. Sentences."):
        assert divide(tokens, text, Chunks(64, 8)) == [(0, len(text))]


def test_a_call_of_the_tokenizer_itself_does_not_cut_the_document(tokens, document):
    """transformers leaves truncation switched on in the backend."""
    spans = divide(tokens, document, Chunks(16, 4))
    windows = list(windows_of(tokens, document, spans, "", 60))
    tokens.tokenizer(["a"], truncation=True, max_length=8)
    assert divide(tokens, document, Chunks(16, 4)) == spans
    tokens.tokenizer(["a"], truncation=True, max_length=8)
    assert list(windows_of(tokens, document, spans, "", 60)) == windows


def test_windows_hold_every_passage_whole(tokens, document):
    spans = divide(tokens, document, Chunks(24, 4))
    backend = tokens.tokenizer.backend_tokenizer
    for limit in (60, 128, 1 << 20):
        found = list(windows_of(tokens, document, spans, "Ask:\n", limit))
        assert (len(found) == 1) == (limit == 1 << 20)
        assert sorted(i for window in found for i in window.passages) == list(range(len(spans)))
        for window in found:
            assert len(window.row.ids) <= limit
            head = tokens([""], "Ask:\n")[0].ids
            assert window.row.ids[: len(head)] == head  # the prompt steers every window
            for index, (start, stop) in zip(window.passages, window.spans, strict=True):
                own = window.row.ids[start:stop]
                text = backend.decode(own, skip_special_tokens=False).replace("▁", " ")
                begin, end = spans[index]
                assert "".join(document[begin:end].split()) in "".join(text.split())


def test_a_passage_is_pooled_where_it_has_the_most_around_it(tokens, sentences):
    text = " ".join(sentences * 6)
    spans = divide(tokens, text, Chunks(16))
    windows = list(windows_of(tokens, text, spans, "", 100))
    for window in windows[1:-1]:
        for start, stop in window.spans:
            assert min(start, len(window.row.ids) - stop) > 4
    assert windows[0].spans[0][0] == windows[0].row.start
    assert windows[-1].spans[-1][1] == windows[-1].row.stop


def test_sizes_that_cannot_be_are_refused(tokens):
    for overlap in (64, 65, -1):
        with pytest.raises(DataError, match=f"an overlap of {overlap} tokens.*Fix: --chunk 256"):
            Chunks(64, overlap).check(tokens)
    Chunks(100).check(tokens)
    with pytest.raises(DataError, match=r"200 tokens is longer than .* of 128 tokens.*--chunk 12"):
        Chunks(200).check(tokens)
    with pytest.raises(DataError, match="longer than"):
        Chunks(100).check(tokens, "a long instruction " * 10)
    Chunks(200, late=True).check(tokens, positions=256)
    with pytest.raises(DataError, match="input of 256 tokens"):
        Chunks(256, late=True).check(tokens, positions=256)


def test_late_is_refused_where_a_passage_has_no_place(tokens):
    made = tokens.tokenizer
    for other in (
        TextTokenizer(made, 128, template=Template("[INST] ", " [/INST]")),
        TextTokenizer(made, 128, skip_instruction=False),
    ):
        Chunks(32).check(other)
        with pytest.raises(DataError, match="inside a document cannot have. Fix: leave out --late"):
            Chunks(32, late=True).check(other, positions=128)
    Chunks(32, late=True).check(TextTokenizer(made, 128, template=Template("Text: ")))
