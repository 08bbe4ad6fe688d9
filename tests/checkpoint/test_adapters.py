"""Adapters of every kind become part of the weights, whole, or are refused with the cause."""

from __future__ import annotations

import json

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from support.vectors import close
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from unmasked import LLM2Vec
from unmasked.checkpoint.adapters import attach, save_adapter
from unmasked.errors import ModelError

TEXTS = ["a cat on a mat", "한국어 문장", "one two three"]
LINEAR = ["q_proj", "v_proj"]
LORA = {"r": 4, "target_modules": LINEAR}
IA3 = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
KINDS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "rslora": LoraConfig(**LORA, use_rslora=True),
    "patterns": LoraConfig(**LORA, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 3}),
    "embeddings": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "modules_to_save": LoraConfig(**LORA, modules_to_save=["norm"]),
    "trained_tokens": LoraConfig(**LORA, trainable_token_indices=[5, 6]),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=LINEAR),
    "ia3": IA3Config(**IA3),
    "loha": LoHaConfig(**LORA),
    "lokr": LoKrConfig(**LORA),
    "oft": OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR),
    "vera": VeraConfig(r=4, target_modules=["q_proj"]),
}


def made(folder, base, config, cls=AutoModel, before=lambda model: None):
    """A trained adapter of a base, saved by PEFT."""
    torch.manual_seed(1)
    model = cls.from_pretrained(base, dtype=torch.float32)
    before(model)
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for weight in peft_model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    peft_model.save_pretrained(str(folder))
    return peft_model


def load(base, adapter):
    return LLM2Vec.from_pretrained(base, str(adapter), device="cpu", dtype="float32")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_merged_as_peft_runs_it(tiny_decoder, tmp_path, kind):
    peft_model = made(tmp_path / "adapter", tiny_decoder, KINDS[kind])
    ids = torch.arange(5, 15)[None]
    plain = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", enable_bidirectional=False)
    merged = LLM2Vec.from_pretrained(
        tiny_decoder, str(tmp_path / "adapter"), device="cpu", enable_bidirectional=False
    )
    with torch.no_grad():
        wanted = peft_model.eval()(input_ids=ids).last_hidden_state
        states = merged.model(input_ids=ids).last_hidden_state
        before = plain.model(input_ids=ids).last_hidden_state
    assert (wanted - before).abs().max() > 1e-3
    close(states, wanted, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_missing_is_named(tiny_decoder, tmp_path, kind):
    made(tmp_path / "adapter", tiny_decoder, KINDS[kind])
    place = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(place)
    name = sorted(weights)[-1]
    del weights[name]
    save_file(weights, place)
    with pytest.raises(ModelError, match=r"1 weights missing \(" + name.replace(".", r"\.")):
        load(tiny_decoder, tmp_path / "adapter")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tiny_decoder, tmp_path, value):
    made(tmp_path / "adapter", tiny_decoder, KINDS["lora"])
    place = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(place)
    next(iter(weights.values())).view(-1)[0] = value
    save_file(weights, place)
    with pytest.raises(ModelError, match=r"1 weights hold NaN or infinity \(base_model"):
        load(tiny_decoder, tmp_path / "adapter")


def test_one_that_was_trained_on_the_causal_model_loads(tiny_decoder, tmp_path):
    config = LoraConfig(**LORA, task_type="CAUSAL_LM")
    made(tmp_path / "causal", tiny_decoder, config, AutoModelForCausalLM)
    made(tmp_path / "bare", tiny_decoder, LoraConfig(**LORA))
    causal = load(tiny_decoder, tmp_path / "causal").encode(TEXTS)
    close(causal, load(tiny_decoder, tmp_path / "bare").encode(TEXTS))


