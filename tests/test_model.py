"""`LLM2Vec`: one vector a text, whatever else is in the batch; a folder that stock loaders read."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.tiny import save_random
from support.vectors import close
from transformers import AutoConfig, AutoModel, AutoTokenizer

from unmasked import LLM2Vec
from unmasked.checkpoint import loading
from unmasked.errors import DataError, ModelError, NotBidirectionalError
from unmasked.forward.pooling import STOCK_MODES, pool
from unmasked.mask.opening import open_config
from unmasked.mask.proof import prove

TEXTS = [
    "hello world",
    "a",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "안녕하세요 세계",
    " leading space",
    "price !@#$%^&*() tag end",
]
PROMPTS = ["Retrieve:", "Find it:\n"]


@pytest.fixture(scope="module")
def model(tiny_decoder):
    return LLM2Vec.from_pretrained(tiny_decoder, device="cpu")


@pytest.fixture(scope="module")
def sentencepiece_decoder(tiny_decoder, sentencepiece_tokenizer, tmp_path_factory):
    from transformers import LlamaConfig

    config = LlamaConfig.from_pretrained(tiny_decoder)
    config.vocab_size = len(sentencepiece_tokenizer)
    config.bos_token_id, config.eos_token_id = 1, 2
    folder = tmp_path_factory.mktemp("models") / "sentencepiece"
    return save_random(folder, config, sentencepiece_tokenizer)


# --- encode -----------------------------------------------------------------------------------


def test_b11_shapes(model):
    """One text gives one vector, a list a matrix, and an empty list an empty matrix."""
    assert model.encode("hello").shape == (32,)
    assert model.encode([]).shape == (0, 32)
    assert model.encode([], convert_to_tensor=True).shape == (0, 32)
    assert model.encode([], truncate_dim=8).shape == (0, 8)
    for precision in ("float32", "int8", "ubinary"):
        some, none = (model.encode(t, precision=precision) for t in (TEXTS, []))
        assert none.shape == (0, some.shape[1]) and none.dtype == some.dtype
    assert model.encode(TEXTS).shape == (len(TEXTS), 32)
    assert model.encode(TEXTS).dtype == np.float32
    assert isinstance(model.encode(TEXTS, convert_to_tensor=True), torch.Tensor)


@pytest.mark.parametrize(
    ("inputs", "index"),
    [([["i", "t"], "cd"], 1), (["a", ["i", "t"]], 1), (["a", None], 1), ([3], 0), ([["i"]], 0)],
)
def test_b11_a_mixed_list_names_the_index(model, inputs, index):
    with pytest.raises(DataError, match=f"input {index} is"):
        model.encode(inputs)


def test_b1_b2_b24_a_vector_does_not_depend_on_its_batch(model):
    together = model.encode([*TEXTS, ""])
    alone = np.stack([model.encode(text) for text in [*TEXTS, ""]])
    close(together, alone)
    close(together[::-1], model.encode([*TEXTS, ""][::-1]))
    close(together, model.encode([*TEXTS, ""], batch_size=2))
    assert np.isfinite(together).all()
    assert (np.linalg.norm(together, axis=1) > 0).all()


def test_b2_the_training_path_gives_the_vectors_of_encode(model):
    features = model.preprocess(TEXTS)
    with torch.no_grad():
        vectors = model(features)["sentence_embedding"].numpy()
    close(vectors, model.encode(TEXTS))


def test_b14_forward_leaves_its_input_alone(model):
    features = model.preprocess(TEXTS)
    before = copy.deepcopy(features)
    with torch.no_grad():
        first = model(features)["sentence_embedding"]
        second = model(features)["sentence_embedding"]
    assert torch.equal(first, second)
    assert features.keys() == before.keys()
    assert all(np.array_equal(features[name], before[name]) for name in before)


def test_b18_encode_restores_the_training_flag(model):
    model.train()
    model.encode("a text")
    assert model.training
    model.eval()


def test_each_pair_is_masked_by_its_own_instruction(model):
    pairs = [["Retrieve:", "one text"], ["A much longer instruction:", "two"], ["", "three"]]
    mixed = model.encode(pairs)
    close(mixed[0], model.encode("one text", prompt="Retrieve:\n"))
    close(mixed[1], model.encode("two", prompt="A much longer instruction:\n"))
    close(mixed[2], model.encode("three"))
    assert np.abs(mixed[0] - model.encode("one text")).max() > 1e-3


def test_prompt_names(tiny_decoder):
    prompts = {"query": "Ask:\n"}
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", prompts=prompts)
    asked = model.encode("a text", prompt="Ask:\n")
    close(model.encode_query("a text"), asked)
    close(model.encode("a text", prompt_name="query"), asked)
    close(model.encode_document("a text"), model.encode("a text"))


def test_options_of_sentence_transformers(model):
    vectors = model.encode(TEXTS)
    normal = model.encode(TEXTS, normalize_embeddings=True)
    close(normal, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    close(model.encode(TEXTS, truncate_dim=8), vectors[:, :8])
    assert model.encode(TEXTS, precision="binary").shape == (len(TEXTS), 4)
    states = model.encode(TEXTS, output_value="token_embeddings")
    lengths = [len(row.ids) for row in model.backbone.tokenize_inputs(TEXTS)]
    assert [len(s) for s in states] == lengths
    close(states[0][1:].mean(0), vectors[0])


@pytest.mark.parametrize("mode", STOCK_MODES)
def test_pooling_against_plain_torch(tiny_decoder, mode):
    """Each mode computed text by text from the transformer's own states."""
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", pooling_mode=mode)
    for text in TEXTS:
        ids = model.tokenizer(text)["input_ids"][: model.max_seq_length]
        bare = model.backbone.auto_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        body = bare[1:]
        weights = torch.arange(2, len(body) + 2, dtype=torch.float32)[:, None]
        expected = {
            "mean": body.mean(0),
            "weighted_mean": (body * weights).sum(0) / weights.sum(),
            "last_token": body[-1],
            "eos_token": body[-1],
            "bos_token": bare[0],
        }[mode]
        close(model.encode(text), expected.detach().numpy())
        assert (ids[-1] == model.tokenizer.eos_token_id) == (mode == "eos_token")


