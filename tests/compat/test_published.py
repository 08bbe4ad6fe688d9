"""Published LLM2Vec checkpoints: loaded from a hub cache, to the vectors of plain torch."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from support import published
from support.published import OWNER, TEMPLATES, merged_weights, publish, reference
from support.vectors import close
from transformers import AutoConfig, AutoModel, AutoTokenizer

from unmasked import LLM2Vec
from unmasked.compat.counting import CountingTokenizer
from unmasked.compat.original import PUBLISHED
from unmasked.errors import ModelError
from unmasked.text.special_tokens import prepare_tokenizer
from unmasked.text.templates import named

MNTP, SUPERVISED = f"{OWNER}/LLM2Vec-Tiny-mntp", f"{OWNER}/LLM2Vec-Tiny-mntp-supervised"
BASE = "llamas/Tiny-Instruct"
INSTRUCTION = "Given a web search query, retrieve passages:"
CLEAN = ["hello world", "The cat sat on the mat.", "한국어 문장", "a"]
ODD = [
    " leading",
    "trailing  ",
    "a __init__ b",
    "tabs\tand\nlines",
    "word " * 90,
    "The quick fox " * 9,
]


ONE = pytest.mark.parametrize("checkpoint", ["llama3"], indirect=True)
"""One kind of tokenizer is enough."""


@pytest.fixture(scope="module", params=["llama3", "inst", "plain"])
def checkpoint(request, tmp_path_factory, sentences):
    """(cache, hub options, reference, template name): all three kinds of tokenizer."""
    cache = tmp_path_factory.mktemp("hub")
    if request.param == "inst":
        tokenizer = published.sentencepiece_tokenizer(sentences)
    else:
        tokenizer = published.byte_level_tokenizer(sentences, chat=request.param == "llama3")
    mntp, second = publish(cache, tokenizer)
    base = next((cache / "models--llamas--Tiny-Instruct" / "snapshots").iterdir())
    weights = merged_weights(base, mntp, second)
    saved = AutoTokenizer.from_pretrained(mntp)

    def expected(pairs, **options):
        options = {"template": TEMPLATES[request.param], **options}
        return np.stack([reference(saved, weights, i, t, **options).numpy() for i, t in pairs])

    return cache, {"cache_dir": str(cache), "local_files_only": True}, expected, request.param


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Anything that asks the hub in spite of ``local_files_only`` is an error, not a delay."""
    from huggingface_hub import file_download

    def refuse(*arguments, **__):
        pytest.fail(f"the hub was asked for {arguments[0]}")

    monkeypatch.setattr(file_download, "get_hf_file_metadata", refuse)


def load(hub, *names, **options):
    return LLM2Vec.from_pretrained(*names, device="cpu", **hub, **options)


def test_golden_vectors_of_the_original(checkpoint):
    """Every text, odd ones too, under ``compat``; clean ones without it as well."""
    cache, hub, expected, kind = checkpoint
    pairs = [(i, t) for t in [*CLEAN, *ODD] for i in ("", INSTRUCTION, " spaces around: ")]
    model = load(hub, MNTP, SUPERVISED, compat="llm2vec-0.2")
    close(model.encode([list(pair) for pair in pairs]), expected(pairs))
    close(model.encode([[i, t, 0] for i, t in pairs[:3]]), expected(pairs[:3]))
    ours = load(hub, MNTP, SUPERVISED)
    assert ours.settings.doc_max_length == 40  # read from the hub
    if kind == "inst":  # texts whose first token takes in the space before it
        clean = [(i, t) for t in ("The cat sat on the mat.", "a") for i in ("", INSTRUCTION)]
    else:
        clean = [("", text) for text in CLEAN]
    close(ours.encode([list(pair) for pair in clean]), expected(clean))
    assert not list(cache.rglob("executed")), "remote code was run"


@ONE
@pytest.mark.parametrize("mode", ["weighted_mean", "last_token"])
def test_golden_vectors_of_other_pooling_modes(checkpoint, mode):
    _, hub, expected, _ = checkpoint
    pairs = [(i, t) for t in [*CLEAN, *ODD] for i in ("", INSTRUCTION)]
    model = load(hub, MNTP, SUPERVISED, compat="llm2vec-0.2", pooling_mode=mode)
    close(model.encode([list(pair) for pair in pairs]), expected(pairs, mode=mode))


