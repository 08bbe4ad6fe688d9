"""What is pooled: the text's own tokens, exactly, in every script and for both tokenizer kinds."""

from __future__ import annotations

import copy

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from unmasked.errors import DataError, ModelError
from unmasked.text.special_tokens import MARK, prepare_tokenizer, surrounding_ids
from unmasked.text.templates import Template
from unmasked.text.tokens import TextTokenizer

TEXTS = [
    "hello world",
    "",
    " leading space",
    "trailing \t\n",
    "안녕하세요 세계",
    "price !@#$%^&*() tag end",
    "</s> in a text",
    "x" * 50,
    "\nnew line",
    MARK + "marked",
]


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request, tiny_tokenizer, sentencepiece_tokenizer):
    return tiny_tokenizer if request.param == "byte_level" else sentencepiece_tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_the_prepared_tokenizer_gives_the_same_ids(tokenizer, text):
    prepared = prepare_tokenizer(tokenizer)
    assert prepared(MARK + text)["input_ids"] == tokenizer(text)["input_ids"]
    assert TextTokenizer(prepared)([text])[0].ids == tokenizer(text)["input_ids"]


def test_the_given_tokenizer_is_not_changed(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    prepare_tokenizer(tokenizer, append_eos=True)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_prompt_of_the_mark_alone_is_bos_and_not_a_named_special_token(tokenizer):
    """The two facts that make the stock loader leave BOS out of pooling without a prompt."""
    prepared = prepare_tokenizer(tokenizer)
    ids = prepared(MARK)["input_ids"]
    assert ids == surrounding_ids(tokenizer)[0] != []
    assert ids[-1] not in prepared.all_special_ids


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["Retrieve:", "Retrieve:\n", "Ask: ", "질문\n", "a"])
def test_b5_the_span_is_the_text_and_nothing_else(tokenizer, prompt, text):
    tokens = TextTokenizer(prepare_tokenizer(tokenizer))
    row = tokens([text], prompt)[0]
    whole = tokens.tokenizer(MARK + prompt + text)["input_ids"]
    assert row.ids == whole
    if not text:
        assert (row.start, row.stop) == (0, len(row.ids))
        return
    # A token belongs to the text if and only if it reaches beyond the prompt's last character.
    encoding = tokens.tokenizer.backend_tokenizer.encode(
        MARK + prompt + text, add_special_tokens=False
    )
    ends = [end for _, end in encoding.offsets]
    inside = [end > len(MARK + prompt) for end in ends]
    assert row.start == len(tokens.prefix) + inside.index(True)
    assert row.stop == len(row.ids)


def test_b3_a_separator_like_text_is_kept_verbatim(tiny_tokenizer):
    text = "price !@#$%^&*() tag end"
    tokens = TextTokenizer(prepare_tokenizer(tiny_tokenizer))
    row = tokens([text])[0]
    assert tokens.tokenizer.decode(row.ids[row.start : row.stop]) == text


def test_b4_truncation_counts_tokens_in_every_script(tokenizer):
    tokens = TextTokenizer(prepare_tokenizer(tokenizer), max_length=512, doc_max_length=20)
    for text in ("가" * 140, "word " * 140, "\t\n" * 140):
        row = tokens([text])[0]
        assert row.stop - row.start == 20
        whole = TextTokenizer(prepare_tokenizer(tokenizer), max_length=4096)([text])[0]
        assert row.ids == whole.ids[: len(row.ids)]


def test_b6_only_the_text_is_truncated(tokenizer):
    prepared = prepare_tokenizer(tokenizer, append_eos=True)
    tokens = TextTokenizer(prepared, max_length=40)
    row = tokens(["word " * 100], "Find the passage:\n")[0]
    assert len(row.ids) == 40
    assert row.ids[-1] == tokenizer.eos_token_id
    bare = tokens.tokenizer("Find the passage:\n", add_special_tokens=False)["input_ids"]
    assert row.ids[: row.start] == [*tokens.prefix, *bare]


def test_b6_an_instruction_that_leaves_no_room_is_an_error(tokenizer):
    tokens = TextTokenizer(prepare_tokenizer(tokenizer), max_length=16)
    with pytest.raises(DataError, match="leaves no room for the text"):
        tokens(["text"], "a very long instruction " * 5)
    with pytest.raises(DataError, match="leaves no room for the text"):
        tokens([""], "a very long instruction " * 5)
    exact = TextTokenizer(prepare_tokenizer(tokenizer), max_length=len(tokens([""], "Ask:")[0].ids))
    assert exact([""], "Ask:") == tokens([""], "Ask:")


def test_b9_eos_is_appended_exactly_once(tokenizer):
    tokens = TextTokenizer(prepare_tokenizer(tokenizer, append_eos=True))
    for text in TEXTS:
        ids = tokens([text])[0].ids
        plain = tokenizer(text)["input_ids"]
        assert ids == [*plain, tokenizer.eos_token_id]