def test_pool_takes_tokens_in_any_order():
    states, rows = torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 2])
    positions = torch.tensor([0, 1, 2, 0, 1, 0])
    is_text = torch.tensor([False, True, True, False, True, True])
    order = torch.randperm(6)
    for mode in STOCK_MODES:
        expected = pool(states, rows, positions, is_text, 3, mode)
        shuffled = (x[order] for x in (states, rows, positions, is_text))
        torch.testing.assert_close(pool(*shuffled, 3, mode), expected)


def test_an_unknown_pooling_mode_names_the_nearest(tiny_decoder):
    with pytest.raises(ModelError, match="did you mean 'weighted_mean'"):
        LLM2Vec.from_pretrained(tiny_decoder, device="cpu", pooling_mode="weigted_mean")


def test_b17_several_processes_give_the_vectors_of_one(model):
    pairs = [["Retrieve:", text] for text in TEXTS]
    close(model.encode(pairs, device=["cpu", "cpu"], chunk_size=2), model.encode(pairs))


# --- loading ----------------------------------------------------------------------------------


def test_the_constructor_of_the_original(tiny_decoder, model):
    config = open_config(AutoConfig.from_pretrained(tiny_decoder))
    backbone = AutoModel.from_pretrained(tiny_decoder, config=config, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    built = LLM2Vec(backbone, tokenizer, pooling_mode="mean", max_length=128, doc_max_length=100)
    close(built.to("cpu").encode(TEXTS[:2]), model.encode(TEXTS[:2]))


def test_b25_a_causal_model_draws_a_warning_with_the_fix(tiny_decoder, caplog):
    causal = AutoModel.from_pretrained(tiny_decoder)
    with caplog.at_level(logging.WARNING):
        LLM2Vec(causal, AutoTokenizer.from_pretrained(tiny_decoder), device="cpu")
    assert "not bidirectional" in caplog.text
    assert "LLM2Vec.from_pretrained" in caplog.text


def test_the_mask_can_be_left_closed(tiny_decoder, model):
    causal = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", enable_bidirectional=False)
    assert causal.report.verdict == "impossible"
    first = causal.encode(["one two", "one three"], output_value="token_embeddings")
    close(first[0][:2], first[1][:2])
    opened = model.encode(["one two", "one three"], output_value="token_embeddings")
    assert (opened[0][:2] - opened[1][:2]).abs().max() > 1e-3


def test_what_was_saved_with_its_mask_closed_stays_closed(tiny_decoder, model, tmp_path):
    causal = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", enable_bidirectional=False)
    causal.save(tmp_path)
    vectors = causal.encode(TEXTS[:3])
    again = LLM2Vec.from_pretrained(tmp_path, device="cpu")
    close(again.encode(TEXTS[:3]), vectors)
    assert again.report.verdict == "impossible"
    close(SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS[:3]), vectors)
    opened = LLM2Vec.from_pretrained(tmp_path, device="cpu", enable_bidirectional=True)
    assert opened.report.verdict == "full" and opened.fingerprint() == model.fingerprint()
    found = loading.find(tmp_path)
    below_an_adapter = replace(found, added=[found.given])  # which was trained with an open mask
    assert found.closed and not below_an_adapter.closed


