"""A saved folder says what the encoder is at that moment, and a loader finds nothing else in it."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from support.vectors import close
from transformers import AutoConfig, AutoTokenizer

from unmasked import LLM2Vec
from unmasked.checkpoint.snapshot import read_options
from unmasked.errors import ModelError, OutputError
from unmasked.text.special_tokens import MARK, surrounding_ids
from unmasked.text.templates import PLAIN

TEXTS = ["a cat on a mat", "한국어 문장", "one two three four five six seven eight nine ten"]


@pytest.fixture
def model(tiny_decoder):
    return LLM2Vec.from_pretrained(tiny_decoder, device="cpu")


def reloaded(model, folder):
    """What both loaders make of the saved model."""
    model.save(folder)
    return (
        LLM2Vec.from_pretrained(folder, device="cpu"),
        SentenceTransformer(str(folder), device="cpu"),
    )


# --- what is set on the object ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_seq_length", 7),
        ("max_length", 7),
        ("doc_max_length", 4),
        ("truncate_dim", 8),
        ("similarity_fn_name", "dot"),
    ],
)
def test_what_is_set_later_is_saved(model, tmp_path, name, value):
    before = model.encode(TEXTS)
    setattr(model, name, value)
    wanted = model.encode(TEXTS)
    assert name == "similarity_fn_name" or before.shape != wanted.shape or (before != wanted).any()
    for other in reloaded(model, tmp_path / "saved"):
        close(other.encode(TEXTS), wanted)
        assert other.similarity_fn_name == model.similarity_fn_name
        close(other.similarity(wanted, wanted), model.similarity(wanted, wanted))


def test_prompts_of_every_name_are_saved(model, tmp_path):
    model.prompts |= {"query": "Ask:\n", "default": "Never asked for:\n", "sts": "Compare:\n"}
    for other in reloaded(model, tmp_path / "saved"):
        close(other.encode(TEXTS), model.encode(TEXTS))
        close(other.encode_query(TEXTS), model.encode_query(TEXTS))
        for name in ("default", "sts"):
            given = {"prompt_name": name}
            close(other.encode(TEXTS, **given), model.encode(TEXTS, **given))


@pytest.mark.parametrize(
    ("prompts", "default"),
    [
        ({"sts": "Compare:\n"}, "sts"),
        ({"query": "Ask:\n", "passage": "Read:\n"}, None),
        ({"sts": "Compare:\n", "corpus": "Read:\n"}, "sts"),
        ({"document": None}, None),
        ({}, None),
    ],
)
def test_queries_and_documents_keep_the_prompt_that_acts_for_them(
    model, tmp_path, prompts, default
):
    """Loaders add an empty prompt for a role that has none of its own."""
    model.prompts, model.default_prompt_name = prompts, default
    for other in reloaded(model, tmp_path / "saved"):
        for call in ("encode", "encode_query", "encode_document"):
            close(getattr(other, call)(TEXTS), getattr(model, call)(TEXTS))


def test_texts_are_cut_at_their_end_in_both_loaders(model, tmp_path, caplog):
    model.tokenizer.truncation_side = "left"
    model.max_seq_length = 6
    for other in reloaded(model, tmp_path / "saved"):
        close(other.encode(TEXTS), model.encode(TEXTS))
    assert "truncation_side has no effect" in caplog.text


@pytest.mark.parametrize("name", ["sts", "default", "query"])
def test_the_default_prompt_is_saved(model, tmp_path, name):
    plain = model.encode(TEXTS)
    model.prompts[name] = "Compare:\n"
    model.default_prompt_name = name
    assert np.abs(model.encode(TEXTS) - plain).max() > 1e-3
    for other in reloaded(model, tmp_path / "saved"):
        close(other.encode(TEXTS), model.encode(TEXTS))
        close(other.encode_document(TEXTS), model.encode_document(TEXTS))
        assert other.default_prompt_name == name


def test_a_prompt_for_texts_without_one_is_not_taken_for_one_of_the_user():
    saved = {"prompts": {"blank": MARK, "default": "X"}, "default_prompt_name": "blank"}
    assert read_options(saved, PLAIN) == {"prompts": {"default": "X"}}
    assert read_options({}, PLAIN) == {"prompts": {}}


def test_limits_of_queries_and_documents_are_followed_and_saved(model, tmp_path):
    model[0].query_length = 4
    assert np.abs(model.encode_query(TEXTS) - model.encode(TEXTS)).max() > 1e-3
    cut = LLM2Vec.from_pretrained(model.backbone.auto_model.name_or_path, max_length=4)
    close(model.encode_query(TEXTS), cut.to("cpu").encode(TEXTS))
    for other in reloaded(model, tmp_path / "saved"):
        close(other.encode_query(TEXTS), model.encode_query(TEXTS))
        close(other.encode_document(TEXTS), model.encode_document(TEXTS))


def test_pooling_of_the_prompt_can_be_switched_on(model, tmp_path):
    plain = model.encode(TEXTS)
    model.set_pooling_include_prompt(True)
    assert np.abs(model.encode(TEXTS) - plain).max() > 1e-3
    for other in reloaded(model, tmp_path / "saved"):
        close(other.encode(TEXTS), model.encode(TEXTS))
    model.set_pooling_include_prompt(False)
    close(model.encode(TEXTS), plain)


def test_a_pooling_that_no_folder_can_say_is_refused(model, tmp_path):
    model[1].pooling_mode = "max"
    with pytest.raises(ModelError, match="was made to pool 'mean'"):
        model.encode(TEXTS)
    model[1] = Pooling(32, "mean", include_prompt=False)
    with pytest.raises(ModelError, match="second module is Pooling"):
        model.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("value", [None, 0, "7"])
def test_a_limit_that_is_no_number_is_refused(model, value):
    with pytest.raises(ModelError, match="Fix: a number"):
        model.max_seq_length = value


def test_a_limit_beyond_the_positions_is_refused_wherever_it_is_set(model):
    """The model has 128; with a table of positions a longer text would end in an IndexError."""
    said = "max_length 129: this model has 128 positions"
    for name in ("max_seq_length", "max_length"):
        with pytest.raises(ModelError, match=said):
            setattr(model, name, 129)
    for kind in ("text", "common"):
        with pytest.raises(ModelError, match=said):
            model.encode(TEXTS, processing_kwargs={kind: {"max_length": 129}})
    model.max_seq_length = 128
    assert model.encode(TEXTS, processing_kwargs={"text": {"max_length": 128}}).shape == (3, 32)


# --- modules behind the pooling -----------------------------------------------------------------


def test_modules_behind_the_pooling_are_run_saved_and_read(model, tmp_path):
    bare = model.encode(TEXTS)
    for module in (Dense(32, 8), Normalize()):
        model.append(module)
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(model[2].linear(torch.tensor(bare)).tanh(), dim=1)
    close(model.encode(TEXTS), wanted.numpy())
    for other in reloaded(model, tmp_path / "saved"):
        close(other.encode(TEXTS), wanted.numpy())
        assert [type(module) for module in list(other)[2:]] == [Dense, Normalize]
    again, _ = reloaded(LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu"), tmp_path / "two")
    close(again.encode(TEXTS), wanted.numpy())
    assert "8 dimensions" in (tmp_path / "saved" / "README.md").read_text()
    types = [row["type"] for row in json.loads((tmp_path / "saved" / "modules.json").read_text())]
    assert types[2:] == [
        "sentence_transformers.models.Dense",
        "sentence_transformers.models.Normalize",
    ]


class Twice(torch.nn.Module):
    def forward(self, features):
        return {**features, "sentence_embedding": features["sentence_embedding"] * 2}


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Twice(), "cannot be saved"),
        (Dense(32, 8, activation_function=torch.nn.LeakyReLU(0.3)), "would be loaded differently"),
        (Dense(32, 8, activation_function=torch.nn.functional.gelu), "would be loaded differently"),
    ],
    ids=["of-the-user", "with-arguments", "a-function"],
)
def test_a_module_that_would_not_come_back_is_refused(model, tmp_path, module, said):
    model.append(module)
    model.encode(TEXTS)
    with pytest.raises(ModelError, match=said):
        model.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_other_peoples_pooling_sees_states_and_where_the_text_begins(model):
    wanted = model.encode(TEXTS), model.encode(TEXTS, prompt="Compare:\n")
    model[1] = Pooling(32, "mean", include_prompt=False)
    close(model.encode(TEXTS), wanted[0])
    close(model.encode(TEXTS, prompt="Compare:\n"), wanted[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row | {"type": "os.path"}, "code of other packages"),
        (lambda row: row | {"path": "../saved/2_Dense"}, "code of other packages"),
        (lambda row: row | {"path": "3_Missing"}, "cannot be read"),
    ],
)
def test_a_module_of_a_folder_that_cannot_be_trusted_or_read_is_refused(
    model, tmp_path, change, said
):
    model.append(Dense(32, 8))
    model.save(tmp_path / "saved")
    place = tmp_path / "saved" / "modules.json"
    rows = json.loads(place.read_text())
    place.write_text(json.dumps([*rows[:2], change(rows[2])]))
    with pytest.raises(ModelError, match=said):
        LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu")


def test_half_the_weights_of_a_module_are_refused(model, tmp_path):
    model.append(Dense(32, 8))
    model.save(tmp_path / "saved")
    weights = tmp_path / "saved" / "2_Dense" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ModelError, match="2_Dense"):
        LLM2Vec.from_pretrained(tmp_path / "saved", device="cpu")


# --- the folder ---------------------------------------------------------------------------------

LEFT = (
    "adapter_config.json", "adapter_model.safetensors", "special_tokens_map.json", "vocab.json",
    "merges.txt", "tokenizer.model", "pytorch_model.bin", "model.safetensors.index.json",
    "model-00001-of-00002.safetensors", "generation_config.json", "chat_template.jinja",
    "added_tokens.json", "modeling_x.py", "2_Normalize/config.json", "onnx/model.onnx",
    "router_config.json", "preprocessor_config.json", "model.onnx", "openvino_model.xml",
    "quantize_config.json",
)  # fmt: skip


def test_what_another_model_left_is_removed_and_all_else_stays(model, tmp_path, caplog):
    folder = tmp_path / "saved"
    kept = ("notes.txt", "results.json", "checkpoint-5/model.safetensors", "LICENSE")
    for name in (*LEFT, *kept):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    code = {"AutoModel": "modeling_x.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": code}))
    for other in reloaded(model, folder):
        close(other.encode(TEXTS), model.encode(TEXTS))
    assert [name for name in LEFT if (folder / name).exists()] == []
    assert [name for name in kept if not (folder / name).exists()] == []
    assert "removed files of another model" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


OF_THE_USER = (
    "01_Raw/a.txt", "2024_Reports/x.csv", "original/a.txt", "onnx/notes.txt", "openvino/a.bin",
    "attached/letter.pdf", "tokenizer_notes.md", "tokenizers/mine.json", "topics.model",
    "vectors.safetensors", "modeling_mine.py", "3_Dense/letter.pdf", "chat_template_ideas.md",
)  # fmt: skip


@pytest.mark.parametrize("holds_model", [False, True])
def test_files_of_the_user_stay_whatever_they_are_called(model, tmp_path, caplog, holds_model):
    folder = tmp_path / "project"
    also = ("vocab.txt", "model.onnx", "2_Dense/model.safetensors")  # of a model only beside one
    for name in (*OF_THE_USER, *also):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model.onnx").write_text("mine")
    rows = [{"path": "../elsewhere"}, {"path": str(tmp_path / "elsewhere")}, {"path": 3}, "x"]
    if holds_model:
        (folder / "modules.json").write_text(json.dumps(rows))
    model.save(folder)
    assert [name for name in OF_THE_USER if not (folder / name).is_file()] == []
    assert (tmp_path / "elsewhere" / "model.onnx").is_file()
    assert [(folder / name).exists() for name in also] == 3 * [not holds_model]
    assert (folder / "2_Dense").exists() is not holds_model, "a folder that became empty"
    assert ("removed files" in caplog.text) is holds_model


def test_a_module_is_removed_by_the_folder_that_the_old_model_names(model, tmp_path):
    folder = tmp_path / "saved"
    for name in ("head/config.json", "head/model.safetensors", "head/letter.pdf"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "modules.json").write_text(json.dumps([{"path": "head", "type": "x.Head"}]))
    model.save(folder)
    assert [file.name for file in (folder / "head").iterdir()] == ["letter.pdf"]


def test_an_interrupted_save_leaves_the_old_weights(model, tmp_path, monkeypatch):
    """They were removed before the new ones were on the disk: neither model was left."""
    folder = tmp_path / "saved"
    model.save(folder)
    wanted = model.encode(TEXTS)
    (folder / "model.safetensors").unlink()
    model.model.save_pretrained(folder, max_shard_size="40kB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.fsync", interrupted)
        model.save(folder)
    close(LLM2Vec.from_pretrained(folder, device="cpu").encode(TEXTS), wanted)
    model.save(folder)
    assert [file.name for file in folder.glob("model*")] == ["model.safetensors"]


def test_settings_that_are_left_out_do_not_stay_from_before(model, tmp_path):
    model.save(tmp_path / "saved")
    model.save(tmp_path / "saved", save_config=False)
    assert not (tmp_path / "saved" / "llm2vec_config.json").exists()


def test_a_save_that_fails_leaves_the_old_folder_whole(model, tmp_path):
    model.save(tmp_path / "saved")
    before = sorted(path.name for path in (tmp_path / "saved").iterdir())
    model.append(Twice())
    with pytest.raises(ModelError):
        model.save(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == before


def test_all_weights_of_a_folder_may_be_read_by_others(model, tmp_path):
    model.append(Dense(32, 8))
    model.save(tmp_path / "saved")
    for weights in tmp_path.rglob("*.safetensors"):
        mode = stat.S_IMODE((tmp_path / "saved" / "config.json").stat().st_mode)
        assert stat.S_IMODE(weights.stat().st_mode) == mode


def test_a_place_that_cannot_be_written_is_one_sentence(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Fix: name a place"):
        model.save(tmp_path / "file" / "saved")


def test_a_full_disk_is_one_sentence(model, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("[enforce fail at x.cc:1] . No space left on device (os error 28)")

    monkeypatch.setattr(type(model.model), "save_pretrained", fails)
    with pytest.raises(OutputError, match=r"No space left on device\. Fix: make room") as error:
        model.save(tmp_path / "saved")
    assert "enforce" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_options_of_stock_saving(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save(None)
    with pytest.raises(OutputError, match="is '', an empty name. Fix: name a folder"):
        model.save("")  # as of a variable that is not set; stock code raises as well
    with pytest.raises(ModelError, match="safetensors only"):
        model.save(tmp_path / "saved", safe_serialization=False)
    model.save(tmp_path / "saved", create_model_card=False)
    assert not (tmp_path / "saved" / "README.md").exists()
    model.save_pretrained(tmp_path / "saved", "mine/encoder", train_datasets=["org/texts"])
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "# mine/encoder" in card and 'SentenceTransformer("mine/encoder")' in card
    assert "org/texts" in card
    model.save(tmp_path / "saved", create_model_card=False)
    assert (tmp_path / "saved" / "README.md").read_text() == card
    model.save(tmp_path / "other", False, False)  # as the original: not merged, no settings
    assert not (tmp_path / "other" / "llm2vec_config.json").exists()


@pytest.mark.parametrize("kind", [str, Path])
def test_a_tilde_is_the_home_folder(model, tmp_path, monkeypatch, kind):
    """As in a path that a program has read; a folder called ~ was made."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model.save(kind("~/models/encoder"))
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    close(
        LLM2Vec.from_pretrained(kind("~/models/encoder"), device="cpu").encode(TEXTS),
        model.encode(TEXTS),
    )