CAUSAL = {"r": 4, "task_type": "CAUSAL_LM"}
NAMED_IN_FULL = {
    "all-linear": LoraConfig(target_modules="all-linear", **CAUSAL),
    "a pattern": LoraConfig(target_modules=r"model\.layers\.\d+\.self_attn\.(q|v)_proj", **CAUSAL),
    "a pattern without": LoraConfig(target_modules=r"^(model)(?!.*lm_head).*proj$", **CAUSAL),
    "names": LoraConfig(target_modules=["model.layers.1.mlp.up_proj"], **CAUSAL),
    "all but": LoraConfig(
        target_modules="all-linear", exclude_modules=["model.layers.0.self_attn.q_proj"], **CAUSAL
    ),
    "one layer": LoraConfig(target_modules=LINEAR, layers_to_transform=[1], **CAUSAL),
    "ranks": LoraConfig(
        target_modules=LINEAR, rank_pattern={"model.layers.0.self_attn.q_proj": 8}, **CAUSAL
    ),
    "scales": LoraConfig(
        target_modules=LINEAR, alpha_pattern={"model.layers.1.self_attn.v_proj": 32}, **CAUSAL
    ),
}


@pytest.mark.parametrize("name", NAMED_IN_FULL)
def test_one_of_the_causal_model_that_names_its_layers_in_full_loads(tiny_decoder, tmp_path, name):
    made(tmp_path / "adapter", tiny_decoder, NAMED_IN_FULL[name], AutoModelForCausalLM)
    found = load(tiny_decoder, tmp_path / "adapter").encode(TEXTS)
    whole = AutoModelForCausalLM.from_pretrained(tiny_decoder, dtype=torch.float32)
    whole = PeftModel.from_pretrained(whole, str(tmp_path / "adapter")).merge_and_unload()
    whole.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny_decoder).save_pretrained(tmp_path / "merged")
    close(found, LLM2Vec.from_pretrained(tmp_path / "merged", device="cpu").encode(TEXTS), 1e-4)
    assert (
        abs(found - LLM2Vec.from_pretrained(tiny_decoder, device="cpu").encode(TEXTS)).max() > 0.01
    )


HEAD = LoraConfig(**LORA, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
HEAD_LORA = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
NEW = LoraConfig(**LORA, modules_to_save=["embed_tokens"])


@pytest.mark.parametrize(
    ("config", "cls", "tokens", "said"),
    [
        (HEAD, AutoModelForCausalLM, 0, "changes that too"),
        (HEAD_LORA, AutoModelForCausalLM, 0, "changes that too"),
        (NEW, AutoModel, 8, "resized vocabulary"),
        (LoraConfig(**LORA, lora_bias=True), AutoModel, 0, "cannot be merged into the weights"),
        (
            PromptTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION"),
            AutoModel, 0, "PROMPT_TUNING: it puts trained tokens",
        ),
    ],
    ids=["head-saved", "head-adapted", "new-tokens", "bias", "prompt-tuning"],
)  # fmt: skip
def test_one_that_cannot_be_merged_says_why(tiny_decoder, tmp_path, config, cls, tokens, said):
    def more(model):
        if tokens:
            model.resize_token_embeddings(model.config.vocab_size + tokens)

    made(tmp_path / "adapter", tiny_decoder, config, cls, more)
    with pytest.raises(ModelError, match=said):
        load(tiny_decoder, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("adapter_config.json", b"{", "is not JSON"),
        ("adapter_config.json", b"[]", "not a JSON object"),
        ("adapter_config.json", b'{"peft_type": "NEW"}', "by this version of PEFT"),
        ("adapter_config.json", b"{}", "names no peft_type"),
        ("adapter_model.safetensors", b"", "is broken"),
        ("adapter_model.safetensors", b"\x10\x00", "is broken"),
    ],
)
def test_broken_files_are_named(tiny_decoder, tmp_path, name, content, said):
    made(tmp_path / "adapter", tiny_decoder, KINDS["lora"])
    (tmp_path / "adapter" / name).write_bytes(content)
    with pytest.raises(ModelError, match=said):
        load(tiny_decoder, tmp_path / "adapter")