def test_mamba_is_refused(tiny_mamba):
    with pytest.raises(NotBidirectionalError, match="mamba"):
        LLM2Vec.from_pretrained(tiny_mamba, device="cpu")


def test_a_folder_without_tokenizer_is_told_apart(tiny_decoder, tmp_path):
    AutoModel.from_pretrained(tiny_decoder).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no tokenizer that can be read"):
        LLM2Vec.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["does/not/exist", "/does/not/exist"])
def test_a_missing_model_says_what_to_do(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="Fix: check the name"):
        LLM2Vec.from_pretrained(name, device="cpu", local_files_only=True)


# --- the saved folder -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", STOCK_MODES)
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_the_stock_loader_gives_the_same_vectors(
    kind, mode, tiny_decoder, sentencepiece_decoder, tmp_path
):
    base = tiny_decoder if kind == "byte_level" else sentencepiece_decoder
    model = LLM2Vec.from_pretrained(base, device="cpu", pooling_mode=mode, max_length=96)
    model.save(tmp_path / "saved")
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    own = LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu")
    for prompt in [None, *PROMPTS]:
        vectors = model.encode(TEXTS, prompt=prompt)
        close(vectors, stock.encode(TEXTS, prompt=prompt))
        close(vectors, own.encode(TEXTS, prompt=prompt))
    close(model.encode(TEXTS), stock.encode_query(TEXTS))
    close(model.encode(TEXTS), stock.encode_document(TEXTS))


def test_saved_prompts_reach_the_stock_loader(tiny_decoder, tmp_path):
    prompts = {"query": "Ask:\n", "sts": "Compare:\n"}
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", prompts=prompts)
    model.save(tmp_path / "saved")
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    close(model.encode_query(TEXTS), stock.encode_query(TEXTS))
    close(model.encode_document(TEXTS), stock.encode_document(TEXTS))
    close(model.encode(TEXTS, prompt_name="sts"), stock.encode(TEXTS, prompt_name="sts"))
    assert LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu").prompts == {
        "document": "",
        **prompts,
    }


def test_long_texts_are_cut_alike(tiny_decoder, tmp_path):
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", max_length=64, doc_max_length=30)
    model.save(tmp_path / "saved")
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    close(model.encode(TEXTS), stock.encode(TEXTS))


def test_automodel_loads_the_folder_bidirectional(model, tmp_path):
    model.save(tmp_path / "saved")
    assert prove(AutoModel.from_pretrained(tmp_path / "saved")).verdict == "full"


