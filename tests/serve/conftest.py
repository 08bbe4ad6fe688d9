from __future__ import annotations

import pytest
from starlette.testclient import TestClient
from support.serving import EVERYBODY

from unmasked.serve import Service, application


@pytest.fixture(scope="session")
def encoder(tiny_decoder):
    """Shared by all tests of the server: nobody may change it."""
    from unmasked import LLM2Vec

    return LLM2Vec.from_pretrained(
        tiny_decoder,
        max_length=32,
        doc_max_length=None,
        device="cpu",
        prompts={"query": "Find:\n", "document": "", "passage": "Passage:\n"},
    )


@pytest.fixture(scope="session")
def service(encoder):
    with Service({"tiny": encoder}) as running:
        yield running


@pytest.fixture(scope="session")
def client(service):
    return TestClient(application(service, EVERYBODY))
