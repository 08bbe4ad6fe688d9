"""Faults of earlier implementations that no other file has a test of; see `docs/faults.md`."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny
from support.vectors import close
from transformers import AutoModel, PreTrainedTokenizerFast

from unmasked import LLM2Vec
from unmasked.errors import ModelError, NotBidirectionalError
from unmasked.mask.opening import open_config
from unmasked.recipe.schema import Recipe
from unmasked.text.special_tokens import prepare_tokenizer
from unmasked.text.templates import named
from unmasked.text.tokens import TextTokenizer

ROOT = Path(__file__).parents[1]
TEXTS = ["one text", "another, longer one", "한국어 문장", ""]


@pytest.fixture(scope="module")
def model(tiny_decoder):
    return LLM2Vec.from_pretrained(tiny_decoder, device="cpu")


def test_b7_whether_the_suffix_is_pooled_is_saved_data(tiny_decoder, tmp_path):
    """Whether the template's suffix is pooled is saved in the folder; the text is not stripped."""
    template = asdict(named("inst"))
    pairs = [["Find:", "a text  "]]
    vectors = {}
    for pooled in (True, False):
        given = {**template, "pool_suffix": pooled}
        model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", template=given)
        row = model.backbone.tokenize_inputs(pairs)[0]
        decoded = model.tokenizer.decode(row.ids[row.start : row.stop])
        assert "a text  " in decoded
        assert "Find" not in decoded
        assert ("[/INST]" in decoded) is pooled
        model.save(tmp_path / str(pooled))
        saved = json.loads((tmp_path / str(pooled) / "llm2vec_config.json").read_text())
        assert saved["template"]["pool_suffix"] is pooled
        again = LLM2Vec.from_pretrained(tmp_path / str(pooled), device="cpu")
        close(again.encode(pairs), model.encode(pairs))
        vectors[pooled] = model.encode(pairs)
    assert np.abs(vectors[True] - vectors[False]).max() > 1e-3


def test_b13_a_tokenizer_that_emits_token_type_ids(tiny_decoder, tiny_tokenizer, model):
    """Only inputs that the model accepts reach it."""
    emitting = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    assert "token_type_ids" in emitting("a")
    config = open_config(AutoModel.from_pretrained(tiny_decoder).config)
    trunk = AutoModel.from_pretrained(tiny_decoder, config=config)
    close(LLM2Vec(trunk, emitting, device="cpu").encode(TEXTS), model.encode(TEXTS))


def test_b16_every_text_is_tokenised_once_and_options_act(model, monkeypatch):
    seen = []
    tokenise = TextTokenizer.__call__

    def spy(self, texts, *arguments, **options):
        seen.extend(texts)
        return tokenise(self, texts, *arguments, **options)

    monkeypatch.setattr(TextTokenizer, "__call__", spy)
    vectors = model.encode(TEXTS, normalize_embeddings=True, convert_to_numpy=True)
    assert sorted(seen) == sorted(TEXTS)
    close(np.linalg.norm(vectors, axis=1), np.ones(len(TEXTS)))
    assert isinstance(vectors, np.ndarray)


def test_b20_the_device_is_cuda_then_mps_then_cpu(monkeypatch, tiny_decoder):
    """By default a model goes to CUDA, then MPS, then the CPU; a device that is given is kept."""
    found, asked = {"cuda": False, "mps": False}, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: found["mps"])

    def pick(dtype, device, config):
        asked.append(device.type)
        raise ModelError("far enough")

    monkeypatch.setattr("unmasked.model.pick", pick)
    monkeypatch.setattr("unmasked.model.on_device", torch.device)  # this torch has neither
    for device, more in ((None, {}), (None, {"mps": True}), (None, {"cuda": True}), ("cpu", {})):
        found |= more
        with pytest.raises(ModelError, match="far enough"):
            LLM2Vec.from_pretrained(tiny_decoder, device=device)
    assert asked == ["cpu", "mps", "cuda", "cpu"]


def test_b23_backends_agree_on_windows(tiny_tokenizer):
    """A window of 4 has the same effect under eager and sdpa, with padding and without."""
    config = open_config(tiny.config("mistral"))
    texts = ["a long enough sentence for the window", "short", "another one of middle length"]
    vectors = {}
    for attention in ("eager", "sdpa"):
        trunk = tiny.model(config, attention)
        model = LLM2Vec(trunk, tiny_tokenizer, device="cpu")
        vectors[attention] = model.encode(texts)
        close(np.stack([model.encode(text) for text in texts]), vectors[attention], 1e-4)
    close(vectors["eager"], vectors["sdpa"], 1e-4)
    wide = LLM2Vec(
        tiny.model(open_config(tiny.config("mistral", sliding_window=64))), tiny_tokenizer,
        device="cpu",
    )  # fmt: skip
    assert np.abs(wide.encode(texts) - vectors["sdpa"]).max() > 1e-3