def test_b10_bos_pooling_without_bos_is_refused(tokenizer):
    prepared = prepare_tokenizer(tokenizer)
    tokens = TextTokenizer(prepared)
    tokens.check_mode("bos_token")
    tokens.prefix = []
    with pytest.raises(ModelError, match="needs a tokenizer that puts BOS"):
        tokens.check_mode("bos_token")


@pytest.mark.parametrize("number", [7, 128_000])
@pytest.mark.parametrize("nested", [False, True])
def test_a_post_processor_of_another_vocabulary_is_refused(tiny_tokenizer, number, nested):
    """As of a tokenizer that was trained anew: its ids would be those of other tokens."""
    stale = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    given = copy.deepcopy(tiny_tokenizer)
    given.backend_tokenizer.post_processor = processors.Sequence([stale]) if nested else stale
    with pytest.raises(ModelError, match=rf"token {number} .*'<s>', which is 0 in its.*Fix: set"):
        prepare_tokenizer(given)


def test_b12_an_existing_padding_token_is_kept(tiny_tokenizer):
    with_pad = copy.deepcopy(tiny_tokenizer)
    with_pad.add_special_tokens({"pad_token": "!"})
    assert prepare_tokenizer(with_pad).pad_token == "!"
    assert prepare_tokenizer(tiny_tokenizer).pad_token == "</s>"


