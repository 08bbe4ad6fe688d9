"""8-bit weights: near full precision, measured, apart from batches, and for encoding only."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from support.tiny import save_random
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import GPT2Config

from unmasked import LLM2Vec
from unmasked.corpus import Encoded, Encoding, Local, Shards, encode_folder
from unmasked.doctor import environment
from unmasked.errors import ModelError, OutputError
from unmasked.files.source import Source
from unmasked.forward.quantization import TEXTS, Linear8bit, check, quantize, to_8bit

LAYERS = 14  # of tiny_decoder: two blocks of q, k, v, o, gate, up and down
FULL = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def load(folder, name=None, device="cpu", dtype="auto"):
    return LLM2Vec.from_pretrained(folder, max_length=32, device=device, dtype=dtype, quantize=name)


@pytest.fixture(scope="module")
def full(tiny_decoder):
    return load(tiny_decoder)


@pytest.fixture(scope="module")
def int8(tiny_decoder):
    return load(tiny_decoder, "int8")


# --- the layer ------------------------------------------------------------------------------------


@FULL
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_a_layer_is_near_the_full_one(bias, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=bias).to(dtype)
    states = torch.randn(3, 5, 64).to(dtype)
    quantized = Linear8bit(layer)
    assert quantized.values.dtype.itemsize == 1
    found, expected = quantized(states), layer(states)
    assert found.shape == expected.shape and found.dtype == dtype
    difference = (found.float() - expected.float()).norm() / expected.float().norm()
    assert 0 < difference < 0.02


@FULL
def test_the_largest_number_of_a_row_is_the_largest_there_is(dtype):
    """Rounded up it would be the smallest int8."""
    rows = torch.linspace(1e-3, 1e3, 20001).to(dtype)[:, None] * torch.tensor([1, -1, 0.5])
    values = to_8bit(rows.to(dtype))[0].float()
    assert torch.equal(values[:, 0], torch.full((20001,), 127.0))
    assert torch.equal(values[:, 1], -values[:, 0])


def test_rows_do_not_see_each_other():
    torch.manual_seed(0)
    layer = Linear8bit(nn.Linear(64, 32))
    states = torch.randn(6, 64)
    states[2] *= 1e4
    states[4] = 0
    together = layer(states)
    for row in range(6):
        torch.testing.assert_close(layer(states[row]), together[row], atol=0, rtol=1e-6)
    torch.testing.assert_close(together[4], layer.bias.detach(), atol=4e-3, rtol=0)


# --- the model ------------------------------------------------------------------------------------


def test_what_it_says_of_the_vectors_is_what_they_do(full, int8):
    exact, close = (torch.from_numpy(model.encode(TEXTS)) for model in (full, int8))
    cosines = cosine_similarity(exact, close, dim=1)
    done = int8.quantization
    assert (done.name, done.layers, done.full) == ("int8", LAYERS, "float32")
    assert done.least_cosine == pytest.approx(float(cosines.min()), abs=1e-6)
    assert 0.98 < done.least_cosine < 0.99999
    assert full.quantization is None


def test_the_cosine_is_told_at_loading(tiny_decoder, caplog):
    with caplog.at_level(logging.WARNING):
        model = load(tiny_decoder, "int8")
    assert str(model.quantization) in caplog.text
    assert f"at least {model.quantization.least_cosine:.4f}" in caplog.text


def test_linear_layers_alone_are_quantized(int8):
    trunk = int8.backbone.auto_model
    kinds = {type(module).__name__ for module in trunk.modules()}
    assert "Linear8bit" in kinds and "Linear" not in kinds
    assert trunk.get_input_embeddings().weight.dtype == torch.float32
    assert not any(weight.requires_grad for weight in int8.parameters())


def test_a_quantized_batch_is_packed_and_apart_from_itself(int8, sentences):
    assert int8.backbone.unpackable is None
    together = int8.encode(sentences)
    alone = np.stack([int8.encode(text) for text in sentences])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    ids = int8.backbone.tokenize_inputs(sentences[:1])[0].ids
    with torch.no_grad():
        states = int8.backbone.auto_model(input_ids=torch.tensor([list(ids)])).last_hidden_state
    expected = states[0, 1:].mean(dim=0)  # without BOS
    np.testing.assert_allclose(together[0], expected.numpy(), atol=1e-4)


def test_a_quantized_model_has_a_fingerprint_of_its_own(full, int8, tiny_decoder):
    assert int8.fingerprint() == load(tiny_decoder, "int8").fingerprint() != full.fingerprint()


# --- refused --------------------------------------------------------------------------------------


def test_what_a_device_cannot_do_is_refused():
    with pytest.raises(ModelError, match="did you mean 'int8'.*Allowed: int8"):
        load("no-such-model", "in8")  # before anything is loaded
    with pytest.raises(ModelError, match="unknown quantize 'fp8'.*Allowed: int8"):
        load("no-such-model", "fp8")
    with pytest.raises(
        ModelError, match="int8 runs on CPUs only, and the model goes to cuda:1.*Fix"
    ):
        check("int8", torch.device("cuda", 1))


def test_a_quantized_model_is_neither_saved_nor_trained(int8, tmp_path):
    with pytest.raises(ModelError, match="int8 weights cannot be saved. Fix"):
        int8.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ModelError, match="int8 weights cannot be trained. Fix"):
        int8.train()
    assert not int8.training


def test_a_family_without_linear_layers_is_refused(tmp_path, tiny_tokenizer):
    config = GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=1, n_head=4)
    with pytest.raises(ModelError, match="GPT2Model has no linear layers"):
        load(save_random(tmp_path, config, tiny_tokenizer), "int8")


class ReadsWeights(nn.Module):
    """Multiplies with the weight of a layer by itself, as some mixers do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.device = torch.device("cpu")

    def encode(self, texts, **_):
        return torch.ones(len(texts), 32) @ self.layer.weight.T