def test_b26_errors_name_what_was_given(tiny_mamba, tiny_decoder):
    with pytest.raises(NotBidirectionalError, match="mamba") as refused:
        LLM2Vec.from_pretrained(tiny_mamba, device="cpu")
    assert "llama" not in str(refused.value).lower().replace(str(tiny_mamba).lower(), "")
    with pytest.raises(ModelError, match=r"'maen', did you mean 'mean'\?.*Allowed: mean"):
        LLM2Vec.from_pretrained(tiny_decoder, device="cpu", pooling_mode="maen")


def test_b31_the_schedule_spans_what_it_says(tiny_decoder, tmp_path):
    """The rate decays over the steps by default, or over more steps on request, as in the paper."""
    from unmasked.train.run import Run

    (tmp_path / "texts.txt").write_text("\n".join(f"a text of words {i}" for i in range(60)))

    def last_rate(**schedule):
        stage = {
            "data": str(tmp_path / "texts.txt"), "steps": 4, "batch_size": 2, "block_length": 8,
            "held_out": 0, "log_steps": 1, "learning_rate": 1e-3, "lora": {"rank": 2}, **schedule,
        }  # fmt: skip
        content = {"name": "x", "model": {"base": str(tiny_decoder)}, "mntp": stage}
        folder = tmp_path / f"run{len(schedule)}"
        Run(Recipe.model_validate(content), folder).run()
        rows = [json.loads(line) for line in (folder / "mntp" / "metrics.jsonl").open()]
        return [row["learning_rate"] for row in rows if "learning_rate" in row][-1]

    assert last_rate() == pytest.approx(1e-3 / 4)
    assert last_rate(schedule_steps=100) == pytest.approx(1e-3 * 97 / 100)


def test_b44_words_are_encoded_without_dropout_on_any_device(tiny_decoder):
    """Words are encoded without dropout; the original's word test never left train mode."""
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    first, second = (model.encode_words([["Anna", "in", "Oslo"]])[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert model.training


def test_b45_without_bos_no_word_and_no_label_is_lost(tiny_decoder, tiny_tokenizer):
    """Without BOS the first word keeps its own state, so that no word or label is lost."""
    from tokenizers import processors

    backend = tiny_tokenizer.backend_tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel()
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    config = open_config(AutoModel.from_pretrained(tiny_decoder).config)
    trunk = AutoModel.from_pretrained(tiny_decoder, config=config)
    model = LLM2Vec(trunk, bare, device="cpu")
    words = ["x", "y", "z"]
    own, before = (model.encode_words([words], previous=p)[0] for p in (False, True))
    assert len(own) == len(before) == len(words)
    np.testing.assert_array_equal(before[0], own[0])


def test_b46_entity_f1_stands_beside_token_accuracy(model, tmp_path):
    """Entity F1 is reported too; the original called token accuracy, ``O`` included, precision."""
    from unmasked.evaluate.tasks.probe import load_probe

    rows = "Anna\tB-PER\nin\tO\nOslo\tB-LOC\n"
    for name in ("x_train.tsv", "x_dev.tsv"):
        (tmp_path / name).write_text("\n".join([rows] * 12), encoding="utf-8")
    scores = load_probe(tmp_path / "x_dev.tsv").score(model).scores
    assert any(name.endswith("f1") for name in scores)
    assert any(name.endswith("accuracy") for name in scores)


def test_b51_no_space_is_added_without_an_instruction(model):
    ids = model.tokenizer("text")["input_ids"]
    for inputs in (["text"], [["", "text"]]):
        assert model.backbone.tokenize_inputs(inputs)[0].ids == ids


def test_b54_truncation_overwrites_nothing_and_eos_is_the_tokenizers(tiny_tokenizer):
    """Unlike in LLM2Vec-Gen, truncation overwrites no token and keeps the tokenizer's EOS."""
    for eos in ("</s>", "!"):
        backend = tiny_tokenizer.backend_tokenizer
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token=eos
        )
        prepared = prepare_tokenizer(tokenizer, append_eos=True)
        whole = TextTokenizer(prepared, 4096)(["word " * 40])[0].ids
        cut = TextTokenizer(prepared, 16)(["word " * 40])[0].ids
        assert len(cut) == 16
        assert cut[:-1] == whole[:15]
        assert cut[-1] == whole[-1] == tokenizer.convert_tokens_to_ids(eos)


# --- docs/faults.md -----------------------------------------------------------------------------


def faults_script():
    spec = importlib.util.spec_from_file_location("faults", ROOT / "scripts" / "faults.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_fault_has_a_test():
    held = faults_script().collect(ROOT / "tests")
    assert [f"B{n}" for n in range(1, 55) if n not in held] == []


def test_the_page_of_faults_is_current():
    script = faults_script()
    written = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert written == script.page(script.collect(ROOT / "tests")), "run: python scripts/faults.py"