@pytest.fixture
def nameless():
    """A byte-level BPE without any special token, in which "!" has the id 0 and is merged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    backend.train_from_iterator(["a != b", "wow!! 안녕하세요!!"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


SPLIT_AT = ["a != b", "wow!!! really", "안녕하세요!", "plain", *TEXTS]


@pytest.mark.parametrize("text", SPLIT_AT)
def test_a_padding_token_of_last_resort_splits_no_text(nameless, text):
    assert nameless.convert_ids_to_tokens(0) == "!"
    prepared = prepare_tokenizer(nameless)
    assert prepared(MARK + text)["input_ids"] == nameless(text)["input_ids"]
    assert prepared.pad_token_id is not None  # stock loaders need one


@pytest.mark.parametrize("text", SPLIT_AT)
@pytest.mark.parametrize("name, token", [("pad", "!"), ("pad", "[PAD]"), ("mask", "a")])
def test_a_token_that_was_only_named_splits_no_text(tiny_tokenizer, name, token, text):
    given = copy.deepcopy(tiny_tokenizer)
    setattr(given, f"{name}_token", token)
    prepared = prepare_tokenizer(given)
    assert prepared(MARK + text)["input_ids"] == given(text)["input_ids"]
    assert prepared.pad_token == "</s>"


def test_an_added_token_pads_before_any_other_but_never_bos(nameless):
    nameless.add_tokens(["<start>", "<other>"])
    first, second = nameless.convert_tokens_to_ids(["<start>", "<other>"])
    assert prepare_tokenizer(nameless).pad_token_id == first
    nameless.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", first)]
    )
    assert prepare_tokenizer(nameless).pad_token_id == second


def test_stock_loaders_read_a_folder_with_the_padding_token_of_last_resort(nameless, tmp_path):
    from sentence_transformers import SentenceTransformer
    from support.tiny import model

    from unmasked import LLM2Vec

    made = model("llama", vocab_size=len(nameless))
    own = LLM2Vec(made, nameless, enable_bidirectional=True, device="cpu")
    own.save(tmp_path / "saved")
    again = LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu")
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    texts = ["a != b", "wow!!! really, and longer than the other"]
    for vectors in (again.encode(texts), stock.encode(texts)):
        assert abs(vectors - own.encode(texts)).max() < 1e-5
    assert again.fingerprint() == own.fingerprint()


def suffix_ids(model):
    suffix = model.backbone.tokens.template.suffix
    return model.tokenizer(suffix, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("suffix", ["\nend", " E", "<|im_end|>", " [/INST]", "</s>!"])
def test_a_suffix_of_ordinary_tokens_splits_no_text_after_saving(
    tiny_decoder, tmp_path, caplog, suffix
):
    from unmasked import LLM2Vec

    template = {"prefix": "", "suffix": suffix, "pool_suffix": True}
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", template=template)
    model.save(tmp_path / "saved")
    assert "Stock loaders cannot pool this template exactly" in caplog.text
    again = LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.tokenizer.added_tokens_decoder.keys() == {0, 1}
    texts = ["the end bend end", "if a >b: x->y", "list[int]] x", "A Europe E Enter E", "no!!!"]
    assert again.backbone.tokens(texts) == model.backbone.tokens(texts)
    folder, ids = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved"), suffix_ids(model)
    assert folder("x")["input_ids"][-len(ids) :] == ids, "servers append the suffix"
    assert abs(again.encode(texts) - model.encode(texts)).max() == 0
    assert again.fingerprint() == model.fingerprint()


def test_a_suffix_that_is_an_added_token_stays_exact_in_stock_loaders(tiny_tokenizer):
    given = copy.deepcopy(tiny_tokenizer)
    given.add_tokens(["<|im_end|>"])
    tokens = TextTokenizer(prepare_tokenizer(given), template=Template("", "<|im_end|>", "", True))
    saved, exact = tokens.for_stock()
    assert exact and saved("a")["input_ids"][-1] == given.convert_tokens_to_ids("<|im_end|>")
    assert saved.extra_special_tokens == ["<|im_end|>"]


def test_skip_instruction_false_pools_everything(tokenizer):
    tokens = TextTokenizer(prepare_tokenizer(tokenizer), skip_instruction=False)
    row = tokens(["a text"], "Instruction:\n")[0]
    assert (row.start, row.stop) == (0, len(row.ids))


@pytest.fixture
def bert(tiny_tokenizer, tmp_path):
    """A base encoder of random weights whose tokenizer puts [CLS] before a text, [SEP] behind."""
    from support.tiny import save_random
    from tokenizers import Tokenizer, processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    named = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return save_random(tmp_path / "bert", config, tokenizer), tokenizer


def test_a_base_encoder_keeps_its_separator_here_and_in_its_folder(bert, tmp_path):
    from sentence_transformers import SentenceTransformer

    from unmasked import LLM2Vec

    folder, tokenizer = bert
    model = LLM2Vec.from_pretrained(folder, device="cpu")
    for text in TEXTS:
        assert model.backbone.tokens([text])[0].ids == tokenizer(text)["input_ids"]
    model.save(tmp_path / "saved")
    again = LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu")
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    texts = ["a text", "another, longer text"]
    for vectors in (again.encode(texts), stock.encode(texts)):
        assert abs(vectors - model.encode(texts)).max() < 1e-5
    (words,) = model.encode_words([["a", "text"]])
    assert words.shape == (2, 32)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_a_row_of_ids_is_the_row_of_their_text(tokenizer, text, special, eos):
    """Whether BOS and EOS are among the ids or not."""
    tokens = TextTokenizer(prepare_tokenizer(tokenizer, append_eos=eos), max_length=30)
    ids = tokens.tokenizer.backend_tokenizer.encode(MARK + text, add_special_tokens=special).ids
    for prompt in ("", "Find similar questions:\n"):
        if prompt and (tokenizer.unk_token or text.startswith(MARK)):
            continue  # alone, it begins with a space in SentencePiece's manner, or loses its mark
        (row,) = tokens([text], prompt)
        assert tokens.of_ids(ids, prompt) == row


def test_a_row_of_ids_has_the_template_around_it(tiny_tokenizer):
    template = Template("<s>user\n", "</s>")
    tokens = TextTokenizer(prepare_tokenizer(tiny_tokenizer), template=template)
    ids = tiny_tokenizer("a text", add_special_tokens=False)["input_ids"]
    assert tokens.of_ids(ids, "Find:\n") == tokens(["a text"], "Find:\n")[0]


def test_a_row_tells_how_much_of_its_text_was_cut(tokenizer):
    backend = prepare_tokenizer(tokenizer)
    whole = len(backend(MARK + "x" * 50, add_special_tokens=False)["input_ids"])
    for options in ({"max_length": 12}, {"doc_max_length": 11}):
        tokens = TextTokenizer(backend, **options)
        (row, short) = tokens(["x" * 50, "x"])
        assert (row.cut, short.cut) == (whole - 11, 0)
        assert tokens.of_ids([5] * 13).cut == 2
    exact = TextTokenizer(backend, max_length=whole + 1)
    assert exact(["x" * 50])[0].cut == 0


def test_a_call_of_the_tokenizer_itself_leaves_no_padding_behind(tiny_tokenizer):
    """transformers switches padding and truncation on in the backend and leaves them so."""
    tokens = TextTokenizer(prepare_tokenizer(tiny_tokenizer))
    texts = ["a", "a text that is longer than the first"]
    before = tokens(texts), tokens(texts, "an instruction\n"), tokens.fixed_tokens
    tokens.tokenizer(texts, padding="max_length", truncation=True, max_length=3)
    assert (tokens(texts), tokens(texts, "an instruction\n"), tokens.fixed_tokens) == before
    texts = ["a text. Another one. " * 40]
    whole = tokens.locate(texts[0])
    tokens.tokenizer(texts, truncation=True, max_length=3)
    assert tokens.locate(texts[0]) == whole