def test_b28_the_saved_tokenizer_splits_every_text_as_the_base_does(model, tiny_decoder, tmp_path):
    model.save(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    base = AutoTokenizer.from_pretrained(tiny_decoder)
    for text in [*TEXTS, "foo_bar _ baz", "</s>", "<s>"]:
        assert saved(text)["input_ids"] == base(text)["input_ids"]
    assert saved.get_vocab() == base.get_vocab()


def test_the_folder_speaks_the_older_schema(model, tmp_path):
    model.save(tmp_path / "saved")

    def read(name):
        return json.loads((tmp_path / "saved" / name).read_text())

    types = [module["type"] for module in read("modules.json")]
    assert types == [
        "sentence_transformers.models.Transformer",
        "sentence_transformers.models.Pooling",
    ]
    pooling = read("1_Pooling/config.json")
    assert pooling["pooling_mode_mean_tokens"] is True
    assert sum(v is True for k, v in pooling.items() if k.startswith("pooling_mode_")) == 1
    assert pooling["include_prompt"] is False
    assert pooling["word_embedding_dimension"] == 32
    config = read("config.json")
    assert config["is_causal"] is False
    assert config["use_bidirectional_attention"] is True  # text-embeddings-inference
    assert config["use_cache"] is False
    assert "auto_map" not in config
    assert read("llm2vec_config.json")["pooling_mode"] == "mean"


def test_the_folder_loads_without_this_package(model, tmp_path):
    """A process in which `unmasked` cannot be imported."""
    model.save(tmp_path / "saved")
    np.save(tmp_path / "ours.npy", model.encode(TEXTS))
    code = f"""
import sys
from dataclasses import replace
sys.modules["unmasked"] = None
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({str(tmp_path / "saved")!r}, device="cpu")
assert np.abs(model.encode({TEXTS!r}) - np.load({str(tmp_path / "ours.npy")!r})).max() < 1e-5
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_saving_over_a_folder_keeps_what_is_not_ours(model, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    model.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_repeated_texts_are_computed_once_and_order_survives_windows(model, monkeypatch):
    texts = [f"text number {i % 7}" + " and more" * (i % 5) for i in range(50)]
    alone = model.encode(texts[::-1])[::-1]
    monkeypatch.setattr("unmasked.forward.batches.WINDOW", 8)
    before = model.tokens_encoded
    np.testing.assert_allclose(model.encode(texts), alone, atol=1e-5)
    rows = model.backbone.tokenize_inputs(sorted(set(texts)))
    assert model.tokens_encoded - before == sum(len(row.ids) for row in rows)


def test_texts_are_cut_at_the_positions_a_model_has(tiny_tokenizer, caplog):
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=1, n_head=4, n_positions=24
    )
    model = LLM2Vec(GPT2Model(config), tiny_tokenizer, max_length=64, enable_bidirectional=True)
    assert "has 24 positions" in caplog.text
    assert model.max_length == model.settings.max_length == 24
    assert np.isfinite(model.encode("word " * 100)).all()


# --- arguments that cannot be used ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_length": "abc"}, "max_length 'abc' is not a number of tokens"),
        ({"layers": "2"}, "layers '2': .* the first 1 to 2 can be kept"),
        ({"layers": 1.0}, "layers 1.0: "),
        ({"device": "foo"}, r"device 'foo' cannot be used: .* Allowed here: cpu"),
        ({"device": "cuda:99"}, r"device 'cuda:99' cannot be used: .* Allowed here: cpu"),
        ({"template": {"prefix": None}}, "template: prefix None is not a text"),
    ],
)
def test_an_argument_of_another_kind_is_named(tiny_decoder, options, said):
    with pytest.raises(ModelError, match=said) as caught:
        LLM2Vec.from_pretrained(tiny_decoder, **options)
    assert "Fix: " in str(caught.value)


def test_a_device_that_is_not_there_is_named_wherever_it_is_given(tiny_decoder):
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    with pytest.raises(ModelError, match="device 'foo' cannot be used"):
        model.encode(["a"], device="foo")
    with pytest.raises(ModelError, match="device 'foo' cannot be used"):
        LLM2Vec(model.model, model.tokenizer, device="foo")


@pytest.mark.parametrize("prompt", [["x"], 3, ("x", "y")])
@pytest.mark.parametrize("call", ["encode", "encode_query", "encode_document"])
def test_a_prompt_is_one_string(tiny_decoder, prompt, call):
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    with pytest.raises(DataError, match=r"prompt is (list|int|tuple).* Allowed: one string.* Fix:"):
        getattr(model, call)(["a"], prompt=prompt)
