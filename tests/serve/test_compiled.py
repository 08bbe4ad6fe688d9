"""Compiled layers behind a server: everything that takes time is done before it listens."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from starlette.testclient import TestClient
from support.graphs import Counting
from support.vectors import close

from unmasked import LLM2Vec
from unmasked.forward import backbone
from unmasked.forward.compiling import compile_layers, pays
from unmasked.serve import Service, application

TEXTS = ["", "a", "The cat sat on the warm mat.", "cat " * 40]


@pytest.fixture
def graphs(monkeypatch):
    torch.compiler.reset()
    made = Counting()
    monkeypatch.setattr(backbone, "compile_layers", partial(compile_layers, backend=made))
    yield made
    torch.compiler.reset()


def test_no_request_waits_for_a_graph(tiny_decoder, encoder, graphs):
    compiled = LLM2Vec.from_pretrained(
        tiny_decoder, max_length=32, doc_max_length=None, device="cpu", compile="always"
    )
    with Service({"tiny": compiled}) as service:
        made, calls = graphs.graphs, graphs.calls
        assert made
        client = TestClient(application(service))
        for texts in (TEXTS[:1], TEXTS[:1] * 2, TEXTS[1:2], TEXTS[2:3], TEXTS[3:], TEXTS):
            body = {"inputs": texts, "normalize": False, "truncate": True}
            close(client.post("/embed", json=body).json(), encoder.encode(texts))
        assert (graphs.graphs, graphs.calls > calls) == (made, True)


def test_a_server_compiles_on_a_gpu_unless_told_otherwise(tiny_decoder, graphs, monkeypatch):
    """What `auto` asks: would so many tokens pay for it on this device?"""
    asked = []
    monkeypatch.setattr(backbone, "pays", lambda *given: asked.append(given) or pays(*given))
    model = LLM2Vec.from_pretrained(tiny_decoder, max_length=32, device="cpu")
    Service({"tiny": model})
    [(choice, device, tokens)] = asked
    assert (choice, device.type, graphs.graphs) == ("auto", "cpu", 0)
    assert pays("auto", torch.device("cuda"), tokens)


def test_the_command_hands_its_choice_on(cli, monkeypatch):
    seen = {}
    monkeypatch.setattr("unmasked.serve.run_server", lambda *_: None)
    load = LLM2Vec.from_pretrained
    monkeypatch.setattr(
        LLM2Vec, "from_pretrained", lambda *given, **named: seen.update(named) or load(*given)
    )
    code, _, said = cli("serve", "nano", "--port", "0", "--compile", "never")
    assert code == 0, said
    assert seen["compile"] == "never"