def test_code_that_reads_weights_fails_in_words():
    model = ReadsWeights()
    with pytest.raises(ModelError, match="ReadsWeights does not run with 8-bit layers.*weight"):
        quantize(model, model, "int8")


def test_layers_of_odd_sides_stay():
    class Odd(ReadsWeights):
        def __init__(self):
            super().__init__()
            self.layer, self.even = nn.Linear(32, 24), nn.Linear(32, 16)

    model = Odd()
    done = quantize(model, model, "int8")
    assert (done.layers, type(model.layer), type(model.even)) == (1, nn.Linear, Linear8bit)


def test_a_cpu_that_gains_nothing_says_so(tiny_decoder, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with caplog.at_level(logging.WARNING):
        load(tiny_decoder, "int8")
    assert "no 8-bit products" in caplog.text
    assert environment()["cpu_int8"].startswith("no ")
    assert "matrix units" not in caplog.text
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    assert environment()["cpu_int8"] == "avx512_vnni"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_int8": 1, "amx_bf16": 1})
    with caplog.at_level(logging.WARNING):
        load(tiny_decoder, "int8")
    assert "matrix units" in caplog.text


# --- corpora --------------------------------------------------------------------------------------


class Elsewhere:
    """An engine that is not this process, as far as anyone can see."""

    needs_counts = False

    def __init__(self, model):
        self.engine = Local(lambda: model)
        self.ask, self.shards = self.engine.ask, self.engine.shards


def test_a_folder_says_of_what_weights_it_is(full, int8, sentences, tmp_path, caplog):
    texts, folder = tmp_path / "a.txt", tmp_path / "v"
    texts.write_text("\n".join(sentences))

    def make(engine, where=folder) -> Encoded:
        return encode_folder(engine, Source(str(texts)), where, Encoding(), Shards(rows=3))

    def settings(where) -> dict:
        return json.loads((where / "_manifest.jsonl").read_text().splitlines()[0])["settings"]

    make(Local(lambda: int8))
    assert settings(folder)["quantize"] == "int8"
    with pytest.raises(OutputError, match='quantize: "int8" there, null now'):
        make(Local(lambda: full))
    with caplog.at_level(logging.WARNING):
        make(Elsewhere(int8))
    assert str(int8.quantization) in caplog.text
    make(Local(lambda: full), tmp_path / "w")
    assert settings(tmp_path / "w")["quantize"] is None


def test_on_the_command_line(tiny_decoder, sentences, tmp_path, monkeypatch, caplog):
    from unmasked.cli import main

    (tmp_path / "a.txt").write_text("\n".join(sentences))
    command = f"unmasked encode {tiny_decoder} a.txt -o v.npy --quantize int8".split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", command)
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "int8 weights in 14 linear layers: cosine to float32 at least" in caplog.text
    expected = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", quantize="int8")
    np.testing.assert_allclose(np.load("v.npy"), expected.encode(sentences), atol=1e-6)
