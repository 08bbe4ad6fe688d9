"""What `encode` takes and refuses, and every kind of thing it gives."""

from __future__ import annotations

import codecs
import copy
import io
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset
from sentence_transformers.sentence_transformer.modules import Dense

from unmasked import LLM2Vec
from unmasked.errors import DataError, ModelError
from unmasked.forward.loop.running import encode_windows


@pytest.fixture(scope="module")
def model(tiny_decoder):
    return LLM2Vec.from_pretrained(tiny_decoder)


def test_every_output_of_each_input(model):
    one, two = model.encode(["a b", "one longer text"], output_value=None)
    assert sorted(one) == [
        "attention_mask", "input_ids", "prompt_length", "sentence_embedding", "text_mask",
        "token_embeddings",
    ]  # fmt: skip
    for prompt in (None, "Find it:\n"):
        for row in model.encode(["a b", "one longer text"], prompt=prompt, output_value=None):
            assert row["prompt_length"] == int(row["text_mask"].argmax()) > 0
            text = row["token_embeddings"][row["prompt_length"] : int(row["attention_mask"].sum())]
            np.testing.assert_allclose(text.mean(0), row["sentence_embedding"], atol=1e-5)
    np.testing.assert_allclose(
        two["sentence_embedding"], model.encode("one longer text"), atol=1e-5
    )
    assert one["token_embeddings"].shape == two["token_embeddings"].shape
    with pytest.raises(DataError, match=r"unknown output_value 'token_embedings', did you mean"):
        model.encode(["a"], output_value="token_embedings")


@pytest.mark.parametrize("inputs", [None, 5, b"bytes", np.array("no axis")])
def test_what_is_no_list_of_texts_is_refused(model, inputs):
    with pytest.raises(DataError, match=r"inputs are .*Fix: encode\(\['a text'\]\)"):
        model.encode(inputs)


@pytest.mark.parametrize("make", [pd.DataFrame, dict, pa.table, Dataset.from_dict])
def test_a_table_of_columns_is_no_list_of_texts(model, make):
    told = r"columns \(url, text\).*Fix: encode\(list\(data\['text'\]\)\)"
    with pytest.raises(DataError, match=told):
        model.encode(make({"url": ["u", "v"], "text": ["a", "b"]}))


def test_texts_by_their_id_are_encoded_as_the_fix_says(model):
    """The fix was list(data['id']), which is the letters of a text."""
    with pytest.raises(DataError, match=r"Fix: encode\(list\(data\.values\(\)\)\)"):
        model.encode({"id": "one text", "other": "two"})


@pytest.mark.parametrize(
    ("item", "fix"),
    [
        (None, "leave out inputs without a text, or give ''"),
        (float("nan"), "leave out inputs without a text, or give ''"),
        (pd.NA, "leave out inputs without a text, or give ''"),
        (b"text", r"\[item\.decode\('utf-8'\) for item in inputs\]"),
        ({"id": 1, "text": "a"}, r"\[item\['text'\] for item in inputs\]"),
        (pa.scalar("a"), r"\[str\(item\) for item in inputs\]"),
        (["ask", "text"], r"give texts without an instruction as \['', text\]"),
    ],
)
def test_the_fix_for_an_input_that_is_no_text_fits_its_kind(model, item, fix):
    with pytest.raises(DataError, match=f"input 1 is .* Fix: {fix}"):
        model.encode(["a text", item])


def test_no_texts_give_vectors_of_the_width_that_texts_have(tiny_decoder):
    """Behind a Dense, or cut by the encoder's own truncate_dim, they had the decoder's width."""
    for width, own in ((4, None), (32, 6), (4, 6)):
        model = LLM2Vec.from_pretrained(tiny_decoder, truncate_dim=own)
        if width != 32:
            model.append(Dense(32, width))
        for options in ({}, {"truncate_dim": 5}, {"precision": "ubinary"}, {"truncate_dim": 99}):
            expected = model.encode(["a"], **options).shape[1]
            assert model.encode([], **options).shape == (0, expected)
        (empty, full) = encode_windows(model, model.backbone, [[], ["a"]], truncate_dim=own)
        assert empty.shape[1] == full.shape[1]


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ({"max_length": 8}, {}, r"max_length \(8 tokens\).* a larger max_length,"),
        ({"doc_max_length": 5}, {}, r"doc_max_length \(5 tokens\).* a larger doc_max_length,"),
        ({}, {"processing_kwargs": {"text": {"max_length": 7}}}, r"max_length \(7 tokens\)"),
    ],
)
def test_a_text_that_was_cut_names_the_limit_that_cut_it(
    tiny_decoder, caplog, settings, options, said
):
    """It was always told as a max_length of 512 tokens, and a larger one changed nothing."""
    LLM2Vec.from_pretrained(tiny_decoder, **settings).encode("word " * 40, **options)
    assert re.search(said, caplog.text)


