"""A text far longer than an input is cut before it is tokenised, to the ids of cutting after."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unmasked.checkpoint.location import bundled_path
from unmasked.text import beginnings
from unmasked.text.special_tokens import prepare_tokenizer
from unmasked.text.templates import Template
from unmasked.text.tokens import TextTokenizer

STORIES = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260k"
KINDS = ["byte_level", "sentencepiece", "wordpiece", "unigram", "nano", "stories260k"]


def trained(kind: str, sentences: list[str]) -> PreTrainedTokenizerFast:
    """WordPiece in the manner of BERT, or Unigram in that of XLM-R."""
    special = ["[UNK]", "[CLS]", "[SEP]"]
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        how = {"vocab_size": 300, "special_tokens": special, "show_progress": False}
        backend.train_from_iterator(sentences, trainers.WordPieceTrainer(**how))
    else:
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        how = {"vocab_size": 300, "special_tokens": special, "show_progress": False}
        backend.train_from_iterator(sentences, trainers.UnigramTrainer(unk_token="[UNK]", **how))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", pad_token="[SEP]"
    )


@pytest.fixture(params=KINDS)
def tokenizer(request, tiny_tokenizer, sentencepiece_tokenizer, sentences):
    if request.param == "stories260k" and not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not there")
    made = {"byte_level": tiny_tokenizer, "sentencepiece": sentencepiece_tokenizer}
    places = {"nano": bundled_path(), "stories260k": STORIES}
    if request.param in places:
        return AutoTokenizer.from_pretrained(places[request.param])
    return made.get(request.param) or trained(request.param, sentences)


def long_texts(sentences: list[str], size: int) -> dict[str, str]:
    draw = random.Random(0)
    letters = "".join(draw.choices("abcdefghij", k=size))
    return {
        "words": " ".join(draw.choices(sentences, k=size // 40)),
        "letters": letters,
        "a run": "a" * size,
        "spaces": "a" + " " * size + "b",
        "korean": "가나다라 " * (size // 5),
        "accents": "e\u0301" * (size // 2),
        "emoji": "👩‍👩‍👧" * (size // 5),
        "special": "</s><s>" * (size // 7),
    }


@pytest.mark.parametrize("around", ["plain", "prompt", "template"])
def test_the_ids_are_those_of_cutting_after(tokenizer, around, sentences, monkeypatch):
    template = Template("<|", "|> end") if around == "template" else Template()
    tokens = TextTokenizer(prepare_tokenizer(tokenizer), 40, template=template)
    prompt = "" if around == "plain" else "Find:\n"
    texts = list(long_texts(sentences, 24_000).values())
    monkeypatch.setattr(beginnings, "CHARACTERS", 1)  # the shortest beginnings that may be
    assert all(row.cut for row in tokens(texts[:1], prompt))
    before = tokens(texts, prompt)
    monkeypatch.setattr(beginnings, "MARGIN", 1 << 30)  # now every text is tokenised whole
    after = tokens(texts, prompt)
    assert before == after
    assert [bool(row.cut) for row in before] == [bool(row.cut) for row in after]


def test_of_a_megabyte_a_few_thousand_characters_are_tokenised(tokenizer, sentences):
    tokens = TextTokenizer(prepare_tokenizer(tokenizer), 128)
    text = long_texts(sentences, 1_000_000)["words"]
    assert len(text) > 1_000_000
    backend = tokens.tokenizer.backend_tokenizer
    found = beginnings.encode_beginnings(backend, [text, "short"], ["", ""], "", 128, False)
    assert found[0].length < 50_000 and found[1].length == 5
    whole = backend.encode(text, add_special_tokens=False).ids
    own = tokens([text])[0].ids[len(tokens.prefix) :]
    assert own == whole[: len(own)] and len(own) == 128 - len(tokens.prefix)
    assert tokens([text], max_length=1 << 30)[0].ids[len(tokens.prefix) :] == whole
