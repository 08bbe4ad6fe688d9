"""The doctor on models with and without weights, and what it is built on."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from support import tiny, zoo
from transformers import AutoModel

from unmasked.doctor import environment, examine, lines
from unmasked.doctor.miniature import miniature
from unmasked.doctor.requirements import requirements
from unmasked.doctor.tokenizer import SAMPLES, describe
from unmasked.errors import ModelError
from unmasked.mask.opening import open_config
from unmasked.mask.proof import Proof
from unmasked.text.special_tokens import prepare_tokenizer
from unmasked.text.tokens import TextTokenizer


@pytest.fixture
def config_only(tiny_tokenizer, tmp_path):
    """Folders with config and tokenizer, and no weights, as on a hub that is not read further."""

    def make(family, **fields):
        tiny.config(family, vocab_size=400, **fields).save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return make


def test_the_shape_of_a_config_is_examined_without_weights(config_only):
    found = examine(config_only("mistral", sliding_window=4096, num_hidden_layers=6), load=False)
    assert found["examined"].startswith("the shape")
    assert (found["verdict"], found["bidirectional"], found["causal_layers"]) == ("full", True, [])
    assert (found["layers"], found["width"], found["sliding_window"]) == (6, 64, 4096)
    assert found["attention"] == "sdpa"
    assert found["packed"].startswith("yes")
    assert found["engine"] == {
        "sentence_transformers": "yes, proved",
        "mask": "must read is_causal: false in config.json; "
        f"sliding layers see {found['window_to_each_side']} tokens to each side",
        "pooling": "must pool by mean and leave out <s> and the prompt",
    }
    assert found["bos_added"] == ["<s>"]
    assert found["prompt_ending_in"]["space"].startswith("UNSTABLE")
    assert "of weights" in found["memory_to_encode"]
    assert "MNTP" in found["memory_to_train"]
    assert ("layers", "6") in lines(found)


def test_the_shape_names_the_layers_of_the_whole_model(config_only):
    types = ["conv", "conv", "full_attention", "conv"]
    found = examine(config_only("lfm2", layer_types=types, num_hidden_layers=4), load=False)
    assert found["verdict"] == "partial"
    assert found["causal_layers"] == ["0 (conv)", "1 (conv)", "3 (conv)"]
    assert found["engine"]["mask"].endswith("; the causal layers stay causal")


def test_the_shape_of_a_model_that_stays_causal(config_only):
    found = examine(config_only("mamba"), load=False)
    assert found["bidirectional"] is False
    assert found["engine"] == {"sentence_transformers": "no: the mask stays"}


def test_the_shape_counts_the_weights_of_the_whole_model(config_only):
    path = config_only("llama")
    with torch.device("meta"):
        whole = AutoModel.from_config(tiny.config("llama", vocab_size=400))
    assert examine(path, load=False)["parameters"] == sum(p.numel() for p in whole.parameters())


def test_weights_that_are_not_there_cannot_be_loaded(config_only):
    with pytest.raises(ModelError):
        examine(config_only("llama"))


@pytest.fixture
def asked(tiny_tokenizer):
    """What the folder of a proved model asks of a program."""

    def make(family, stock="same", pooling="mean", skip_instruction=True, **fields):
        config = tiny.config(family)
        for name, value in fields.items():
            setattr(config, name, value)
        prepared = prepare_tokenizer(tiny_tokenizer)
        tokens = TextTokenizer(prepared, skip_instruction=skip_instruction)
        report = Proof("full", "", (), 2, 0.0, "sdpa", family)
        return requirements(report, open_config(config), stock, tokens, pooling)

    return make


@pytest.mark.parametrize(
    ("family", "stock", "loads", "mask"),
    [
        ("llama", "same", "yes, proved", "is_causal: false"),
        ("stablelm", "eager", "yes, proved; the saved config names eager", "is_causal: false"),
        ("gemma3", "same", "yes, proved", "use_bidirectional_attention: true"),
        ("gemma4", "same", "yes, proved", 'is_causal: false or use_bidirectional_attention: "all"'),
        ("gpt_neo", "causal", "no: only unmasked", None),
    ],
)
def test_who_opens_the_mask_and_by_which_key(asked, family, stock, loads, mask):
    found = asked(family, stock)
    assert found["sentence_transformers"].startswith(loads)
    assert found.get("mask") == (mask and f"must read {mask} in config.json")


def test_the_scaling_of_rotary_positions_is_asked_for(asked):
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5}
    assert "positions" not in asked("llama")
    assert asked("llama", rope_parameters=llama3)["positions"].endswith("positions by llama3")
    kinds = {"full_attention": llama3, "sliding_attention": {"rope_type": "default"}}
    assert asked("llama", rope_parameters=kinds)["positions"].endswith("positions by llama3")


def test_what_is_left_out_of_pooling_is_asked_for(asked):
    assert asked("llama")["pooling"] == "must pool by mean and leave out <s> and the prompt"
    assert asked("llama", skip_instruction=False)["pooling"] == "must pool by mean"
    assert asked("llama", pooling="last_token")["pooling"] == "must pool by last_token"


def test_a_miniature_keeps_depth_and_kinds_of_layers():
    from transformers import Gemma3TextConfig, LlamaConfig

    small = miniature(LlamaConfig(num_hidden_layers=12))
    assert (small.num_hidden_layers, small.hidden_size, small.num_key_value_heads) == (12, 64, 4)
    kinds = Gemma3TextConfig(num_hidden_layers=12).layer_types
    assert miniature(Gemma3TextConfig(num_hidden_layers=12)).layer_types == kinds
    assert set(zoo.config("gemma3_text").layer_types) == set(kinds)


def test_the_environment_says_what_is_missing_for_what():
    found = environment()
    assert found["torch"] == version("torch")
    assert any(device.startswith("cpu ") for device in found["devices"])


@pytest.mark.parametrize(
    ("has", "said"), [({"sve_bf16": True}, "sve_bf16"), ({"avx2": True}, "no (slow")]
)
def test_the_environment_says_whether_bfloat16_is_in_hardware(monkeypatch, has, said):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert environment()["cpu_bfloat16"].startswith(said)


def test_a_tokenizer_that_knows_no_korean_is_seen_before_the_training(tiny_tokenizer):
    def told(tokenizer):
        tokens = TextTokenizer(prepare_tokenizer(tokenizer), 512)
        return describe(tokens, {})["tokens_per_character"]

    korean = SAMPLES["Korean"]
    count = len(tiny_tokenizer(korean, add_special_tokens=False)["input_ids"])
    assert count > len(korean), "it falls back on bytes, three for a syllable"
    said = told(tiny_tokenizer)["Korean"]
    assert said.startswith(
        f"{count / len(korean):.2f} ({count} tokens of {len(korean)} characters)"
    )
    assert "POOR, letters are split; a base that was trained on Korean takes fewer" in said

    trained = tiny_tokenizer.train_new_from_iterator(SAMPLES.values(), 600, show_progress=False)
    for language, said in told(trained).items():
        assert float(said.split()[0]) < 0.6 and "POOR" not in said, language