def test_older_loaders_stop_with_a_sentence_and_this_one_does_not(model, tmp_path):
    """Versions before 5 turn the keys of this field into numbers, and never see is_causal."""
    model.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    with pytest.raises(ValueError, match="needs transformers 5.2 or later"):
        {int(key): value for key, value in config["pruned_heads"].items()}
    tokenizer = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoConfig.from_pretrained(tmp_path / "saved").is_causal is False


def test_what_differs_in_a_stock_loader_is_in_the_card(model, tmp_path):
    model.doc_max_length = 9
    model.save(tmp_path / "saved")
    card = " ".join((tmp_path / "saved" / "README.md").read_text().split())
    for wanted in (
        "vector of zeros",
        'prompt=""',
        "at 9 tokens",
        "white space",
        "transformers 5.2",
    ):
        assert wanted in card


# --- the tokenizer ------------------------------------------------------------------------------


def test_bos_is_found_where_the_letter_a_yields_nothing(tiny_decoder, tmp_path):
    """A normalizer may remove the letter that the tokenizer is probed with."""
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    given = AutoTokenizer.from_pretrained(tiny_decoder)
    backend = given.backend_tokenizer
    backend.normalizer = normalizers.Replace("a", "")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert surrounding_ids(tokenizer) == ([0], [])
    base = LLM2Vec.from_pretrained(tiny_decoder, device="cpu").model
    model = LLM2Vec(base, tokenizer, device="cpu")
    for other in reloaded(model, tmp_path / "saved"):
        close(other.encode(["bcd", "xyz"]), model.encode(["bcd", "xyz"]))
    assert model.tokenizer("bcd")["input_ids"][0] == 0


