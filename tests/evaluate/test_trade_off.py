"""Parts of one encoder: each scored as it would be served, every text encoded once a depth."""

from __future__ import annotations

import numpy as np
import pytest

from unmasked import LLM2Vec
from unmasked.evaluate import trade_off
from unmasked.evaluate.scorer import make_scorer
from unmasked.evaluate.trade_off import cut_encoders

TEXTS = ["the cat sat", "a dog on the mat", "the cat sat", "quiet"]
PAIR = [["look at:", "the cat"], ["look at:", "the dog"]]


@pytest.fixture
def task(tmp_path):
    lines = ["score\tsentence1\tsentence2"]
    lines += [f"{n}\tthe cat sat\tthe {word} sat" for n, word in enumerate(("cat", "dog", "mat"))]
    (tmp_path / "sts.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "sts.tsv"


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("size", [8, 16, 32])
def test_a_part_encodes_as_stock_truncation_does(tiny_decoder, layers, size):
    parts = cut_encoders(str(tiny_decoder), [1], [8, 16])
    encoder = next(e for cut, e in parts if (cut.layers, cut.dimensions) == (layers, size))
    stock = LLM2Vec.from_pretrained(tiny_decoder, layers=layers, truncate_dim=size)
    for run in ("encode", "encode_query", "encode_document"):
        for scaled in (False, True):
            for texts in (TEXTS, PAIR, [], TEXTS[0]):
                got = getattr(encoder, run)(texts, normalize_embeddings=scaled)
                expected = getattr(stock, run)(texts, normalize_embeddings=scaled)
                assert got.shape == expected.shape
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    tensor = encoder.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True)
    assert tensor.shape == (4, size)
    np.testing.assert_allclose(tensor.norm(dim=1).numpy(), 1, rtol=1e-5)
    assert encoder.fingerprint() == stock.fingerprint() or size == 32
    assert len(encoder.encode(TEXTS, output_value="token_embeddings")) == 4


def test_a_prompt_is_not_another_prompt(tiny_decoder):
    ((_, encoder),) = cut_encoders(str(tiny_decoder))
    stock = LLM2Vec.from_pretrained(tiny_decoder)
    for prompt in (None, "the dog:", "a cat:"):
        got, expected = encoder.encode(TEXTS, prompt=prompt), stock.encode(TEXTS, prompt=prompt)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_texts_are_encoded_once_for_each_number_of_layers(tiny_decoder, task, monkeypatch):
    forwards = []
    stock = trade_off.LLM2Vec.forward

    def counted(self, *args, **options):
        forwards.append(len(self.backbone.auto_model.layers))
        return stock(self, *args, **options)

    monkeypatch.setattr(trade_off.LLM2Vec, "forward", counted)
    score, of_each = make_scorer([task]), {}
    for cut, encoder in cut_encoders(str(tiny_decoder), [1], [4, 8, 16]):
        score(encoder)
        of_each.setdefault(cut.layers, []).append(encoder.tokens_encoded)
    assert {layers: len(tokens) for layers, tokens in of_each.items()} == {2: 4, 1: 4}
    assert all(len(set(tokens)) == 1 and tokens[0] > 0 for tokens in of_each.values())
    assert forwards == [2, 1], "the whole task is one forward"


def test_words_are_cut_and_encoded_once(tiny_decoder):
    words, found = [["the", "cat"], ["dogs", "on", "mat"]], {}
    for cut, encoder in cut_encoders(str(tiny_decoder), [], [8]):
        found[cut.dimensions] = encoder.encode_words(words), encoder.encode_words(words, True)
        assert found[cut.dimensions][0][1].shape == (3, cut.dimensions)
        tokens = encoder.tokens_encoded
    for previous in (False, True):
        expected = LLM2Vec.from_pretrained(tiny_decoder).encode_words(words, previous)
        for whole, short, right in zip(
            found[32][previous], found[8][previous], expected, strict=True
        ):
            np.testing.assert_allclose(whole, right, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(short, whole[:, :8])
    counted = LLM2Vec.from_pretrained(tiny_decoder)
    counted.encode_words(words)
    assert tokens == 2 * counted.tokens_encoded


def test_a_folder_of_shorter_vectors_stays_as_short_as_it_says(tiny_decoder, tmp_path):
    short = LLM2Vec.from_pretrained(tiny_decoder, truncate_dim=16)
    short.save(tmp_path / "short")
    found = [
        (cut.dimensions, encoder.encode(TEXTS).shape[1])
        for cut, encoder in cut_encoders(str(tmp_path / "short"), [], [8])
    ]
    assert found == [(16, 16), (8, 8)]