@pytest.mark.parametrize("make", [set, frozenset])
def test_a_set_has_no_order(model, make):
    with pytest.raises(DataError, match="no order.*Fix: encode"):
        model.encode(make(["a", "b"]))


def keys_of(texts):
    return dict.fromkeys(texts).keys()


@pytest.mark.parametrize("make", [pd.Series, tuple, iter, np.array, pd.Index, keys_of])
def test_texts_in_any_sequence_have_their_own_vectors(model, make):
    texts = ["one text", "둘", "three"]
    np.testing.assert_array_equal(model.encode(make(texts)), model.encode(texts))
    pairs = [("ask", text) for text in texts]
    np.testing.assert_array_equal(model.encode(pair for pair in pairs), model.encode(pairs))


def test_half_a_character_names_the_index(model):
    with pytest.raises(DataError, match="input 1 has half a surrogate pair"):
        model.encode(["한국어", "\ud800"])


def test_a_tokenizer_of_another_model_is_told(model):
    wrong = copy.deepcopy(model)
    wrong.backbone.auto_model.resize_token_embeddings(100)
    with pytest.raises(
        ModelError, match=r"the tokenizer yields token \d+ .* model has only 100 embeddings"
    ):
        wrong.encode(["a text of several words"])


@pytest.mark.parametrize("length", [0, -5, True, "3", 2.5, None])
def test_a_length_that_is_set_is_a_number_of_tokens(model, length):
    with pytest.raises(ModelError, match="an encoder cuts texts at some number of tokens"):
        model.max_seq_length = length


def test_a_length_from_numpy_is_set(tiny_decoder):
    model = LLM2Vec.from_pretrained(tiny_decoder)
    model.max_seq_length = np.int64(9)
    assert model.max_seq_length == 9 and model.encode("a b").shape == (32,)


@pytest.mark.parametrize("length", [0, -5, True, "3", 2.5])
def test_a_length_for_one_call_is_a_number_of_tokens(model, length):
    """0 stood for no limit, and a negative one was told as a lack of room."""
    with pytest.raises(DataError, match="is not a number of tokens. Fix: give a whole number"):
        model.encode(["a b"], processing_kwargs={"text": {"max_length": length}})


@pytest.mark.parametrize("value", [1.5, "8", 0, -3, True])
@pytest.mark.parametrize("option", ["batch_size", "truncate_dim", "chunk_size"])
def test_a_number_that_is_not_whole_is_refused_with_what_is_allowed(model, option, value):
    """`batch_size=1.5` was the TypeError of a slice, far inside."""
    told = re.escape(f"{option} {value!r}: it is the number of ") + ".*Fix: a whole number of 1"
    for encode in (model.encode, model.encode_query, model.encode_document):
        with pytest.raises(DataError, match=told):
            encode(["a", "b", "c"], **{option: value})


def test_other_options_of_another_kind_are_refused_before_any_work(model, tiny_decoder):
    for name, value in (("precision", "int3"), ("precision", 8), ("output_value", 3)):
        with pytest.raises(DataError, match=f"unknown {name} '{value}'.*Fix: "):
            model.encode(["a"], **{name: value})
    for value in (True, 3, False):
        with pytest.raises(ModelError, match=rf"unknown compile '{value}'.*Fix: "):
            model.encode(["a"], compile=value)
    for value in (1.5, "8", True, float("nan")):
        with pytest.raises(DataError, match=r"truncate_dim .*Fix: "):
            LLM2Vec.from_pretrained(tiny_decoder, truncate_dim=value)
    with pytest.raises(DataError, match=r"batch_size 1.5: "):
        model.encode(["a"], 1.5)  # the original's order of arguments
    assert model.encode(["a"], np.int64(8)).shape == model.encode(["a"], 8).shape


def test_an_open_file_is_no_list_of_texts(model, tmp_path):
    """Each text kept the line break at its end, which changes its vector."""
    path = tmp_path / "texts.txt"
    path.write_text("one\ntwo\n")
    for make in (open, io.FileIO, codecs.open, lambda p: io.StringIO(p.read_text())):
        with make(path) as file, pytest.raises(DataError, match=r"open file.*Fix: encode\(\["):
            model.encode(file)
    with path.open() as file:
        given = model.encode([line.rstrip() for line in file])
    np.testing.assert_array_equal(given, model.encode(["one", "two"]))