# --- files that were edited by hand -------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("llm2vec_config.json", "max_length", "512", "max_length '512' is not a number of tokens"),
        ("llm2vec_config.json", "max_length", None, "max_length None is not a number of tokens"),
        ("llm2vec_config.json", "max_length", 0, "max_length 0 is not a number of tokens"),
        ("llm2vec_config.json", "max_length", True, "max_length True is not a number of tokens"),
        ("llm2vec_config.json", "doc_max_length", 1.5, "doc_max_length 1.5 is not a number"),
        ("llm2vec_config.json", "skip_instruction", "no", "skip_instruction 'no' is not true or"),
        ("llm2vec_config.json", "pooling_mode", 3, "unknown pooling mode '3'"),
        ("llm2vec_config.json", "template", 5, "unknown template '5'"),
        ("llm2vec_config.json", "pooling_mode", ["mean"], "unknown pooling mode '.'mean'.'"),
        ("llm2vec_config.json", "template", {"prefix": None}, "template: prefix None is not a t"),
        ("llm2vec_config.json", "template", {"suffix": 3}, "template: suffix 3 is not a text"),
        ("llm2vec_config.json", "template", {"pool_suffix": "y"}, "pool_suffix 'y' is not true or"),
        ("sentence_bert_config.json", "query_length", "abc", "query_length 'abc' is not a number"),
        ("sentence_bert_config.json", "query_length", -3, "-3 is .*e/sentence_bert_config.json"),
        ("sentence_bert_config.json", "document_length", 1.5, "document_length 1.5 is not a n"),
        ("config_sentence_transformers.json", "default_prompt_name", ["a"], "is not the name of a"),
        ("config_sentence_transformers.json", "prompts", ["a"], "prompts are not texts by name"),
        ("config_sentence_transformers.json", "prompts", {"query": 5}, "prompts are not texts by"),
        ("config_sentence_transformers.json", "similarity_fn_name", "cosin", "mean 'cosine'"),
        ("config_sentence_transformers.json", "similarity_fn_name", 5, "unknown similarity_fn"),
        ("config_sentence_transformers.json", "similarity_fn_name", "maxsim", "fn_name in config"),
        ("config_sentence_transformers.json", "truncate_dim", "x", "not a number of dimensions"),
    ],
)
def test_a_saved_value_of_another_kind_is_named(model, tmp_path, file, key, value, said):
    model.save(tmp_path / "e")
    path = tmp_path / "e" / file
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), key: value}), "utf-8")
    with pytest.raises(ModelError, match=said) as caught:
        LLM2Vec.from_pretrained(tmp_path / "e", device="cpu")
    assert "Fix: " in str(caught.value)


def test_lengths_from_numpy_are_lengths(tiny_decoder):
    model = LLM2Vec.from_pretrained(tiny_decoder, max_length=np.int64(9), device="cpu")
    assert model.max_seq_length == 9
