"""Vectors of words, and what a linear probe reads from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from unmasked import LLM2Vec
from unmasked.errors import DataError
from unmasked.evaluate import interval, paired_difference
from unmasked.evaluate.scorer import make_scorer
from unmasked.evaluate.tasks.probe import load_probe

DATA = Path(__file__).parents[3] / "shared" / "data" / "word"
SENTENCES = [["The", "cat", "sat", "warmly"], ["Masks", "hide"], ["한국어", "(oddly)", "x"]]


@pytest.fixture(scope="module")
def model(tiny_decoder):
    return LLM2Vec.from_pretrained(tiny_decoder, device="cpu")


def by_hand(model, words, previous):
    """Word vectors from the characters of each token, the plain way."""
    tokens = model.backbone.tokens
    text = " ".join(words)
    (states,) = model.encode([text], output_value="token_embeddings")
    states = states.numpy()
    offsets = tokens.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets
    assert len(states) == 1 + len(offsets)  # BOS
    found, begin = [], 0
    for word in words:
        end = begin + len(word)
        own = [1 + i for i, (a, b) in enumerate(offsets) if b > begin - 1 and a < end]  # its space
        found.append(states[[i - previous for i in own]].mean(axis=0))
        begin = end + 1
    return np.array(found)


@pytest.mark.parametrize("previous", [False, True], ids=["own", "previous"])
def test_a_word_is_the_mean_of_its_sub_words(model, previous):
    vectors = model.encode_words(SENTENCES, previous=previous)
    assert [v.shape for v in vectors] == [(len(words), 32) for words in SENTENCES]
    for words, got in zip(SENTENCES, vectors, strict=True):
        np.testing.assert_allclose(got, by_hand(model, words, previous), atol=1e-5)


def test_the_state_before_the_first_word_is_that_of_bos(model):
    (one,) = model.encode_words([["x"]], previous=True)
    (states,) = model.encode(["x"], output_value="token_embeddings")
    np.testing.assert_allclose(one[0], states[0].numpy(), atol=1e-5)


def test_without_bos_the_first_word_is_not_lost(tiny_decoder, tiny_tokenizer):
    from tokenizers import processors
    from transformers import AutoModel, PreTrainedTokenizerFast

    backend = tiny_tokenizer.backend_tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel()
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    config = AutoModel.from_pretrained(tiny_decoder).config
    config.is_causal = False
    plain = LLM2Vec(AutoModel.from_pretrained(tiny_decoder, config=config), bare, device="cpu")
    assert not plain.backbone.tokens.prefix
    own, before = (plain.encode_words([["x", "y"]], previous=p)[0] for p in (False, True))
    assert own.shape == before.shape == (2, 32)
    np.testing.assert_array_equal(own[0], before[0])  # nothing stands before it
    assert not np.allclose(own[1], before[1])


def test_word_vectors_do_not_depend_on_the_batch(model):
    together = model.encode_words(SENTENCES)
    for words, vectors in zip(SENTENCES, together, strict=True):
        np.testing.assert_allclose(model.encode_words([words])[0], vectors, atol=1e-5)
    assert model.encode_words([]) == []


def test_what_cannot_be_a_vector_is_refused(model):
    with pytest.raises(DataError, match=r"sentence 1 is empty.*Fix"):
        model.encode_words([["x"], []])
    with pytest.raises(DataError, match=r"sentence 0 has \d+ tokens and the model reads.*Fix"):
        model.encode_words([["word"] * 600])
    with pytest.raises(DataError, match=r"sentence 1 is a string \('How are'\).*text\.split\(\)"):
        model.encode_words([["x"], "How are"])
    with pytest.raises(DataError, match=r"sentences are one string.*Fix: .*text\.split\(\)"):
        model.encode_words("How are")
    with pytest.raises(DataError, match=r"sentence 0 has a word that is not a string: 3 .*Fix"):
        model.encode_words([["x", 3]])
    with pytest.raises(DataError, match=r"sentence 0 is empty or has an empty word.*Fix"):
        model.encode_words([["x", ""]])


def test_the_default_prompt_of_a_model_is_not_put_before_words(tiny_decoder):
    plain = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    asks = LLM2Vec.from_pretrained(
        tiny_decoder, device="cpu", prompts={"q": "Find: "}, default_prompt_name="q"
    )
    expected, found = plain.encode_words(SENTENCES), asks.encode_words(SENTENCES)
    for words, same in zip(expected, found, strict=True):
        np.testing.assert_array_equal(words, same)


# Files


def conll(folder, name, sentences, extra=""):
    rows = ["\n".join("\t".join(row) for row in rows) for rows in sentences]
    path = folder / name
    path.write_text(extra + "\n\n".join(rows) + "\n", encoding="utf-8")
    return path


def example(folder, count=60):
    """Names are entities of one or two words; what a word is shows in its letters."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        rows = [("Anna", "NN", "B-PER"), ("Bell", "NN", "I-PER")][: random.integers(1, 3)]
        rows += [("in", "IN", "O"), ("Oslo", "NN", "B-LOC")]
        rows += [("runs", "VB", "O")] * int(random.integers(1, 3))
        made.append(rows)
    conll(folder, "x_train.tsv", made)
    return conll(folder, "x_dev.tsv", made[:20], "# a comment\n")


