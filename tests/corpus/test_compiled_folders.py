"""Whether layers are compiled is decided once, from the size of the whole source."""

from __future__ import annotations

import json

import pytest

from unmasked import LLM2Vec
from unmasked.corpus import Encoding, Local, Shards, encode_corpus, encode_folder
from unmasked.errors import OutputError
from unmasked.files.source import Source
from unmasked.forward import backbone
from unmasked.forward.compiling import LETTERS

ENOUGH = 100
"""Tokens that pay for compiling here."""


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, int]]:
    """The number of tokens at each decision, and of those that were encoded before it."""
    seen, models = [], []

    def pays(choice, device, tokens):
        seen.append((tokens, models[-1].tokens_encoded if models else 0))
        return tokens >= ENOUGH

    def compile_layers(model, **_):
        model.layers_compiled = True

    monkeypatch.setattr(backbone, "pays", pays)
    monkeypatch.setattr(backbone, "compile_layers", compile_layers)
    return seen


@pytest.fixture
def load(tiny_decoder):
    return lambda: LLM2Vec.from_pretrained(tiny_decoder, device="cpu", max_length=32)


@pytest.fixture
def texts(tmp_path):
    def write(count):
        path = tmp_path / f"{count}.txt"
        path.write_text("".join(f"a text, number {i}\n" for i in range(count)))
        return path

    return write


def header(folder, name="_manifest.jsonl") -> dict:
    return json.loads((folder / name).read_text().splitlines()[0])["settings"]


def test_every_machine_decides_alike_and_before_the_first_batch(load, texts, tmp_path, asked):
    path, folder = texts(40), tmp_path / "v"
    for place in (1, 2):
        shards = Shards(rows=10, part=(place, 2))
        encode_folder(Local(load), Source(str(path)), folder, None, shards)
        assert header(folder, f"_manifest-{place}-of-2.jsonl")["compiled"] is True
    size = path.stat().st_size // LETTERS
    assert asked == [(size, 0), (size, 0)]  # its own half would not have been enough


def test_a_folder_that_continues_decides_as_before(load, texts, tmp_path, asked):
    folder, given = tmp_path / "v", Source(str(texts(40)))
    encode_folder(Local(load), given, folder, None, Shards(rows=10))
    (folder / "part-000003.parquet").unlink()
    encode_folder(Local(load), given, folder, None, Shards(rows=10))
    assert len({tokens for tokens, _ in asked}) == 1 and len(asked) == 2


def test_a_small_source_is_not_compiled_and_its_manifest_is_what_it_ever_was(
    load, texts, tmp_path, asked
):
    folder, given = tmp_path / "v", Source(str(texts(10)))
    encode_folder(Local(load), given, folder, None, Shards(rows=5))
    assert "compiled" not in header(folder) and asked[0][0] < ENOUGH

    def other():
        model = load()
        model.backbone.auto_model.layers_compiled = True  # asked for by compile="always"
        return model

    with pytest.raises(OutputError, match="compiled: null there, true now"):
        encode_folder(Local(other), given, folder, None, Shards(rows=5))


def test_one_file_decides_by_its_source_as_well(load, texts, tmp_path, asked):
    path, model = texts(40), load()
    encode_corpus(model, Source(str(path)), tmp_path / "v.npy", Encoding(precision="int8"))
    assert asked == [(path.stat().st_size // LETTERS, 0)]
    assert model.backbone.auto_model.layers_compiled
