"""A fingerprint is the same for the same model alone, whatever its weights are packed in."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from functools import partialmethod

import pytest
import torch
from sentence_transformers.base.modules import Normalize
from support import zoo
from torch import nn

from unmasked import LLM2Vec
from unmasked.checkpoint.fingerprint import fingerprint


@pytest.fixture(scope="module")
def model(tiny_decoder):
    return LLM2Vec.from_pretrained(tiny_decoder, device="cpu")


def test_another_model_is_told_apart(model, tiny_decoder):
    assert model.fingerprint() == LLM2Vec.from_pretrained(tiny_decoder, device="cpu").fingerprint()
    for option in ({"pooling_mode": "last_token"}, {"max_length": 64}, {"dtype": "bfloat16"}):
        other = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", **option)
        assert other.fingerprint() != model.fingerprint()
    changed = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    changed.backbone.auto_model.norm.weight.data += 0.1
    assert changed.fingerprint() != model.fingerprint()


def test_what_decides_vectors_without_a_weight_of_its_own_counts(tiny_decoder, tmp_path):
    """The mask, the modules behind the pooling, the limits of queries and documents."""
    encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    causal = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", enable_bidirectional=False)
    found = [encoder.fingerprint(), causal.fingerprint()]
    encoder.backbone.document_length = 7
    found.append(encoder.fingerprint())
    encoder.append(Normalize())
    found.append(encoder.fingerprint())
    encoder.truncate_dim = 8
    found.append(encoder.fingerprint())
    assert len(set(found)) == 5
    encoder.save(tmp_path / "saved")
    again = LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.fingerprint() == encoder.fingerprint()


@pytest.mark.parametrize(
    "edited",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"rms_norm_eps": 0.1},
        {"hidden_act": "gelu"},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    ],
    ids=lambda edited: "-".join(edited),
)
def test_another_config_with_the_same_weights_is_another_model(
    model, tiny_decoder, tmp_path, edited
):
    shutil.copytree(tiny_decoder, tmp_path / "edited")
    config = json.loads((tmp_path / "edited" / "config.json").read_text())
    (tmp_path / "edited" / "config.json").write_text(json.dumps(config | edited))
    other = LLM2Vec.from_pretrained(tmp_path / "edited", device="cpu")
    assert all(
        torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items()
    )
    assert other.fingerprint() != model.fingerprint()
    other.save(tmp_path / "saved")
    again = LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.fingerprint() == other.fingerprint()


@pytest.mark.parametrize("family", ["gemma3_text", "gemma3n_text", "mistral", "opt", "gpt_neox"])
def test_a_saved_folder_has_it_in_every_family(family, tiny_tokenizer, tmp_path):
    """Some families change their config as they build it with the mask open."""
    zoo.build(zoo.config(family)).save_pretrained(tmp_path / "decoder")
    tiny_tokenizer.save_pretrained(tmp_path / "decoder")
    encoder = LLM2Vec.from_pretrained(tmp_path / "decoder", device="cpu")
    encoder.save(tmp_path / "saved")
    again = LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.fingerprint() == encoder.fingerprint()


def test_encoding_leaves_it_as_it_is(model):
    before = model.fingerprint()
    model.encode(["a text", "a longer text, to be padded"])
    assert model.fingerprint() == before


def of_state(model, **entries):
    """The fingerprint of a model with a state dict of its own."""
    return fingerprint(entries, model.tokenizer, ["settings"])


def test_tokenizer_and_settings_count_and_the_state_of_a_tokenizer_does_not(model, tiny_tokenizer):
    state, plain = {"a": torch.ones(2)}, copy.deepcopy(tiny_tokenizer)
    plain.pad_token = plain.eos_token
    before = fingerprint(state, plain, [1])
    plain(["a text", "a longer text"], padding=True, truncation=True, max_length=3)
    assert fingerprint(state, plain, [1]) == before
    assert len({before, fingerprint(state, plain, [2]), of_state(model, **state)}) == 3
    plain.add_tokens(["<new>"])
    assert fingerprint(state, plain, [1]) != before


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_packed_weights_count_by_their_values(model):
    layer = nn.Linear(8, 4)

    def packed():
        layers = nn.Sequential(layer)
        return torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}).state_dict()

    first = packed()
    assert any(isinstance(value, tuple) for value in first.values())
    assert of_state(model, **first) == of_state(model, **packed())
    with torch.no_grad():
        layer.weight[3, 3] += 1
    assert of_state(model, **first) != of_state(model, **packed())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int64, torch.bool])
def test_every_type_of_number_counts(model, dtype):
    ones, zeros = torch.ones(3, 4).to(dtype), torch.zeros(3, 4).to(dtype)
    assert of_state(model, a=ones) == of_state(model, a=ones.clone())
    assert len({of_state(model, a=ones), of_state(model, a=zeros), of_state(model, b=ones)}) == 3
    assert of_state(model, a=ones) != of_state(model, a=ones.reshape(4, 3))


class Scaled(torch.Tensor):
    """Weights kept as whole numbers and a scale, as quantizing libraries keep them."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        raise NotImplementedError(f"{function} of packed weights")


def test_a_tensor_made_of_others_counts_by_them(model):
    numbers = torch.arange(12, dtype=torch.int8).reshape(3, 4)
    kept = of_state(model, a=Scaled(numbers, torch.ones(3)))
    assert kept == of_state(model, a=Scaled(numbers.clone(), torch.ones(3)))
    assert kept != of_state(model, a=Scaled(numbers + 1, torch.ones(3)))
    assert kept != of_state(model, a=Scaled(numbers, torch.full((3,), 2.0)))


def test_what_is_no_tensor_is_the_same_in_every_process(model):
    class Opaque:
        """Shows its address, as most objects do."""

    first, second = Opaque(), Opaque()
    assert of_state(model, a=first) == of_state(model, a=second)
    assert of_state(model, a={"x": 1, "y": [2]}) == of_state(model, a={"y": [2], "x": 1})
    assert of_state(model, a={"x": 1}) != of_state(model, a={"x": 2})


def test_another_process_finds_the_same(model, tiny_decoder):
    code = (
        "from unmasked import LLM2Vec; "
        f"print(LLM2Vec.from_pretrained({str(tiny_decoder)!r}, device='cpu').fingerprint())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == model.fingerprint()


def test_a_key_that_a_release_adds_with_its_default_changes_nothing(model, monkeypatch):
    before = model.fingerprint()
    config = type(model.backbone.model.config)
    monkeypatch.setattr(config, "to_dict", partialmethod(_added, config.to_dict))
    assert model.fingerprint() == before
    monkeypatch.setattr(model.backbone.model.config, "added", 2, raising=False)
    assert model.fingerprint() != before


def _added(config, original):
    return {**original(config), "added": getattr(config, "added", 1)}