def test_b8_the_template_is_found_by_the_tokenizer_and_not_by_a_name(checkpoint, tmp_path):
    cache, hub, _, kind = checkpoint
    model = load(hub, MNTP, SUPERVISED)
    assert model.settings.template == (PUBLISHED if kind == "plain" else named(kind))
    for number, folder in enumerate(published_folders(cache)):
        shutil.copytree(folder, tmp_path / str(number))
    moved = load({}, tmp_path / "1", tmp_path / "2", base=tmp_path / "0")
    close(moved.encode(CLEAN), model.encode(CLEAN))


def published_folders(cache):
    names = (BASE, MNTP, SUPERVISED)
    return [next((cache / f"models--{n.replace('/', '--')}/snapshots").iterdir()) for n in names]


def test_b7_b8_a_checkpoint_saved_by_us_keeps_its_template(checkpoint, tmp_path, caplog):
    _, hub, _, kind = checkpoint
    model = load(hub, MNTP, SUPERVISED, prompts={"sts": "Compare:"})
    pairs = [[INSTRUCTION, text] for text in CLEAN]
    with caplog.at_level(logging.WARNING):
        model.save(tmp_path / "saved")
    again = LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu")
    close(again.encode(pairs), model.encode(pairs))
    close(again.encode(CLEAN, prompt_name="sts"), model.encode(CLEAN, prompt_name="sts"))
    assert again.prompts["sts"] == "Compare:"
    assert "auto_map" not in (tmp_path / "saved" / "config.json").read_text()
    told = "Stock loaders cannot pool this template exactly" in caplog.text
    assert told == (kind == "inst")
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    if kind != "inst":
        close(stock.encode([*CLEAN, *ODD]), model.encode([*CLEAN, *ODD]))
        sts = {"prompt_name": "sts"}
        close(
            stock.encode(["\n" + t for t in CLEAN], **sts),
            model.encode(["\n" + t for t in CLEAN], **sts),
        )


def test_a_compat_checkpoint_saved_by_us_stays_one(checkpoint, tmp_path):
    _, hub, expected, _ = checkpoint
    pairs = [(i, t) for t in [*CLEAN, *ODD] for i in ("", INSTRUCTION)]
    load(hub, MNTP, SUPERVISED, compat="llm2vec-0.2").save(tmp_path / "saved")
    again = LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.settings.compat == "llm2vec-0.2"
    close(again.encode([list(pair) for pair in pairs]), expected(pairs))


@ONE
def test_the_mntp_repository_alone(checkpoint):
    cache, hub, _, kind = checkpoint
    base, mntp, _ = published_folders(cache)
    weights = merged_weights(base, mntp)
    tokenizer = AutoTokenizer.from_pretrained(mntp)
    model = load(hub, MNTP, compat="llm2vec-0.2")
    assert (model.settings.max_length, model.settings.doc_max_length) == (512, 400)
    rows = [reference(tokenizer, weights, "", t, TEMPLATES[kind], "mean", 512, 400) for t in CLEAN]
    close(model.encode(CLEAN), torch.stack(rows))


@ONE
def test_merging_in_half_precision_is_done_in_float32(checkpoint):
    cache, hub, _, _ = checkpoint
    model = load(hub, MNTP, SUPERVISED, dtype="bfloat16")
    weights = merged_weights(*published_folders(cache))
    for name, value in model.model.state_dict().items():
        assert value.dtype == torch.bfloat16
        first = load_base(cache, name).bfloat16().float() + weights[name] - load_base(cache, name)
        assert (value.float() - first).abs().max() <= 2**-8 * first.abs().max()
    rotary = model.model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32  # casting it would move far positions


def load_base(cache, name):
    weights = merged_weights(published_folders(cache)[0])
    return weights[name]


def test_b28_the_tokenizer_is_the_bases_again(checkpoint):
    """The base's tokenizer is used; the checkpoint's has ``_`` as mask and splits ``__init__``."""
    cache, hub, _, _ = checkpoint
    base, mntp, _ = published_folders(cache)
    plain, masked = (AutoTokenizer.from_pretrained(folder) for folder in (base, mntp))
    text = "__init__"
    assert masked(text)["input_ids"] != plain(text)["input_ids"]
    assert load(hub, MNTP).tokenizer(text)["input_ids"] == plain(text)["input_ids"]
    kept = load(hub, MNTP, compat="llm2vec-0.2")
    assert kept.tokenizer(text)["input_ids"] == masked(text)["input_ids"]


