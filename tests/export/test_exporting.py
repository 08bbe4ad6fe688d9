"""Exports: what is written, that engines give the same vectors, and what is refused in words."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from support import tiny

from unmasked import LLM2Vec
from unmasked.checkpoint import loading
from unmasked.errors import ModelError
from unmasked.export import exporting, served
from unmasked.export.engines import MANIFEST, engine_of
from unmasked.export.exporting import DifferentVectorsError, export_model
from unmasked.export.faults import Reader, Reading
from unmasked.export.graph import VectorGraph, graph_inputs
from unmasked.export.parity import LIMIT, TEXTS, compare_vectors, cosines
from unmasked.forward.pooling import STOCK_MODES
from unmasked.text.inputs import split_pairs

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason="onnx, onnxscript or onnxruntime is not installed (extra: export)",
)
needs_openvino = pytest.mark.skipif(
    not importlib.util.find_spec("openvino"), reason="openvino is not installed (extra: export)"
)
needs_nncf = pytest.mark.skipif(
    not importlib.util.find_spec("nncf"), reason="nncf is not installed (extra: export)"
)
needs_gguf = pytest.mark.skipif(
    not importlib.util.find_spec("gguf"), reason="gguf is not installed (extra: export)"
)
needs_llama_cpp = pytest.mark.skipif(
    not importlib.util.find_spec("llama_cpp"), reason="llama-cpp-python is not installed"
)


@pytest.fixture
def saved(tmp_path, tiny_tokenizer):
    """Saves a random encoder of a family; ``pool`` are settings of `LLM2Vec`."""

    def save(family="llama", tokenizer=tiny_tokenizer, fields=None, **pool):
        config = tiny.config(family, vocab_size=len(tokenizer), **(fields or {}))
        decoder = tiny.save_random(tmp_path / f"{family}-decoder", config, tokenizer)
        path = tmp_path / family
        LLM2Vec.from_pretrained(decoder, dtype="float32", device="cpu", **pool).save(path)
        return path

    return save


def test_the_fixed_texts_are_what_they_should_be():
    assert len(TEXTS) == len(set(TEXTS)) == 20
    assert {bool(instruction) for instruction, _ in TEXTS} == {True, False}
    assert ("", "") in TEXTS
    assert any("가" <= letter <= "힣" for _, text in TEXTS for letter in text)
    assert max(len(text.split()) for _, text in TEXTS) > 900


def test_a_vector_that_is_no_vector_is_not_the_same():
    ours = np.ones((3, 4))
    theirs = np.stack([np.ones(4), np.zeros(4), np.full(4, np.nan)])
    assert cosines(ours, theirs).round(9).tolist() == [1, 0, 0]
    assert cosines(theirs, theirs).round(9).tolist() == [1, 1, 0]
    assert not compare_vectors(ours, theirs, LIMIT, [0, 1, 2]).same


# --- graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", STOCK_MODES)
@pytest.mark.parametrize("skip_instruction", [True, False])
def test_what_is_traced_pools_as_encode_does(saved, mode, skip_instruction):
    """In torch, in one padded batch, with a row that is all padding as servers fill batches."""
    folder = saved(max_length=64, pooling_mode=mode, skip_instruction=skip_instruction)
    encoder = LLM2Vec.from_pretrained(folder, dtype="float32", device="cpu")
    model, _ = loading.load_transformer(loading.find(folder), torch.float32)
    tokens, pairs = encoder.backbone.tokens, [list(pair) for pair in TEXTS]
    texts, prompts = split_pairs(pairs, tokens.join)
    inputs = graph_inputs(tokens, tokens(texts, prompts))
    inputs = {name: torch.cat([value, value[:1] * 0]) for name, value in inputs.items()}
    graph = VectorGraph(model, mode, len(tokens.prefix) if skip_instruction else 0).eval()
    with torch.no_grad():
        found = graph(**inputs)["sentence_embedding"].numpy()
    np.testing.assert_allclose(found[:-1], encoder.encode(pairs), atol=1e-5)
    assert not found[-1].any()


def test_modules_behind_the_pooling_are_exported(saved, tmp_path):
    """They were left out: after a Normalize no cosine shows that, and a Dense ended in NumPy."""
    encoder = LLM2Vec.from_pretrained(saved(max_length=64), dtype="float32", device="cpu")
    encoder.append(Dense(encoder.get_embedding_dimension(), 8))
    encoder.append(Normalize())
    folder = tmp_path / "projected"
    encoder.save(folder)
    model, _ = loading.load_transformer(loading.find(folder), torch.float32)
    tokens, pairs = encoder.backbone.tokens, [list(pair) for pair in TEXTS]
    graph = VectorGraph(model, "mean", len(tokens.prefix), list(encoder)[2:]).eval()
    with torch.no_grad():
        inputs = graph_inputs(tokens, tokens(*split_pairs(pairs, tokens.join)))
        found = graph(**inputs)["sentence_embedding"].numpy()
    np.testing.assert_allclose(found, encoder.encode(pairs), atol=1e-5)
    read = Reader(encoder, str(folder), pairs).vectors(Reading())
    np.testing.assert_allclose(read, encoder.encode(pairs), atol=1e-5)
    with pytest.raises(ModelError, match="has no module Dense after the pooling.*Fix: --to onnx"):
        export_model(folder, "gguf", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


@needs_onnx
@pytest.mark.slow
def test_an_onnx_graph_gives_vectors_to_anyone(saved, tmp_path):
    """The whole road, and then with ONNX Runtime alone and a plain mask of ones and zeros."""
    import onnxruntime

    folder = saved(max_length=64)
    found = export_model(folder, "onnx", tmp_path / "onnx", opset=20)
    assert found.parity.least > 0.999999
    listed = json.loads((tmp_path / "onnx" / MANIFEST).read_text())
    assert listed["least_cosine"] == found.parity.least
    assert not [*(tmp_path / "onnx").glob("*.safetensors")]
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "onnx" / "model.onnx")
    assert [item.name for item in session.get_inputs()] == ["input_ids", "attention_mask"]
    encoder = LLM2Vec.from_pretrained(folder, dtype="float32", device="cpu")
    texts = ["a text", "another text that is longer than the first"]
    stock = encoder.tokenizer(texts, padding=True, return_tensors="np")
    inputs = {name: stock[name] for name in ("input_ids", "attention_mask")}
    vectors, states = session.run(["sentence_embedding", "last_hidden_state"], inputs)
    np.testing.assert_allclose(vectors, encoder.encode(texts), atol=1e-5)
    assert states.shape == (*stock["input_ids"].shape, 32 * 2)
    import onnx

    graph = onnx.load(tmp_path / "onnx" / "onnx" / "model.onnx", load_external_data=False)
    assert {o.version for o in graph.opset_import if o.domain == ""} == {20}


@needs_onnx
def test_a_graph_that_its_engine_cannot_run_is_an_error_with_a_way_out(saved, tmp_path, cli):
    """One that is broken, in `verify` as in `export`; and an opset that is not known is at once."""
    folder = saved(max_length=64)
    (folder / MANIFEST).write_text('{"format": "onnx"}')
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"broken")
    code, _, err = cli("verify", folder, "--against", folder)
    assert code == 2 and "ONNX Runtime cannot run the export (" in err
    assert "Fix: export it again, without --opset" in err
    with pytest.raises(ModelError, match=r"ONNX opset 99: .*knows 18 to \d+\. Fix: leave out"):
        export_model(folder, "onnx", tmp_path / "out", opset=99)
    assert not (tmp_path / "out").exists()


@needs_onnx
@pytest.mark.slow
def test_an_opset_that_the_converter_does_not_write_is_refused(saved, tmp_path):
    """It is known to onnx, but the converter leaves the graph as it is and only logs that."""
    with pytest.raises(ModelError, match=r"ONNX opset 26: the converter wrote .* Fix: leave out"):
        export_model(saved(max_length=64), "onnx", tmp_path / "out", opset=26)


FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 4},
    "modernbert_decoder": {},
}
"""Each with windows, where the family has them."""


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["mean", "weighted_mean", "last_token", "bos_token"])
def test_families_and_pooling_modes_in_onnx(saved, tmp_path, family, mode):
    if mode != "mean" and family != "llama":
        pytest.skip("pooling does not depend on the family")
    folder = saved(family, fields=FAMILIES[family], max_length=64, pooling_mode=mode)
    found = export_model(folder, "onnx", tmp_path / "out")
    assert found.parity.least > 0.99999


@needs_openvino
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_openvino(saved, tmp_path, family):
    folder = saved(family, fields=FAMILIES[family], max_length=64)
    found = export_model(folder, "openvino", tmp_path / "out")
    assert found.parity.least > 0.99999
    assert engine_of(tmp_path / "out").name == "OpenVINO"


@needs_onnx
@needs_openvino
@needs_nncf
@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino"])
@pytest.mark.parametrize("weights", ["float16", "int8"])
def test_nano_with_small_weights(tmp_path, to, weights):
    found = export_model("nano", to, tmp_path / "out", weights)
    assert found.parity.same
    assert found.parity.limit == (0.999 if weights == "int8" else 0.9999)
    sizes = [file.stat().st_size for file in (tmp_path / "out" / to).iterdir()]
    assert sum(sizes) < (9e6 if weights == "int8" else 16e6)  # 26 MB with float32


# --- GGUF -----------------------------------------------------------------------------------------


def without_engine(monkeypatch):
    """As where llama.cpp is not installed."""
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)


def fields_of(path):
    import gguf

    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {
        tensor.name: tensor for tensor in reader.tensors
    }


@needs_gguf
def test_a_gguf_file_says_how_to_read_it(saved, tmp_path, monkeypatch):
    without_engine(monkeypatch)
    folder = saved(max_length=96, pooling_mode="eos_token", skip_instruction=False)
    with pytest.raises(DifferentVectorsError, match=r"\[llama\]'?, or --accept") as refused:
        export_model(folder, "gguf", tmp_path / "refused")
    assert str(refused.value).count("Fix: ") == 1
    assert not (tmp_path / "refused").exists()
    found = export_model(folder, "gguf", tmp_path / "out", "int8", accept=True)
    assert found.parity is None
    keys, tensors = fields_of(tmp_path / "out" / "model.gguf")
    assert keys["general.architecture"] == "llama"
    assert keys["llama.attention.causal"] is False
    assert keys["llama.pooling_type"] == 3  # last
    assert keys["llama.context_length"] == 96
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_eos_token"] is True
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert tensors["blk.1.attn_q.weight"].tensor_type.name == "Q8_0"
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    assert not [name for name in tensors if name.startswith("model.")]


@needs_gguf
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_reads_the_states_back_from_a_gguf_file(saved, tmp_path, monkeypatch, family):
    """An independent reader: names, order of the rows and shapes are those of the format."""
    from transformers import AutoModel

    without_engine(monkeypatch)
    heads = {"head_dim": 128} if family == "qwen3" else None  # this reader takes no other
    folder = saved(family, fields=heads, skip_instruction=False)
    export_model(folder, "gguf", tmp_path / "out", accept=True)
    there = AutoModel.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    there.config.is_causal = False
    here = AutoModel.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, found = (m(input_ids=ids).last_hidden_state for m in (here, there))
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.01)  # 16 bits


@needs_gguf
@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("stablelm", {}, "unknown family for llama.cpp 'stablelm'"),
        ("llama", {"pooling_mode": "weighted_mean"}, "unknown pooling mode for llama.cpp"),
        ("mistral", {}, r"longer than this one \(4 tokens to each side\)"),
        ("gemma2", {"fields": {"query_pre_attn_scalar": 64}}, "query_pre_attn_scalar 64"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(saved, tmp_path, family, settings, said):
    folder = saved(family, **settings)
    with pytest.raises(ModelError, match=said):
        export_model(folder, "gguf", tmp_path / "out", accept=True)
    assert not (tmp_path / "out").exists()


@needs_gguf
@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize(("weights", "least"), [("float16", 0.9999), ("int8", 0.999)])
def test_nano_in_llama_cpp(tmp_path, weights, least):
    model = LLM2Vec.from_pretrained("nano", dtype="float32", skip_instruction=False)
    model.save(tmp_path / "encoder")
    found = export_model(tmp_path / "encoder", "gguf", tmp_path / "out", weights)
    assert (found.engine, found.notes) == ("llama.cpp", ())
    assert found.parity.least >= least


LLAMA_CPP = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma": {},
    "gemma2": {"sliding_window": 128},
    "gemma3": {
        "num_hidden_layers": 6,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
    },
}


@needs_gguf
@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("family", LLAMA_CPP)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_families_and_tokenizers_in_llama_cpp(
    saved, tmp_path, tiny_tokenizer, sentencepiece_tokenizer, family, kind, monkeypatch
):
    tokenizer = {"bytes": tiny_tokenizer, "sentencepiece": sentencepiece_tokenizer}[kind]
    fields = {"initializer_range": 0.1, **LLAMA_CPP[family]}
    folder = saved(family, tokenizer, fields, max_length=100, skip_instruction=False)
    found = export_model(folder, "gguf", tmp_path / "out")
    assert found.parity.least > 0.9999
    if (family, kind) == ("llama", "bytes"):
        (code,) = re.findall(r"(?s)```python\n(.*?)```", (tmp_path / "out/README.md").read_text())
        monkeypatch.chdir(tmp_path / "out")
        names: dict[str, object] = {}
        exec(code, names)
        encoder = LLM2Vec.from_pretrained(folder, dtype="float32", device="cpu")
        ours = encoder.encode(["a text", "another text"])
        assert cosines(ours, np.asarray(names["vectors"], np.float32)).min() > 0.9999


# --- folders for servers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "family"), [("vllm", "llama"), ("vllm", "gemma3"), ("tei", "qwen3")]
)
def test_a_served_folder_has_what_its_loader_reads(saved, tmp_path, to, family):
    folder = saved(family, max_length=64, skip_instruction=False)
    found = export_model(folder, to, tmp_path / "out", "float32")
    assert found.parity.least > 0.99999
    assert found.notes == ()
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("to", served.LOADERS)
def test_each_key_that_a_loader_reads_is_needed(saved, tmp_path, to):
    """Taken out of the folder one after the other, each is missed by name and with the reason."""
    folder = saved("qwen3")
    served.check_keys(folder, to, "mean")
    pooling = served.Key(served.POOLING_FILE, served.FLAGS["mean"], True, "how to pool")
    for key in (*served.LOADERS[to], pooling):
        path = folder / key.file
        before = path.read_text()
        content = json.loads(before)
        if isinstance(content, list):
            content = [row for row in content if row["type"] != key.name]
        else:
            content = {k: v for k, v in content.items() if k != key.name}
            content["is_causal"] = content.get("is_causal") if key.name != "is_causal" else True
        if key.name == "is_causal":
            content.pop("use_bidirectional_attention", None)
        path.write_text(json.dumps(content))
        with pytest.raises(ModelError, match=rf"reads {key.name} in {key.file} \({key.why}\)"):
            served.check_keys(folder, to, "mean")
        path.write_text(before)


def test_what_a_server_would_misread_is_refused(saved, tmp_path):
    folder = saved("qwen3", pooling_mode="weighted_mean")
    with pytest.raises(ModelError, match="vllm does not support the pooling mode weighted_mean"):
        export_model(folder, "vllm", tmp_path / "out")
    with pytest.raises(ModelError, match="llama has no bidirectional form there"):
        export_model(saved("llama"), "tei", tmp_path / "out")


# --- what is said ---------------------------------------------------------------------------------


def test_an_export_that_differs_is_not_left_behind(cli, saved, tmp_path):
    folder = saved("qwen3", max_length=64)
    code, _, err = cli("export", folder, "--to", "vllm", "-o", "out", "--weights", "float32")
    assert code == 2
    assert "vllm (by its rules, it is not run here) gives other vectors: least cosine 0." in err
    assert "vllm pools the instruction and BOS with the text" in err
    assert "Fix: --accept" in err
    assert not [*tmp_path.glob("out*"), *tmp_path.glob(".out*")]
    words = ("export", folder, "--to", "vllm", "-o", "out", "--weights", "float32", "--accept")
    code, out, _ = cli(*words)
    assert code == 0
    assert "note   vllm pools the instruction and BOS" in out
    listed = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert (listed["accepted"], listed["same"], listed["format"]) == (True, False, "vllm")


def test_what_cannot_be_expressed_is_said(saved):
    encoder = LLM2Vec.from_pretrained(saved("qwen3"), device="cpu", template="llama3")
    said = exporting.inexpressible(encoder, "gguf")
    assert len(said) == 3
    assert "model.include_instruction=true" in said[0]
    assert "<|eot_id|>" in said[1]
    assert "begins every input with" in said[2]
    assert len(exporting.inexpressible(encoder, "onnx")) == 1
    encoder.backbone.tokens.skip_instruction = False
    encoder.backbone.tokens.template = replace(
        encoder.backbone.tokens.template, prefix="", suffix=""
    )
    assert exporting.inexpressible(encoder, "gguf") == []


def test_weights_that_a_format_does_not_have_are_refused(saved, tmp_path):
    with pytest.raises(ModelError, match=r"unknown weights for gguf 'float32'"):
        export_model(saved(), "gguf", tmp_path / "out", "float32")


def test_verify_compares_two_folders(cli, saved):
    folder = saved("qwen3", max_length=64)
    code, out, _ = cli("verify", folder, "--against", folder)
    assert code == 0, out
    assert "(sentence-transformers): least cosine 1.000000" in out
    assert "note  no vector (zeros) for '' after 'Given a question, find t'" in out
    code, _, err = cli("verify", "http://127.0.0.1:9", "--against", folder)
    assert code == 2
    assert "does not answer" in err
    assert "Fix: start the server" in err
    code, _, err = cli("verify", "nowhere", "--against", folder)
    assert code == 2
    assert "nowhere is neither a folder nor an address" in err


@pytest.mark.parametrize("way", ["run", "convert"])
def test_a_model_that_pools_the_instruction_is_the_same_everywhere(
    cli, tmp_path, tiny_decoder, way
):
    if way == "run":
        model = {"base": str(tiny_decoder), "include_instruction": True, "max_length": 64}
        (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", "model": model}))
        assert cli("run", "r.yaml", "-o", "runs")[0] == 0
        [folder] = tmp_path.glob("runs/**/model")
    else:
        folder = tmp_path / "model"
        assert cli("convert", tiny_decoder, "-o", folder, "--include-instruction")[0] == 0
    saved = json.loads((folder / "llm2vec_config.json").read_text())
    assert saved["skip_instruction"] is False
    code, out, _ = cli("export", folder, "--to", "vllm", "-o", "served", "--weights", "float32")
    assert code == 0
    engine = "vllm (by its rules, it is not run here), float32"
    assert out.startswith(f"least cosine 1.000000 (limit 0.9999): {engine}\n")
    assert "next   unmasked verify served --against" in out


@needs_gguf
def test_the_card_of_a_gguf_file_says_how_llama_cpp_reads_it(saved, tmp_path, monkeypatch):
    """It said that it is a model of sentence-transformers, and pooled without BOS and prompt."""
    without_engine(monkeypatch)
    export_model(saved(), "gguf", tmp_path / "out", accept=True)
    card = (tmp_path / "out" / "README.md").read_text()
    head = card.partition("## Framework Versions")[0]
    assert "sentence-transformers" not in head and "SentenceTransformer" not in head
    assert "BOS and prompt included" in card and "without BOS" not in card
    assert "Llama(" in card and "This is a llama.cpp file" in card
    notes = card.partition("## What gguf cannot express")[2].partition("## Framework")[0]
    assert "- gguf pools the instruction and BOS with the text, but this encoder does not." in notes
