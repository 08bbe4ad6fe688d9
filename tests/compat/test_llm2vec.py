"""The calls of the original package, as its scripts make them; `docs/migrating.md` names them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.vectors import close
from transformers import AutoTokenizer

from unmasked import LLM2Vec
from unmasked.checkpoint.folder import Settings
from unmasked.compat.seed import parser
from unmasked.errors import ModelError
from unmasked.model import TextEncoder
from unmasked.text.templates import named

GUIDE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text(encoding="utf-8")
TEXTS = ["one text", "another, longer one"]


@pytest.fixture(scope="module")
def model(tiny_decoder):
    return LLM2Vec.from_pretrained(tiny_decoder, device="cpu", doc_max_length=400)


def test_encode_in_the_originals_words(model, tiny_decoder):
    wanted = model.encode(TEXTS)
    close(model.encode(TEXTS, 1, False), wanted)
    close(model.encode(sentences=TEXTS, batch_size=1, convert_to_numpy=True), wanted)
    tensor = model.encode(TEXTS, batch_size=2, convert_to_tensor=True, device="cpu")
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == torch.float32
    old = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", compat="llm2vec-0.2")
    assert isinstance(old.encode(TEXTS), torch.Tensor)
    assert isinstance(old.encode(TEXTS, convert_to_numpy=True), np.ndarray)
    assert old.encode([]).shape == (0, 32)


def test_tokenize_forward_and_pooling(model):
    features = model.tokenize(TEXTS)
    assert set(features) == {"input_ids", "attention_mask", "text_mask", "embed_mask"}
    del features["text_mask"]  # the original knew `embed_mask` only
    with torch.no_grad():
        outputs = model(dict(features))
        pooled = model.get_pooling(features, outputs["token_embeddings"])
    close(outputs["sentence_embedding"], model.encode(TEXTS))
    close(pooled, model.encode(TEXTS))


@pytest.mark.parametrize("mode", ["mean", "weighted_mean", "last_token", "eos_token", "bos_token"])
def test_b19_get_pooling_takes_padding_on_either_side(tiny_decoder, mode):
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", pooling_mode=mode)
    right = model.tokenize(TEXTS)
    states = torch.randn(*right["input_ids"].shape, 32)
    width = states.shape[1]
    lengths = right["attention_mask"].sum(1)
    left = {name: value.clone() for name, value in right.items()}
    moved = states.clone()
    for row, length in enumerate(lengths.tolist()):
        order = [*range(length, width), *range(length)]
        moved[row] = states[row][order]
        for name, value in right.items():
            left[name][row] = value[row][order]
    before = {name: value.clone() for name, value in left.items()}
    close(model.get_pooling(left, moved), model.get_pooling(right, states))
    assert all(torch.equal(left[name], before[name]) for name in before)


def test_attributes_and_template(tiny_decoder):
    model = LLM2Vec.from_pretrained(
        tiny_decoder, device="cpu", template="inst", max_length=99, pooling_mode="last_token"
    )
    assert model.prepare_for_tokenization("x") == "[INST] x [/INST]"
    assert (model.pooling_mode, model.max_length, model.skip_instruction) == (
        "last_token",
        99,
        True,
    )
    assert model.model is model.backbone.auto_model
    assert model.config is model.model.config
    model.max_length, model.doc_max_length = 16, 8
    row = model.backbone.tokenize_inputs(["word " * 50])[0]
    assert len(row.ids) == 16
    assert not model.model.is_activation_checkpointing
    model.gradient_checkpointing_enable()
    assert model.model.is_activation_checkpointing
    wider = len(model.tokenizer) + 3
    assert model.resize_token_embeddings(wider).weight.shape == (wider, 32)
    assert model.config.vocab_size == wider
    assert model.settings.template == named("inst")


def test_from_pretrained_in_the_originals_words(tiny_decoder):
    options = {"device_map": "cpu", "torch_dtype": torch.bfloat16, "trust_remote_code": True}
    model = LLM2Vec.from_pretrained(tiny_decoder, None, False, True, **options)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert model.device.type == "cpu"
    causal = LLM2Vec.from_pretrained(
        tiny_decoder, enable_bidirectional=False, device_map={"": "cpu"}
    )
    assert causal.report.verdict == "impossible"
    with pytest.raises(ModelError, match="spreads the model over devices"):
        LLM2Vec.from_pretrained(tiny_decoder, device_map="balanced")
    with pytest.raises(ModelError, match="did you mean 'bfloat16'"):
        LLM2Vec.from_pretrained(tiny_decoder, torch_dtype="bfloat61")
    with pytest.raises(TypeError, match="did you mean 'revision'"):
        LLM2Vec.from_pretrained(tiny_decoder, revison="main")


def test_save_in_the_originals_words(tiny_decoder, tmp_path):
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", pooling_mode="last_token")
    model.save(tmp_path / "with", True)
    model.save(str(tmp_path / "without"), merge_before_save=True, save_config=False)
    assert (tmp_path / "with" / "llm2vec_config.json").is_file()
    assert not (tmp_path / "without" / "llm2vec_config.json").exists()
    again = LLM2Vec.from_pretrained(tmp_path / "with", device="cpu")
    close(again.encode(TEXTS), model.encode(TEXTS))


def test_the_constructor_takes_a_folder_as_from_pretrained_does(tiny_decoder, tmp_path):
    options = {"pooling_mode": "last_token", "template": "inst", "prompts": {"sts": "Compare:"}}
    LLM2Vec.from_pretrained(tiny_decoder, device="cpu", **options).save(tmp_path / "saved")
    loaded = LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu")
    built = LLM2Vec(str(tmp_path / "saved"), device="cpu")
    assert built.settings == loaded.settings
    close(built.encode(TEXTS, prompt_name="sts"), loaded.encode(TEXTS, prompt_name="sts"))
    assert LLM2Vec(tmp_path / "saved", pooling_mode="weighted_mean").pooling_mode == "weighted_mean"


def test_with_a_name_the_constructor_takes_settings_and_opens_the_mask(tiny_decoder, tmp_path):
    settings = Settings(pooling_mode="last_token", max_length=77, doc_max_length=None)
    built = LLM2Vec(str(tiny_decoder), max_length=66, settings=settings, device="cpu")
    assert built.settings == replace(settings, max_length=66)
    causal = LLM2Vec(tiny_decoder, enable_bidirectional=False, device="cpu")
    assert causal.report.verdict == "impossible"
    causal.save(tmp_path / "causal")
    assert LLM2Vec(tmp_path / "causal", device="cpu").report.verdict == "impossible"
    opened = LLM2Vec(tmp_path / "causal", enable_bidirectional=True, device="cpu")
    assert opened.report.verdict == "full"


def test_with_a_name_the_constructor_refuses_what_it_would_not_use(tiny_decoder, model):
    for name, value in {"tokenizer": model.tokenizer, "report": model.report}.items():
        with pytest.raises(ModelError, match=rf"^{name} was given .*Fix: leave {name} out"):
            LLM2Vec(tiny_decoder, device="cpu", **{name: value})


def test_arguments_by_name_take_precedence_over_the_settings(tiny_decoder):
    from transformers import AutoModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    decoder = AutoModel.from_pretrained(tiny_decoder)
    settings = Settings(max_length=50, doc_max_length=20)
    built = LLM2Vec(decoder, tokenizer, "last_token", settings=settings, device="cpu")
    assert built.settings == replace(settings, pooling_mode="last_token")


@pytest.mark.parametrize("value", [0, -1, True, "3", 2.5])
def test_the_length_of_a_text_that_is_set_is_a_number_of_tokens(tiny_decoder, value):
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", doc_max_length=9)
    with pytest.raises(ModelError, match="doc_max_length .* is not a number of tokens.*Fix"):
        model.doc_max_length = value
    assert model.doc_max_length == 9
    model.doc_max_length = None
    assert model.doc_max_length is None


def test_a_constructor_without_a_proof_opens_the_mask_on_request(tiny_decoder, model):
    from transformers import AutoModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    causal = AutoModel.from_pretrained(tiny_decoder)
    opened = LLM2Vec(causal, tokenizer, enable_bidirectional=True, device="cpu")
    close(opened.encode(TEXTS), model.encode(TEXTS))


# --- the guide --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_the_guide_names_every_flag(stage):
    flags = {o for a in parser(stage)._actions for o in a.option_strings if len(o) > 2}
    missing = {flag for flag in flags if f"`{flag}`" not in GUIDE} - {
        "--help", "--eval_strategy", "--max_steps",
    }  # fmt: skip
    assert not missing


def test_the_guide_names_every_call():
    members = [n for n in vars(LLM2Vec) if n[0] != "_" and not hasattr(TextEncoder, n)]
    assert "get_pooling" in members
    assert [name for name in members if not re.search(rf"\b{name}\b", GUIDE)] == []


def test_the_guides_flags_exist():
    named_flags = set(re.findall(r"`(--\w+)`", GUIDE))
    known = {o for s in ("mntp", "simcse") for a in parser(s)._actions for o in a.option_strings}
    passed_on = {"--fp16", "--bf16", "--optim", "--eval_accumulation_steps"}
    assert named_flags <= known | passed_on
