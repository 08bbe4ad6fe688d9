"""The model card, and what goes to the hub."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects
from sentence_transformers.sentence_transformer.modules import Dense, Normalize

from unmasked import LLM2Vec
from unmasked.checkpoint.card import Card, render
from unmasked.checkpoint.push import list_files, push
from unmasked.errors import ModelError, OutputError

STAGES = [
    {"name": "causal_mean", "scores": {"sts.spearman": 0.4, "my.docs.ndcg@10": 0.1}},
    {"name": "mntp", "scores": {"sts.spearman": 0.512345, "my.docs.ndcg@10": 0.2}},
]


@pytest.fixture
def saved(tiny_decoder, tmp_path):
    LLM2Vec.from_pretrained(tiny_decoder, device="cpu").save(tmp_path / "model")
    return tmp_path / "model"


def test_the_card_is_one_of_sentence_transformers():
    card = Card(
        "org/decoder", "bidirectional: full", {"Recipe": "```yaml\nname: x\n```"},
        ["org/texts", "mine/corpus.txt.gz"], STAGES,
    )  # fmt: skip
    text = render(card, "mean", 256, 512)
    read = ModelCard(text)
    assert read.data.library_name == "sentence-transformers"
    assert read.data.pipeline_tag == "sentence-similarity"
    assert read.data.base_model == "org/decoder"
    assert read.data.datasets == ["org/texts"]
    assert "- corpus.txt.gz" in text
    assert {"sentence-transformers", "feature-extraction", "llm2vec"} <= set(read.data.tags)
    results = {r.metric_name: r for r in read.data.eval_results}
    assert results["spearman"].metric_value == 0.512345
    assert results["ndcg@10"].dataset_name == "my.docs"
    for wanted in (
        "512 tokens",
        "256 dimensions",
        "| mntp | 51.23 | 20.00 |",
        "name: x",
        "## Usage",
    ):
        assert wanted in text
    assert yaml.safe_load(text.split("---\n")[1])["model-index"]


def test_a_base_that_is_a_folder_is_not_named_as_one_of_the_hub(saved, tiny_decoder):
    text = (saved / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert "base_model" not in front and "model-index" not in front
    assert tiny_decoder.name in text
    assert "{" not in text.partition("## Usage")[0], "something was not filled in"
    assert "32 dimensions" in text and "bidirectional: full" in text


def test_what_would_be_sent(saved):
    (saved / "optimizer.pt").write_bytes(b"x")
    (saved / "checkpoint-3").mkdir()
    (saved / "checkpoint-3" / "model.safetensors").write_bytes(b"x")
    names = [name for name, size in list_files(saved) if size]
    assert {"model.safetensors", "config.json", "README.md", "1_Pooling/config.json"} <= set(names)
    assert {"modules.json", "tokenizer.json", "llm2vec_config.json"} <= set(names)
    assert not {name for name in names if "checkpoint" in name or name.endswith(".pt")}


def test_modules_behind_the_pooling_are_sent_and_other_peoples_files_are_not(
    tiny_decoder, tmp_path
):
    encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    width = encoder.get_embedding_dimension()
    encoder.append(Dense(width, 4))
    encoder.append(Normalize())
    encoder.save(tmp_path / "model")
    written = {
        path.relative_to(tmp_path / "model").as_posix()
        for path in (tmp_path / "model").rglob("*")
        if path.is_file()
    }
    for name in ("notes.txt", "results.json", "training_args.json", "other.safetensors"):
        (tmp_path / "model" / name).write_text("mine")
    assert {"2_Dense/model.safetensors", "2_Dense/config.json"} <= written
    assert {name for name, _ in list_files(tmp_path / "model")} == written


@pytest.mark.parametrize("content", ["[{", '{"idx": 0}', '["1_Pooling"]'])
def test_a_broken_list_of_modules_is_named(saved, content):
    (saved / "modules.json").write_text(content)
    with pytest.raises(ModelError, match=r"modules\.json is not .*Fix: download or save it again"):
        list_files(saved)


@pytest.mark.parametrize(
    "files",
    [
        ["onnx/model.onnx", "onnx/model.onnx.data"],
        ["openvino/openvino_model.xml", "openvino/openvino_model.bin"],
        ["model.gguf"],
    ],
)
def test_an_export_is_pushed_with_its_weights_or_not_at_all(saved, files):
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"has no file of weights that can be pushed.*Fix"):
        list_files(saved)
    for name in (*files, "unmasked_export.json"):
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text("{}")
    assert {*files, "unmasked_export.json"} <= {name for name, _ in list_files(saved)}


def test_what_cannot_be_pushed(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"does not hold a model.*did you mean .*model\?"):
        push(saved.parent, "org/x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="does not hold a model.*Fix"):
        push(tmp_path / "empty", "org/x")
    with pytest.raises(OutputError, match="not a valid name of a repository.*Fix"):
        push(saved, "a/b/c")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match="org/x: the hub cannot be reached.*Fix: connect to"):
        push(saved, "org/x")


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (RuntimeError("Name or service not known"), "connect to the network"),
        (LocalTokenNotFoundError("no token"), "log in with 'hf auth login'"),
        (
            HfHubHTTPError("403", response=SimpleNamespace(headers={}, request=None)),
            "log in with 'hf auth login'",
        ),
    ],
)
def test_the_fix_of_a_push_is_about_what_failed(saved, monkeypatch, error, fix):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    with pytest.raises(OutputError, match=f"Fix: {fix}"):
        push(saved, "org/x")


def test_what_is_sent(saved, cli, monkeypatch):
    """To a repository that others cannot see, unless they shall: the parts of a model alone."""
    (saved / "optimizer.pt").write_bytes(b"x")
    asked, removed = [], []

    def create_repo(self, repo_id, *, private, exist_ok):
        asked.append((repo_id, private, exist_ok))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, delete_patterns, **_):
        asked.append((repo_id, Path(folder_path), sorted(allow_patterns)))
        removed.append(delete_patterns)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    names = sorted(name for name, _ in list_files(saved))
    assert str(push(saved, "org/x")) == "https://huggingface.co/org/x"
    assert asked == [("org/x", True, True), ("org/x", saved, names)]
    assert "optimizer.pt" not in names
    code, out, err = cli("push", saved, "org/y", "--public")
    assert code == 0, err
    assert asked[2:] == [("org/y", False, True), ("org/y", saved, names)]
    assert out.endswith("pushed  https://huggingface.co/org/y\n")
    earlier = (
        "adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors",
        "modules.json", "vocab.json", "onnx/model.onnx", "onnx/model.onnx_data",
    )  # fmt: skip
    others = ("README.md", "notes.txt", "vectors.safetensors", "data/config.json")
    assert list(filter_repo_objects(earlier + others, allow_patterns=removed[0])) == list(earlier)


def test_dry_run(saved, cli, tmp_path):
    code, out, err = cli("push", saved, "org/x", "--dry-run")
    assert code == 0, err
    assert "model.safetensors" in out and "kB" in out
    assert "to org/x (private)" in out and "nothing was sent" in out
    assert "(public)" in cli("push", saved, "org/x", "--dry-run", "--public")[1]
    code, of_run, _ = cli("push", saved.parent, "org/x", "--dry-run")
    assert code == 0 and "model.safetensors" in of_run, "the folder of a run"
    (tmp_path / "empty").mkdir()
    code, _, err = cli("push", tmp_path / "empty", "org/x", "--dry-run")
    assert code == 2 and "does not hold a model" in err


def test_training_data_is_named_in_the_card_and_for_mteb(tiny_decoder, tmp_path):
    public = pytest.importorskip("unmasked.evaluate.tasks.public", reason="mteb is not installed")
    encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    encoder.save(tmp_path / "model", train_datasets=["org/pairs", "/home/me/mine.jsonl"])
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.to_dict()["training_datasets"] == ["org/pairs", "mine.jsonl"]
    assert card.data.datasets == ["org/pairs"] and "/home/me" not in card.content
    again = LLM2Vec.from_pretrained(tmp_path / "model", device="cpu")
    meta = public.Instructed(again).mteb_model_meta
    assert meta.training_datasets == {"org/pairs", "mine.jsonl"}
    assert not public.Instructed(encoder).mteb_model_meta.training_datasets


def test_a_loaded_encoder_keeps_its_base_and_its_data_when_it_is_saved(tiny_decoder, tmp_path):
    from unmasked.compat.origin import find_base, training_data

    first = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    first.base_name = "org/decoder"
    first.save(tmp_path / "first", train_datasets=["org/data"])
    again = LLM2Vec.from_pretrained(tmp_path / "first", device="cpu")
    again.save(tmp_path / "again", train_datasets=["org/more"])
    assert find_base(tmp_path / "again").name == "org/decoder"
    assert training_data(tmp_path / "again") == ["org/data", "org/more"]
    again.save(tmp_path / "first")  # over its own origin
    assert training_data(tmp_path / "first") == ["org/data"]
    again.base_name = "org/other"
    again.save(tmp_path / "other")
    assert find_base(tmp_path / "other").name == "org/other"


def test_a_base_of_this_machine_is_named_by_the_text_of_the_card(tiny_decoder, tmp_path):
    LLM2Vec.from_pretrained(tiny_decoder, device="cpu").save(tmp_path / "first")
    LLM2Vec.from_pretrained(tmp_path / "first", device="cpu").save(tmp_path / "again")
    for name in ("first", "again"):
        text = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert f"- **Base model:** {tiny_decoder.name}\n" in text


@pytest.mark.parametrize("head", [b"- a", b"a: [", b"base_model: \xff\xfe"])
def test_a_card_that_cannot_be_read_names_nothing(tiny_decoder, tmp_path, head):
    from unmasked.compat.origin import find_base, training_data

    LLM2Vec.from_pretrained(tiny_decoder, device="cpu").save(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_bytes(b"---\n" + head + b"\n---\ntext")
    assert find_base(tmp_path / "model").name == str(tmp_path / "model")
    assert training_data(tmp_path / "model") == []
    LLM2Vec.from_pretrained(tmp_path / "model", device="cpu").save(tmp_path / "again")
