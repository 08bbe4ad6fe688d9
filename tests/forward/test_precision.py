"""Precision: what the hardware is good at, never less than asked, and why."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from unmasked import LLM2Vec
from unmasked.errors import ModelError
from unmasked.forward import precision

CPU = torch.device("cpu")
WIDE = LlamaConfig(hidden_size=256, num_attention_heads=4)
NARROW = LlamaConfig(hidden_size=192, num_attention_heads=4)


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16"])
def test_a_wide_model_is_bfloat16_where_the_cpu_has_it(monkeypatch, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, name: True})
    chosen = precision.pick("auto", CPU, WIDE)
    assert chosen.dtype == torch.bfloat16
    assert name in chosen.reason
    assert precision.pick("auto", CPU, NARROW).dtype == torch.float32
    assert precision.pick("auto", CPU).dtype == torch.float32  # training


def test_float32_elsewhere(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False})
    chosen = precision.pick("auto", CPU, WIDE)
    assert chosen.dtype == torch.float32
    assert "no bfloat16" in chosen.reason


def test_checkpoint_is_never_less_than_the_checkpoint_has(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    whole = LlamaConfig(hidden_size=576, num_attention_heads=9, dtype=torch.float32)
    half = LlamaConfig(hidden_size=576, num_attention_heads=9, dtype=torch.bfloat16)
    assert precision.pick("checkpoint", CPU, whole).dtype == torch.float32
    assert precision.pick("checkpoint", CPU, half).dtype == torch.bfloat16
    assert precision.pick("auto", CPU, whole).dtype == torch.bfloat16


def test_float16_on_a_cpu_and_unknown_names_are_refused():
    with pytest.raises(ModelError, match="Fix: choose dtype auto"):
        precision.pick("float16", CPU, WIDE)
    with pytest.raises(ModelError, match="did you mean 'bfloat16'"):
        precision.pick("bfloat", CPU, WIDE)


def test_an_encoder_says_why(tiny_decoder):
    model = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    assert model.precision is not None
    assert model.precision.dtype == model.dtype == torch.float32
    reason = "fast enough in float32" if precision.bfloat16_instructions() else "no bfloat16"
    assert reason in model.precision.reason