@ONE
def test_b12_b15_hub_options_reach_every_file(checkpoint, tmp_path):
    """`revision` and `cache_dir` reach every file: the adapter, its settings and the base."""
    cache, hub, _, _ = checkpoint
    fork = tmp_path / "hub"
    shutil.copytree(cache, fork)
    base, mntp, second = published_folders(fork)
    other = published.repository(fork, SUPERVISED, "v2")
    published.write_adapter(other, BASE, seed=3)
    published.write_json(other / "llm2vec_config.json", {"pooling_mode": "last_token"})
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(second / name, other)
    hub = {"cache_dir": str(fork), "local_files_only": True}
    model = load(hub, MNTP, f"{SUPERVISED}@v2")
    assert model.pooling_mode == "last_token"
    weights = merged_weights(base, mntp, other)
    rows = [
        reference(
            AutoTokenizer.from_pretrained(mntp),
            weights,
            "",
            t,
            TEMPLATES[checkpoint[3]],
            "last_token",
        )
        for t in CLEAN
    ]
    close(model.encode(CLEAN), torch.stack(rows))
    alone = load(hub | {"revision": "v2"}, SUPERVISED)  # the base has no such revision
    assert alone.pooling_mode == "last_token"
    empty = {"cache_dir": str(tmp_path / "empty"), "local_files_only": True}
    with pytest.raises(ModelError, match=f"cannot load {MNTP}"):
        load(empty, MNTP)


# --- what cannot be loaded --------------------------------------------------------------------


@ONE
def test_a_base_out_of_reach_is_named(checkpoint, tmp_path):
    fork = tmp_path / "hub"
    shutil.copytree(checkpoint[0], fork)
    shutil.rmtree(fork / "models--llamas--Tiny-Instruct")
    with pytest.raises(ModelError, match=rf"base {BASE}, which cannot be reached.*base='path"):
        load({"cache_dir": str(fork), "local_files_only": True}, MNTP)


@ONE
def test_an_adapter_for_another_base_names_keys_and_base(checkpoint, tiny_decoder):
    cache, _, _, _ = checkpoint
    _, mntp, _ = published_folders(cache)
    with pytest.raises(ModelError, match=rf"made for another base \({BASE}\).*mlp"):
        load({}, tiny_decoder, mntp)


@ONE
@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_keys_that_do_not_match_are_named(checkpoint, tmp_path, change):
    """PEFT loads what fits and warns; a LoRA of zeros is the result."""
    from safetensors.torch import load_file, save_file

    cache, hub, _, _ = checkpoint
    _, mntp, _ = published_folders(cache)
    shutil.copytree(mntp, tmp_path / "mntp")
    file = tmp_path / "mntp" / "adapter_model.safetensors"
    weights = load_file(file)
    key = "base_model.model.layers.1.mlp.up_proj.lora_B.weight"
    value = weights.pop(key)
    if change == "unexpected":
        weights |= {key: value, key.replace("model.layers", "model.model.layers"): value.clone()}
    save_file(weights, file)
    with pytest.raises(ModelError, match=rf"1 {change}|1 weights {change}") as caught:
        load(hub, tmp_path / "mntp")
    assert "layers.1.mlp.up_proj.lora_B" in str(caught.value)
    assert BASE in str(caught.value)


