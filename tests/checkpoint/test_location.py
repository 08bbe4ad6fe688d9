"""Names of models: what is here, what can only be a path, and a hub that cannot be reached."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from unmasked import LLM2Vec
from unmasked.checkpoint import loading, location
from unmasked.checkpoint.location import Location, bundled_path, locate
from unmasked.checkpoint.push import list_files
from unmasked.errors import ModelError


@pytest.fixture
def asked(monkeypatch, tmp_path) -> list[str]:
    """What the hub is asked for; it is out of reach."""
    seen = []

    def fail(url, **_):
        seen.append(url)
        raise RuntimeError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(location, "get_hf_file_metadata", fail)
    return seen


def test_nano_is_the_bundled_decoder_and_a_folder_is_written_with_its_dot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    assert locate("nano").name == str(bundled_path())
    assert locate("./nano").name == "./nano"
    assert locate(Path("./nano")).name == "nano", "a path loses its dot"


@pytest.mark.parametrize("part", ["config.json", "adapter_config.json"])
def test_a_run_folder_stands_for_its_encoder(tmp_path, part):
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / part).touch()
    assert locate(tmp_path / "run").name == str(model)
    assert locate(f"{tmp_path}/run/").name == str(model)
    (tmp_path / "run" / part).touch()
    assert locate(tmp_path / "run").name == str(tmp_path / "run"), "a model itself"


def test_a_slip_of_the_bundled_name_is_seen(asked, tmp_path, tiny_decoder):
    shutil.copytree(tiny_decoder, tmp_path / "nan2")
    with pytest.raises(ModelError, match="did you mean 'nano'"):
        locate("nan").require()


@pytest.mark.parametrize("name", ["encodr", "./encodr", "{here}/encodr", "runs/law/modle"])
def test_the_nearest_folder_is_named(asked, tmp_path, tiny_decoder, name):
    shutil.copytree(tiny_decoder, tmp_path / "encoder")
    shutil.copytree(tiny_decoder, tmp_path / "runs" / "law" / "model")
    name = name.format(here=tmp_path)
    nearest = str(Path(name).with_name("model" if "law" in name else "encoder"))
    nearest = nearest if nearest.startswith("/") else f"./{nearest}"
    with pytest.raises(ModelError) as caught:
        locate(name).require()
    assert f"did you mean '{nearest}'?" in str(caught.value)
    assert "Fix: " in str(caught.value)
    assert len(asked) == (name == "encodr"), "only what may be a name of the hub is asked for"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("https://huggingface.co/owner/decoder", "owner/decoder"),
        ("https://huggingface.co/owner/decoder/tree/main", "owner/decoder"),
        ("http://hf.co/owner/de-coder.2/", "owner/de-coder.2"),
        ("hf:owner/decoder", "owner/decoder"),
        ("~/models/decoder", "{home}/models/decoder"),
    ],
)
def test_a_name_with_more_around_it_is_told_without(asked, monkeypatch, tmp_path, name, wanted):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ModelError, match="no such folder") as caught:
        locate(name).require()
    assert str(caught.value).endswith(f" Fix: give {wanted.format(home=tmp_path)}.")
    assert not asked


def test_a_folder_to_push_that_is_not_there_is_not_asked_for(asked, tmp_path, tiny_decoder):
    shutil.copytree(tiny_decoder, tmp_path / "encoder")
    with pytest.raises(ModelError, match=r"no such folder, did you mean './encoder'\? Fix: "):
        list_files(Path("encodr"))
    assert not asked


@pytest.mark.parametrize("name", ["owner/decoder", "gpt2"])
def test_a_hub_out_of_reach_is_asked_once(asked, name):
    with pytest.raises(ModelError, match=r"Name or service not known\. Fix: .*model\.base=FOLDER"):
        locate(name).require()
    assert len(asked) == 1


def test_what_is_in_the_cache_needs_no_hub(asked, monkeypatch):
    monkeypatch.setattr(location, "try_to_load_from_cache", lambda *_, **__: "config.json")
    assert locate("owner/decoder").require().name == "owner/decoder"
    assert asked == []


def fails_with(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    answer: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind(f"{status} of the server", response=answer)


def unsure(cause: Exception) -> LocalEntryNotFoundError:
    """What the hub's library makes of most errors: it says nothing about the repository."""
    error = LocalEntryNotFoundError("an error happened")
    error.__cause__ = cause
    return error