def test_every_column_and_state_is_probed(model, tmp_path):
    from seqeval.metrics import f1_score

    task = load_probe(example(tmp_path))
    assert task.columns == ("pos", "ner")
    assert sum(len(words) for words, _ in task.test) == sum(
        len(line.split("\t")) == 3 for line in (tmp_path / "x_dev.tsv").read_text().splitlines()
    )
    result = task.score(model)
    names = [f"{c}{s}" for c in ("pos", "ner") for s in ("", " before")]
    assert set(result.scores) == {f"{n} accuracy" for n in names} | {"ner f1", "ner before f1"}
    assert next(iter(result.scores)) == "pos accuracy"
    assert all(0 <= score <= 1 for score in result.scores.values())
    assert result.scores["ner f1"] > 0.5
    for metric in result.scores:
        got = interval(result, metric, samples=100)
        assert got.low <= got.difference <= got.high
    assert paired_difference(result, result, "ner f1", samples=50).difference == 0

    from unmasked.evaluate.tasks.probe import _measure

    gold = [["B-PER", "I-PER", "O"], ["B-LOC", "O", "I-PER"]]
    said = [["B-PER", "O", "O"], ["B-LOC", "O", "I-PER"]]
    hits, of = _measure(gold, said)["f1"]
    assert hits.sum() / of.sum() == pytest.approx(f1_score(gold, said))


def test_a_space_separated_file_of_conll_2003(tmp_path):
    text = (
        "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n# NN I-VP O\n\nin IN B-PP O"
    )
    for name in ("eng.train", "eng.testa"):
        (tmp_path / name).write_text(text)
    task = load_probe(tmp_path / "eng.testa")
    assert task.columns == ("pos", "chunk", "ner")
    assert [words for words, _ in task.test] == [["EU", "rejects", "#"], ["in"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there are no words in it"),
        ("a\n", "line 1: no label after 'a'"),
        ("a\tX\nb\tX\tY\n", "line 2: 3 columns instead of 2"),
        ("a\tX\n\nb\tX\n", "column 2 has one label only"),
        ("a\tX\nb\tY\n\xff", None),
    ],
)
def test_bad_word_files(tmp_path, content, message):
    for name in ("x_train.tsv", "x_test.tsv"):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message or "line 3: not UTF-8") as caught:
        load_probe(tmp_path / "x_test.tsv")
    assert "Fix: " in str(caught.value)


def test_a_file_without_its_partner(tmp_path):
    path = conll(tmp_path, "x_dev.tsv", [[("a", "X")]])
    with pytest.raises(DataError, match=r"no file to train on beside it \(x_train\.tsv\).*Fix"):
        make_scorer([f"words:{path}"])
    with pytest.raises(DataError, match="no such file"):
        make_scorer(["words:absent.tsv"])


def test_vectors_that_are_nan_are_named(tmp_path):
    class Broken:
        def encode_words(self, sentences, previous):
            return [np.full((len(words), 4), np.nan) for words in sentences]

    with pytest.raises(DataError, match="NaN or infinite vectors for .*'Anna'"):
        load_probe(example(tmp_path)).score(Broken())


def test_the_development_words_load():
    if not (DATA / "ud_ewt_pos_dev.tsv").is_file():
        pytest.skip("the development data (ud_ewt_pos) is not here")
    task = load_probe(DATA / "ud_ewt_pos_dev.tsv")
    assert task.columns == ("upos", "pos")
    assert len(task.train) >= 12_544 and len(task.test) >= 2001  # long ones are in pieces
    assert sum(len(words) for words, _ in task.test) == sum(
        "\t" in line for line in (DATA / "ud_ewt_pos_dev.tsv").read_text("utf-8").splitlines()
    )
