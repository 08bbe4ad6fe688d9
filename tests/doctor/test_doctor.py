"""The doctor on models with and without weights, and what it is built on."""

from __future__ import annotations

import pytest
import torch
from support import tiny
from transformers import AutoModel

from unmasked.doctor import environment, examine, lines
from unmasked.doctor.engines import engines
from unmasked.doctor.miniature import miniature
from unmasked.errors import ModelError
from unmasked.mask.proof import Proof


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
    assert found["engine"]["sentence_transformers"] == "yes, proved"
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


def test_the_shape_of_a_model_that_stays_causal(config_only):
    found = examine(config_only("mamba"), load=False)
    assert found["bidirectional"] is False
    assert set(found["engine"].values()) == {"no: the mask stays"}


def test_the_shape_counts_the_weights_of_the_whole_model(config_only):
    path = config_only("llama")
    with torch.device("meta"):
        whole = AutoModel.from_config(tiny.config("llama", vocab_size=400))
    assert examine(path, load=False)["parameters"] == sum(p.numel() for p in whole.parameters())


def test_weights_that_are_not_there_cannot_be_loaded(config_only):
    with pytest.raises(ModelError):
        examine(config_only("llama"))


@pytest.mark.parametrize(
    ("family", "stock", "said"),
    [
        ("llama", "same", ("yes, proved", "mask yes", "mask yes")),
        ("stablelm", "eager", ("yes, proved; the saved config names eager", "no:", "no:")),
        ("gpt_neo", "causal", ("no: only unmasked", "no: only unmasked", "no: only unmasked")),
    ],
)
def test_engines(family, stock, said):
    report = Proof("full", "", (), 2, 0.0, "sdpa", family)
    found = engines(report, tiny.config(family), stock)
    names = ("sentence_transformers", "vllm", "tei")
    assert all(found[name].startswith(text) for name, text in zip(names, said, strict=True))


def test_llama3_scaling_is_lost_in_tei():
    config = tiny.config("llama")
    config.rope_parameters = {"rope_type": "llama3", "rope_theta": 5e5}
    report = Proof("full", "", (), 2, 0.0, "sdpa", "llama")
    assert engines(report, config, "same")["tei"].startswith("no: it loses llama3")


def test_a_miniature_keeps_depth_and_kinds_of_layers():
    from transformers import Gemma3TextConfig, LlamaConfig

    small = miniature(LlamaConfig(num_hidden_layers=12))
    assert (small.num_hidden_layers, small.hidden_size, small.num_key_value_heads) == (12, 64, 4)
    kinds = Gemma3TextConfig(num_hidden_layers=12).layer_types
    assert miniature(Gemma3TextConfig(num_hidden_layers=12)).layer_types == kinds
    assert set(miniature(Gemma3TextConfig(num_hidden_layers=12), 2).layer_types) == set(kinds)


def test_the_environment_says_what_is_missing_for_what():
    found = environment()
    assert found["torch"] == torch.__version__
    assert any(device.startswith("cpu ") for device in found["devices"])


@pytest.mark.parametrize(
    ("has", "said"), [({"sve_bf16": True}, "sve_bf16"), ({"avx2": True}, "no (slow")]
)
def test_the_environment_says_whether_bfloat16_is_in_hardware(monkeypatch, has, said):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert environment()["cpu_bfloat16"].startswith(said)
