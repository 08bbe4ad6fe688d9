"""Checkpoints with something wrong in their weights are refused, and never filled at random."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from transformers import AutoModelForCausalLM

from unmasked import LLM2Vec
from unmasked.errors import ModelError

NAME = "model.safetensors"


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    """A decoder with a head of its own, as most checkpoints have."""
    model = AutoModelForCausalLM.from_config(tiny.config("llama"))
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def _rewrite(folder, change):
    weights = load_file(folder / NAME)
    save_file(change(weights), folder / NAME, metadata={"format": "pt"})


def test_a_checkpoint_that_lacks_a_layer_is_refused(folder):
    assert LLM2Vec.from_pretrained(folder).report.verdict == "full"
    _rewrite(folder, lambda w: {k: v for k, v in w.items() if "layers.1." not in k})
    with pytest.raises(ModelError, match=r"lacks \d+ weights .*layers\.1\..* would be random"):
        LLM2Vec.from_pretrained(folder)


def test_a_checkpoint_under_other_names_is_refused(folder):
    _rewrite(folder, lambda w: {f"base_model.{k}.weight": v for k, v in w.items()})
    with pytest.raises(ModelError, match="would be random"):
        LLM2Vec.from_pretrained(folder)


def test_a_pooler_behind_the_last_states_may_be_missing(tmp_path, tiny_tokenizer):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert LLM2Vec.from_pretrained(tmp_path).report.verdict == "full"


def test_half_a_file_is_an_error_that_names_the_folder(folder):
    whole = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"a \.safetensors file is broken .* Fix: download"):
        LLM2Vec.from_pretrained(folder)


@pytest.mark.parametrize("gone", [NAME, "model-00002-of", "model.safetensors.index.json"])
def test_weights_that_are_not_there_are_not_called_pickles(folder, gone):
    if gone != NAME:
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / NAME).unlink()
        model.save_pretrained(folder, max_shard_size="40KB")
    next(path for path in folder.iterdir() if path.name.startswith(gone)).unlink()
    for pickles in (False, True):
        with pytest.raises(ModelError, match=r"lacks weights: .*safetensors.* Fix: download") as e:
            LLM2Vec.from_pretrained(folder, allow_pickle=pickles)
        assert "allow_pickle" not in str(e.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_named(folder, name, number):
    """In one row of an embedding only the texts with that word would be NaN."""

    def spoil(weights):
        weights[name].view(-1)[-1] = number
        return weights

    _rewrite(folder, spoil)
    with pytest.raises(ModelError, match=f"1 weights hold NaN or infinity .{name[6:]}"):
        LLM2Vec.from_pretrained(folder)


def test_a_pointer_of_git_lfs_is_told_how_to_fetch_the_weights(folder):
    (folder / NAME).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(ModelError, match="in a git clone, git lfs pull"):
        LLM2Vec.from_pretrained(folder)


def test_weights_of_other_shapes_are_named(folder):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "intermediate_size": 48}))
    with pytest.raises(ModelError, match=r"6 weights have other shapes .*\(64, 96\) in the file"):
        LLM2Vec.from_pretrained(folder)


def test_a_script_shows_no_bars_and_its_own_settings_stay(tiny_decoder, tmp_path, capfd):
    from transformers.utils import logging

    from unmasked import LLM2Vec

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    LLM2Vec.from_pretrained(tiny_decoder, device="cpu").save(tmp_path / "saved")
    assert capfd.readouterr().err == ""
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# --- configs of which no model can be built -----------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", "32", "'hidden_size' expected int, got str .value: '32'"),
        ("num_hidden_layers", None, "'num_hidden_layers' expected int, got NoneType"),
        ("num_attention_heads", 7, "32. is not a multiple of the number of attention heads .7"),
        ("hidden_act", "foo", "unknown hidden_act 'foo'.* Allowed: gelu, "),
        ("hidden_act", "sliu", "unknown hidden_act 'sliu', did you mean 'silu'"),
        ("rope_scaling", {"type": "foo"}, "unknown rope_scaling.type 'foo'.* Allowed: .*yarn"),
        ("vocab_size", -1, "vocab_size -1 is not a whole number of 1 or more"),
        ("intermediate_size", -64, "intermediate_size -64 is not a whole number"),
    ],
)
def test_a_value_of_the_config_that_is_wrong_is_named(tiny_decoder, tmp_path, key, value, said):
    folder = tmp_path / "edited"
    shutil.copytree(tiny_decoder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ModelError, match=rf"edited/config.json: transformers .*{said}") as caught:
        LLM2Vec.from_pretrained(folder, device="cpu")
    assert "Fix: correct the value, or use the config.json" in str(caught.value)


def test_a_full_memory_is_no_fault_of_the_config(tiny_decoder, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.AutoModel.from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        LLM2Vec.from_pretrained(tiny_decoder, device="cpu")


def test_a_tokenizer_with_values_of_another_kind_is_one_sentence(tiny_decoder, tmp_path):
    folder = tmp_path / "edited"
    shutil.copytree(tiny_decoder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": 3}))
    with pytest.raises(ModelError, match=r"no tokenizer that can be read .*Fix: save the tok"):
        LLM2Vec.from_pretrained(folder, device="cpu")