ABSENT = fails_with(404, RemoteEntryNotFoundError)
REFUSED = [
    unsure(fails_with(503)),
    unsure(fails_with(429)),
    unsure(ConnectionError("connection reset")),
    fails_with(401),
    fails_with(403, GatedRepoError),
    RuntimeError("a proxy"),
]


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers every request for a file with `errors[0]`."""
    errors = [ABSENT]

    def answer(*_, **__):
        raise errors[0]

    monkeypatch.setattr(location, "hf_hub_download", answer)
    monkeypatch.setattr(location, "is_offline_mode", lambda: False)
    return errors


@pytest.mark.parametrize("error", REFUSED, ids=str)
def test_a_file_that_the_hub_could_not_send_is_not_taken_for_absent(hub, error):
    """Without its settings, the model would be loaded with other ones, without a word."""
    place = Location("owner/encoder")
    assert place.fetch("llm2vec_config.json") is None
    hub[0] = error
    with pytest.raises(ModelError, match=r"owner/encoder/llm2vec_config.json cannot be f") as said:
        place.read_json("llm2vec_config.json")
    assert str(error.__cause__ or error) in str(said.value)
    assert "Fix: try again; if access was refused, log in" in str(said.value)


def test_a_repository_that_is_not_there_is_named(hub):
    for kind in (RepositoryNotFoundError, RevisionNotFoundError):
        hub[0] = fails_with(404, kind)
        with pytest.raises(ModelError, match=r"cannot load owner/x: .*404 of the server\. Fix: ch"):
            Location("owner/x").fetch("config.json")


@pytest.mark.parametrize("way", ["variable", "option"])
def test_without_a_network_a_repository_is_what_is_in_the_cache(hub, monkeypatch, way):
    hub[0] = unsure(OfflineModeIsEnabled("offline"))
    monkeypatch.setattr(location, "is_offline_mode", lambda: way == "variable")
    place = Location("owner/encoder", {"local_files_only": True} if way == "option" else {})
    assert place.fetch("modules.json") is None


def test_what_the_cache_knows_to_be_absent_needs_no_hub(hub, tmp_path):
    """The hub's library notes which files a repository lacks; the hub may be down later."""
    hub[0] = unsure(fails_with(503))
    cache = tmp_path / "models--owner--encoder"
    for name in ("refs/main", f".no_exist/{'a' * 40}/modules.json", f"snapshots/{'a' * 40}/x"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text("a" * 40)
    place = Location("owner/encoder", {"cache_dir": str(tmp_path)})
    assert place.fetch("modules.json") is None
    with pytest.raises(ModelError, match="cannot be fetched"):
        place.fetch("llm2vec_config.json")


def test_a_base_out_of_reach_is_asked_for_once(asked, tmp_path, tiny_decoder):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stated = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(stated))
    with pytest.raises(ModelError, match=r"belongs to the base owner/base, which.*known\. Fix:"):
        loading.find(adapter)
    assert len(asked) == 1


def test_local_files_only_asks_no_hub(asked):
    with pytest.raises(ModelError, match="cannot load owner/decoder"):
        loading.find("owner/decoder", local_files_only=True)
    assert asked == []


def test_a_name_that_is_too_long_is_refused():
    with pytest.raises(ModelError, match=r"300 characters\) cannot be the name.*long\. Fix: give"):
        LLM2Vec.from_pretrained("a" * 300)


def test_a_name_that_no_repository_can_have_is_refused():
    with pytest.raises(ModelError, match=r"cannot load owner/a--b: .*'owner/a--b'\. Fix: check"):
        LLM2Vec.from_pretrained("owner/a--b")


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_refused(name):
    """As an unset variable gives it; it would stand for the root of the disk."""
    with pytest.raises(ModelError, match="the name of a model is .*not set.*Fix: give a folder"):
        locate(name)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        (
            {"model_type": "lama"},
            r"the model_type 'lama' of .*, did you mean 'llama'\? Fix: a newer",
        ),
        ({"model_type": "qqqq9"}, r"the model_type 'qqqq9' of .*config.json\. Fix: a newer tran"),
        ({"hidden_size": 8}, r"has no model_type\. Fix: write the one"),
        (
            {"model_type": "qqqq9", "auto_map": {"AutoConfig": "a.B"}},
            "Fix: name another model: code",
        ),
    ],
)
def test_a_family_that_is_not_known_is_not_a_broken_download(tmp_path, stated, said):
    (tmp_path / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    with pytest.raises(ModelError, match=said):
        loading.find(tmp_path)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_a_library_that_is_missing_is_not_a_broken_download(tiny_decoder):
    with pytest.raises(ModelError, match=r"Fix: install what is missing, or leave out the option"):
        LLM2Vec.from_pretrained(tiny_decoder, attn_implementation="flash_attention_2")


def test_an_archive_is_refused(tmp_path):
    (tmp_path / "model.zip").write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"model\.zip is a file\. Fix: name the folder"):
        locate(tmp_path / "model.zip").require()
