"""A server with each of the usual mistakes, and whether `verify` names it."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from unmasked.errors import DataError, ModelError
from unmasked.export.faults import RIGHT, Reader, Reading
from unmasked.export.parity import TEXTS
from unmasked.export.verifying import verify_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_decoder):
    from unmasked import LLM2Vec

    path = tmp_path_factory.mktemp("verify") / "encoder"
    LLM2Vec.from_pretrained(tiny_decoder, dtype="float32", max_length=96, device="cpu").save(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    from unmasked import LLM2Vec

    return LLM2Vec.from_pretrained(folder, dtype="float32", device="cpu")


@contextmanager
def serving(answer, shape="openai", lists=True):
    """A server on loopback; ``answer`` makes (N, D) vectors of N strings, or a (status, text)."""
    path = {"openai": "/v1/embeddings", "tei": "/embed"}[shape]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != path:
                return self.say(404, {"error": "no such path"})
            texts = body["input" if shape == "openai" else "inputs"]
            seen.append((texts, self.headers.get("Authorization"), body.get("model")))
            found = answer(texts)
            if isinstance(found, tuple):
                return self.say(found[0], {"error": found[1]})
            rows = np.asarray(found).tolist()
            data = [{"index": i, "embedding": row} for i, row in enumerate(rows)]
            self.say(200, {"data": data[::-1]} if shape == "openai" else rows)

        def do_GET(self):
            known = self.path == "/v1/models" and shape == "openai" and lists
            self.say(*((200, {"data": [{"id": "its-name"}]}) if known else (404, {})))

        def say(self, status, content):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_):
            pass

    seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def sent(encoder, pair):
    return encoder.backbone.tokens.join(pair[0]) + pair[1]


def answering(encoder, folder, reading=RIGHT, normalise=True):
    """A server that reads the fixed texts in a given way; its batch is what it was asked for."""
    pairs = {sent(encoder, pair): list(pair) for pair in TEXTS}

    def answer(texts):
        reader = Reader(encoder, str(folder), [pairs.get(text, ["", text]) for text in texts])
        vectors = reader.vectors(reading)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalise else vectors

    return answer


@pytest.mark.parametrize("shape", ["openai", "tei"])
def test_a_right_server_is_the_same(folder, encoder, shape):
    with serving(answering(encoder, folder), shape) as (url, seen):
        found = verify_target(url, folder)
    assert found.parity.same
    assert found.parity.texts == tuple(range(20))
    assert found.explanation is None
    assert found.notes == ()
    assert shape in found.target
    assert seen[-1][2] == ("its-name" if shape == "openai" else None)


PLANTED = {
    "causal mask": (Reading(closed=True), "the causal mask is on"),
    "BOS pooled": (Reading(pooled="BOS"), "BOS is pooled"),
    "instruction pooled": (Reading(pooled="instruction"), "the instruction is pooled"),
    "both pooled": (Reading(pooled="everything"), "BOS and the instruction are pooled"),
    "last token": (Reading(mode="last_token"), "pooled by last_token instead of mean"),
    "truncated": (Reading(cut=64), "texts are cut after 64 tokens"),
    "left padding": (Reading(padding="left"), "left padding takes part in attention"),
    "right padding": (Reading(padding="right"), "right padding takes part in attention"),
    "dtype": (Reading(dtype="bfloat16"), "computed in bfloat16"),
    "no BOS": (Reading(ids="without BOS"), "BOS is not put before the text"),
    "EOS": (Reading(ids="with EOS"), "EOS is put after the text"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_named(folder, encoder, planted):
    reading, words = PLANTED[planted]
    with serving(answering(encoder, folder, reading)) as (url, _):
        found = verify_target(url, folder)
    assert not found.parity.same
    assert len(found.explanation.faults) == 1, found.explanation.faults
    assert found.explanation.faults[0].startswith(words)
    assert found.explanation.reading == reading
    assert found.explanation.least > 0.99999
    assert ("padding" in planted) == any(
        "depends on the other texts" in note for note in found.notes
    )


def test_two_faults_at_once_are_both_named(folder, encoder):
    reading = Reading(closed=True, mode="last_token", cut=64)
    with serving(answering(encoder, folder, reading)) as (url, _):
        found = verify_target(url, folder)
    assert found.explanation.reading == replace(reading, pooled=found.explanation.reading.pooled)
    assert len(found.explanation.faults) == 3


def test_vectors_that_are_not_normalised_are_named(folder, encoder):
    with serving(answering(encoder, folder, normalise=False)) as (url, _):
        found = verify_target(url, folder)
    assert found.parity.same
    assert found.notes[0].startswith("not normalised: the vectors are ")


def test_another_model_is_not_explained_away(folder, encoder):
    def answer(texts):
        seeds = [sum(text.encode()) for text in texts]
        return np.stack([np.random.default_rng(seed).normal(size=32) for seed in seeds])

    with serving(answer) as (url, _):
        found = verify_target(url, folder)
    assert found.explanation.faults == ()
    assert found.parity.least < 0.5


def test_a_refused_empty_text_is_a_note(folder, encoder):
    right = answering(encoder, folder)

    def answer(texts):
        return (422, "empty input") if "" in texts else right(texts)

    with serving(answer) as (url, _):
        found = verify_target(url, folder)
    assert found.parity.same
    assert len(found.parity.texts) == 19
    assert "refused the empty text: " in found.notes[0]
    assert "422" in found.notes[0]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda _: (401, "who are you?"), "Fix: set UNMASKED_API_KEY"),
        (lambda texts: np.ones((len(texts) + 1, 3)), r"something else than vectors \(shape"),
        (lambda _: (503, "starting"), "answered 503: .*starting"),
        (lambda texts: np.ones((len(texts), 3)), "vectors of 3 numbers, .* of 32"),
    ],
)
def test_a_server_that_cannot_be_compared_is_an_error(folder, answer, said):
    with serving(answer) as (url, _), pytest.raises(DataError, match=said):
        verify_target(url, folder)


def test_the_key_goes_to_the_server_that_was_named(folder, encoder, monkeypatch):
    monkeypatch.setenv("UNMASKED_API_KEY", "secret")
    with serving(answering(encoder, folder)) as (url, seen):
        verify_target(f"{url}/v1/embeddings", folder, model="its-name")
    assert {(key, model) for _, key, model in seen} == {("Bearer secret", "its-name")}
    assert [*map(len, (texts for texts, _, _ in seen))] == [1] * 20 + [20]


@pytest.mark.parametrize("path", ["", "/embed"])
def test_our_own_server_is_the_same(folder, encoder, path):
    """It takes an instruction apart from its text, and cuts what is too long as `encode` does."""
    pytest.importorskip("fastapi", reason="fastapi is not installed (extra: serve)")
    from support.serving import listening

    from unmasked.serve import Service

    with Service({"tiny": encoder}) as service, listening(service) as (host, port):
        found = verify_target(f"http://{host}:{port}{path}", folder)
    assert found.parity.same and found.explanation is None
    assert len(found.parity.texts) == 20
    assert not any("refused a text" in note for note in found.notes)


@pytest.mark.parametrize("path", ["", "/v1/embeddings", "/embed"])
def test_the_model_that_was_named_is_compared(folder, encoder, path):
    """The second of our server's models, by both of its APIs; one that it does not have is none."""
    pytest.importorskip("fastapi", reason="fastapi is not installed (extra: serve)")
    from support.serving import listening

    from unmasked import LLM2Vec
    from unmasked.serve import Service

    other = LLM2Vec.from_pretrained(folder, dtype="float32", device="cpu", pooling_mode="eos_token")
    served = {"one": other, "two": encoder}
    with Service(served) as service, listening(service) as (host, port):
        url = f"http://{host}:{port}{path}"
        assert not verify_target(url, folder).parity.same, "the first one"
        assert verify_target(url, folder, model="two").parity.same
        with pytest.raises(DataError, match=r"unknown model of http.* 'twoo', did you mean 'two'"):
            verify_target(url, folder, model="twoo")