def test_an_adapter_may_be_read_by_others(tiny_decoder, tmp_path):
    model = attach(AutoModel.from_pretrained(tiny_decoder))
    save_adapter(model, tmp_path / "adapter")
    modes = {path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}
    assert len(modes) == 1


# --- attached -----------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_decoder):
    return LLM2Vec.from_pretrained(tiny_decoder, device="cpu", dtype="float32")


def test_adapters_of_sentence_transformers_are_saved_as_they_act(model, tiny_decoder, tmp_path):
    plain = model.encode(TEXTS)
    model.add_adapter(LoraConfig(**LORA, init_lora_weights=False))
    adapted = model.encode(TEXTS)
    assert abs(adapted - plain).max() > 1e-3
    model.save(tmp_path / "on")
    close(model.encode(TEXTS), adapted)  # saving changes nothing
    model.disable_adapters()
    model.save(tmp_path / "off")
    model.enable_adapters()
    close(model.encode(TEXTS), adapted)
    for folder, wanted in (("on", adapted), ("off", plain)):
        assert not (tmp_path / folder / "adapter_config.json").exists()
        close(LLM2Vec.from_pretrained(tmp_path / folder, device="cpu").encode(TEXTS), wanted)
        stock = SentenceTransformer(str(tmp_path / folder), device="cpu")
        close(stock.encode(TEXTS), wanted)


def test_a_loaded_adapter_and_one_of_two_are_saved(model, tiny_decoder, tmp_path):
    made(tmp_path / "adapter", tiny_decoder, KINDS["lora"])
    model.load_adapter(str(tmp_path / "adapter"), adapter_name="first")
    close(model.encode(TEXTS), load(tiny_decoder, tmp_path / "adapter").encode(TEXTS))
    first = model.encode(TEXTS)
    model.add_adapter(LoraConfig(**LORA, init_lora_weights=False), adapter_name="second")
    model.set_adapter("first")
    close(model.encode(TEXTS), first)
    model.save(tmp_path / "saved")
    close(LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu").encode(TEXTS), first)


def test_a_peft_model_is_saved_as_it_acts(model, tiny_decoder, tmp_path):
    trunk = get_peft_model(model.model, LoraConfig(**LORA, init_lora_weights=False))
    encoder = LLM2Vec(trunk, model.tokenizer, device="cpu")
    adapted = encoder.encode(TEXTS)
    encoder.save(tmp_path / "on")
    with trunk.disable_adapter():
        plain = encoder.encode(TEXTS)
        encoder.save(tmp_path / "off")
    trunk.merge_adapter()
    encoder.save(tmp_path / "merged")
    assert abs(adapted - plain).max() > 1e-3
    for folder, wanted in (("on", adapted), ("off", plain), ("merged", adapted)):
        close(LLM2Vec.from_pretrained(tmp_path / folder, device="cpu").encode(TEXTS), wanted)
    close(encoder.encode(TEXTS), adapted)


def test_a_saved_folder_loads_below_an_attached_adapter(model, tmp_path):
    """So the trainer of sentence-transformers goes back to its best checkpoint."""
    model.add_adapter(LoraConfig(**LORA, init_lora_weights=False))
    best = model.encode(TEXTS)
    model.save(tmp_path / "best")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3)
    model.load_state_dict(type(model)(str(tmp_path / "best"), device="cpu").state_dict())
    close(model.encode(TEXTS), best)


def test_a_base_of_an_adapter_keeps_its_settings(tiny_decoder, tmp_path):
    base = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", pooling_mode="last_token")
    base.prompts["query"] = "Ask:\n"
    base.save(tmp_path / "base")
    made(tmp_path / "adapter", tmp_path / "base", LoraConfig(**LORA))
    config = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    config.write_text(json.dumps(said))
    loaded = LLM2Vec.from_pretrained(tmp_path / "adapter", device="cpu")
    assert loaded.settings.pooling_mode == "last_token"
    assert loaded.prompts["query"] == "Ask:\n"