@ONE
def test_pickles_are_refused_unless_allowed(checkpoint, tmp_path):
    from safetensors.torch import load_file

    cache, hub, expected, _ = checkpoint
    base, mntp, second = published_folders(cache)
    folders = [tmp_path / name for name in ("base", "mntp", "second")]
    for source, folder in zip((base, mntp, second), folders, strict=True):
        shutil.copytree(source, folder)
    adapter = load_file(folders[1] / "adapter_model.safetensors")
    torch.save(adapter, folders[1] / "adapter_model.bin")
    (folders[1] / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"Pickled adapters are not loaded.*allow_pickle=True"):
        load(hub, folders[1], folders[2])
    allowed = {"allow_pickle": True, "compat": "llm2vec-0.2"}
    close(load(hub, *folders[1:], **allowed).encode(CLEAN), expected([("", t) for t in CLEAN]))
    torch.save(load_file(folders[0] / "model.safetensors"), folders[0] / "pytorch_model.bin")
    (folders[0] / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickled ones are not loaded.*allow_pickle=True"):
        load({}, *folders[1:], base=folders[0])
    model = load({}, *folders[1:], base=folders[0], **allowed)
    close(model.encode(CLEAN), expected([("", t) for t in CLEAN]))


# --- folders of the original's own `save` ------------------------------------------------------


@pytest.mark.parametrize("merged", [True, False])
def test_a_folder_of_the_originals_save(checkpoint, tmp_path, merged):
    """`save(path, merge_before_save)`: full weights and config, or the adapter alone."""
    from safetensors.torch import save_file

    cache, hub, expected, _ = checkpoint
    base, mntp, second = published_folders(cache)
    folder = tmp_path / "saved"
    shutil.copytree(second, folder)
    if merged:
        (folder / "adapter_config.json").unlink()
        (folder / "adapter_model.safetensors").unlink()
        weights = merged_weights(base, mntp, second)
        weights.pop("lm_head.weight")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((mntp / "config.json").read_text())
        config |= {"architectures": ["LlamaBiModel"], "_name_or_path": BASE}
        published.write_json(folder / "config.json", config)
    else:  # the adapter says it belongs to the MNTP checkpoint, which was merged in memory
        published.write_json(folder / "adapter_config.json", published.adapter_config(MNTP))
    pairs = [(i, t) for t in [*CLEAN, *ODD] for i in ("", INSTRUCTION)]
    model = load(hub, folder, compat="llm2vec-0.2")
    close(model.encode([list(pair) for pair in pairs]), expected(pairs))


def test_the_published_way_with_automodel_and_peft(checkpoint, caplog):
    """The README of the original and of the seed system: AutoModel, two PeftModels, LLM2Vec."""
    from peft import PeftModel

    cache, _, expected, kind = checkpoint
    base, mntp, second = published_folders(cache)
    tokenizer = AutoTokenizer.from_pretrained(mntp)

    def build(flag):
        config = AutoConfig.from_pretrained(base)
        config.is_causal = flag
        model = AutoModel.from_pretrained(base, config=config)
        model = PeftModel.from_pretrained(model, mntp).merge_and_unload()
        return PeftModel.from_pretrained(model, second)

    options = {"max_length": 64, "doc_max_length": 40, "device": "cpu", "compat": "llm2vec-0.2"}
    options |= {"template": PUBLISHED if kind == "plain" else kind}
    wanted = expected([("", text) for text in CLEAN])
    with caplog.at_level(logging.WARNING):
        opened = LLM2Vec(build(False), tokenizer, **options)
    assert "not bidirectional" not in caplog.text
    close(opened.encode(CLEAN), wanted)
    with caplog.at_level(logging.WARNING):
        causal = LLM2Vec(build(True), tokenizer, **options)
    assert "enable_bidirectional=True" in caplog.text  # the fix it offers
    assert np.abs(np.asarray(causal.encode(CLEAN)) - wanted).max() > 1e-2
    mended = LLM2Vec(build(True), tokenizer, **options, enable_bidirectional=True)
    close(mended.encode(CLEAN), wanted)


@ONE
def test_a_peft_model_around_a_peft_model(checkpoint):
    """PEFT puts the second in the place of the first and loads nothing: refused, with the fix."""
    from peft import PeftModel

    _, mntp, second = published_folders(checkpoint[0])
    model = AutoModel.from_pretrained(published_folders(checkpoint[0])[0])
    with pytest.warns(UserWarning, match="missing adapter keys"):
        nested = PeftModel.from_pretrained(PeftModel.from_pretrained(model, mntp), second)
    with pytest.raises(ModelError, match=r"neither adapter .* has an effect.*merge_and_unload"):
        LLM2Vec(nested, AutoTokenizer.from_pretrained(mntp), device="cpu")


# --- templates --------------------------------------------------------------------------------


def test_an_unknown_template_or_compat_names_the_allowed(tiny_decoder):
    with pytest.raises(ModelError, match=r"did you mean 'llama3'.*chatml"):
        LLM2Vec.from_pretrained(tiny_decoder, device="cpu", template="llama-3")
    with pytest.raises(ModelError, match=r"unknown compat.*llm2vec-0\.2"):
        LLM2Vec.from_pretrained(tiny_decoder, device="cpu", compat="llm2vec-1")


@ONE
def test_a_decoder_gets_no_template_unless_asked(checkpoint):
    _, hub, _, _ = checkpoint
    assert load(hub, BASE).settings.template == named("none")
    asked = load(hub, BASE, template="llama3")
    assert asked.settings.template == named("llama3")


def test_a_counted_row_tells_that_its_text_was_cut(tiny_tokenizer):
    backend = prepare_tokenizer(tiny_tokenizer)
    for options in ({"max_length": 8}, {"doc_max_length": 7}):
        tokens = CountingTokenizer(backend, **options)
        long, short = tokens(["cat sat " * 20, "cat  sat \n"])
        assert long.cut > 0 and short.cut == 0