@pytest.mark.parametrize("path", ["", "/embed"])
def test_a_name_that_a_server_cannot_be_told_is_refused(folder, encoder, path):
    with (
        serving(answering(encoder, folder), "tei") as (url, _),
        pytest.raises(DataError, match=r"no field for the name of a model \('x'\).*leave out"),
    ):
        verify_target(url + path, folder, model="x")


@pytest.mark.parametrize(("lists", "said"), [(False, "model_not_found"), (True, "no such thing")])
def test_what_openais_api_does_not_find_is_not_looked_for_in_another(folder, lists, said):
    with (
        serving(lambda _: (404, said), lists=lists) as (url, _),
        pytest.raises(DataError, match=f"/v1/embeddings answered 404: .*{said}"),
    ):
        verify_target(url, folder)


@pytest.mark.parametrize("address", ["ftp://host", "http://", "file:///etc/passwd"])
def test_what_is_no_address_is_refused(folder, address):
    with pytest.raises(DataError, match="is not an address"):
        verify_target(address, folder)


def test_a_target_is_found_as_a_model_is(tmp_path, folder, tiny_decoder, monkeypatch):
    """A run folder stands for its encoder, nano for the bundled decoder, ./nano for a folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("run/model", "nano"):
        shutil.copytree(folder, name)
    assert verify_target("run", folder).parity.same
    assert verify_target("./nano", folder).parity.same
    with pytest.raises(ModelError, match=r"/unmasked/nano does not say how .* unmasked convert /"):
        verify_target("nano", folder)
    with pytest.raises(ModelError, match="no modules.json"):
        verify_target(str(tiny_decoder), folder)


@pytest.mark.parametrize("broken", ["modules.json", "model.safetensors", "config.json"])
def test_a_target_that_is_not_whole_is_an_error(tmp_path, folder, broken):
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / broken).write_bytes((folder / broken).read_bytes()[:40])
    with pytest.raises(ModelError, match=r"cannot load .*cut: .* Fix: save or download it again"):
        verify_target(str(tmp_path / "cut"), folder)


def test_the_command_shows_the_lowest_texts_and_the_reason(cli, folder, encoder):
    with serving(answering(encoder, folder, Reading(closed=True)), "tei") as (url, _):
        code, out, _ = cli("verify", url, "--against", folder)
        ended, listed, _ = cli("verify", url, "--against", folder, "--json")
    assert code == ended == 2
    assert "/embed (tei): least cosine " in out
    assert "why   the causal mask is on" in out
    assert "this explains it (least cosine 1.000000 read that way)" in out
    found = json.loads(listed)
    assert found["reading"] == {"closed": True}
    assert len(found["cosines"]) == 20
