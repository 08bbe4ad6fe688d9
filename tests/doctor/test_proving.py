"""`unmasked prove` and `unmasked.prove`: any model, as it is."""

from __future__ import annotations

import json

import pytest
import torch
from support import tiny

import unmasked
from unmasked.doctor.proving import LARGEST_FLOAT16


def test_a_decoder_is_proved_as_it_is_or_opened(tiny_decoder):
    assert unmasked.prove(tiny_decoder).proof.verdict == "impossible"
    assert unmasked.prove(tiny_decoder, open=True).proof.verdict == "full"


def test_models_in_memory_are_taken_and_left_as_they_are(tiny_decoder):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForCausalLM

    from unmasked import LLM2Vec

    head = AutoModelForCausalLM.from_pretrained(tiny_decoder)
    assert unmasked.prove(head).proof.verdict == "impossible"
    encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    before = encoder.encode("a text")
    assert unmasked.prove(encoder).proof.verdict == "full"
    assert (encoder.encode("a text") == before).all()
    stock = SentenceTransformer(str(tiny_decoder), device="cpu")
    assert unmasked.prove(stock).proof.verdict == "impossible"


def test_the_largest_number_of_each_layer_is_found():
    model = tiny.model("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight *= 1e5
    found = unmasked.prove(model)
    layers = {peak.layer: peak for peak in found.peaks if peak.layer.startswith("layers.")}
    assert [*layers] == ["layers.0", "layers.1", "layers.2"]
    assert layers["layers.0"].largest < 100 < 1e4 < layers["layers.1"].largest
    assert layers["layers.1"].module in ("", "mlp", "mlp.down_proj")
    assert found.highest.largest == max(peak.largest for peak in found.peaks)
    assert found.float16_overflows is (found.highest.largest > LARGEST_FLOAT16) is True
    assert unmasked.prove(tiny.model("llama")).float16_overflows is False


def test_a_model_that_is_not_finite_overflows():
    model = tiny.model("llama")
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    found = unmasked.prove(model)
    assert found.float16_overflows is True
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["peaks"][-1]["largest"] is None


def test_a_forward_that_fails_has_no_peaks():
    model = tiny.model("llama")
    model.layers[0].mlp.forward = None
    found = unmasked.prove(model)
    assert (found.proof.verdict, found.peaks, found.float16_overflows) == ("impossible", (), None)


@pytest.mark.parametrize(("options", "code"), [([], 2), (["--open"], 0)])
def test_the_exit_code_says_whether_it_is_proved(cli, tiny_decoder, options, code):
    ended, out, _ = cli("prove", tiny_decoder, "--json", *options)
    found = json.loads(out)
    assert ended == code
    assert found["verdict"] == ("impossible" if code else "full")
    assert {peak["layer"] for peak in found["peaks"]} >= {"layers.0", "layers.1", "norm"}
    ended, out, _ = cli("prove", tiny_decoder, *options)
    assert ended == code
    assert "float16 (largest number 65504): is wide enough" in out


def test_partly_causal_models_pass_only_if_that_is_accepted(cli, tmp_path, tiny_tokenizer):
    config = tiny.config("lfm2", vocab_size=len(tiny_tokenizer))
    tiny.save_random(tmp_path / "hybrid", config, tiny_tokenizer)
    verdict = unmasked.prove(tmp_path / "hybrid", open=True).proof.verdict
    assert verdict == "partial"
    assert cli("prove", "hybrid", "--open")[0] == 2
    assert cli("prove", "hybrid", "--open", "--allow-partial")[0] == 0
