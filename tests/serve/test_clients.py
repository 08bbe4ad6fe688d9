"""What LangChain and LlamaIndex send, by its shape over HTTP; and the libraries, where they are."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from support.serving import listening
from support.vectors import close

TEXTS = ["How do I sort a list?", "정렬하려면?", ""]
HEADERS = {
    "accept": "application/json",
    "accept-encoding": "gzip, deflate",
    "authorization": "Bearer none",
    "content-type": "application/json",
    "user-agent": "OpenAI/Python 3.57.0",
    "x-stainless-lang": "python",
    "x-stainless-retry-count": "0",
}


def sent(client, **body):
    content = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    return client.post("/v1/embeddings", content=content, headers=HEADERS)


@pytest.mark.parametrize(
    "added",
    [
        {},
        {"encoding_format": "base64"},
        {"encoding_format": "float", "user": "somebody"},
        {"encoding_format": "base64", "dimensions": 8},
    ],
)
@pytest.mark.parametrize("given", [TEXTS, TEXTS[:1], ""])
def test_texts_as_both_libraries_send_them(client, encoder, given, added):
    """LangChain asks for the vector of an empty text by itself, and not in a list."""
    answer = sent(client, model="tiny", input=given, **added)
    assert answer.status_code == 200, answer.text
    found = [item["embedding"] for item in answer.json()["data"]]
    if added.get("encoding_format") == "base64":
        found = [np.frombuffer(base64.b64decode(one), "<f4") for one in found]
    texts = [given] if isinstance(given, str) else given
    close(found, encoder.encode(texts, truncate_dim=added.get("dimensions")), 1e-6)


def test_the_name_of_a_model_of_openai_is_refused_with_those_that_are_served(client):
    """What both libraries send where nobody named a model."""
    answer = sent(client, model="text-embedding-ada-002", input=TEXTS)
    assert answer.status_code == 404
    assert "Allowed: tiny" in answer.json()["error"]["message"]


def test_ids_of_another_tokenizer_are_refused_with_the_option_of_langchain(client):
    """LangChain tokenises for OpenAI's models unless it is told not to: these are its ids."""
    ids = [[4438, 656, 358, 3460, 264, 1160, 30], [30381, 29833, 16582, 61394, 33390, 30]]
    answer = sent(client, model="tiny", input=ids, encoding_format="base64")
    assert answer.status_code == 400
    assert "check_embedding_ctx_length=False" in answer.json()["error"]["message"]


@pytest.mark.parametrize("many", [False, True])
def test_ids_of_another_tokenizer_are_noticed_by_the_text_they_stand_for(
    client, encoder, sentences, many
):
    """Within the vocabulary: no id is wrong by itself. The model's own pass, cut anywhere."""
    encode = encoder.tokenizer.backend_tokenizer.encode
    own = [encode(text, add_special_tokens=False).ids for text in sentences]
    own = own if many else [i for ids in own for i in ids][:200]
    answer = sent(client, model="tiny", input=own, truncate=True)
    assert answer.status_code == 200, answer.text
    order = np.random.default_rng(0).permutation(len(encoder.tokenizer))
    other = [order[ids].tolist() for ids in own] if many else order[own].tolist()
    answer = sent(client, model="tiny", input=other, truncate=True)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "foreign_tokens")
    assert "check_embedding_ctx_length=False" in answer.json()["error"]["message"]


# --- the libraries --------------------------------------------------------------------------------


@pytest.fixture
def address(service):
    with listening(service) as (host, port):
        yield f"http://{host}:{port}/v1"


@pytest.mark.slow
def test_langchain_gets_the_vectors_of_encode(address, encoder):
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    model = langchain.OpenAIEmbeddings(
        model="tiny", base_url=address, api_key="none", check_embedding_ctx_length=False
    )
    close(model.embed_documents(TEXTS), encoder.encode(TEXTS), 1e-6)
    close(model.embed_query(TEXTS[0]), encoder.encode(TEXTS[0]), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, name", [("openai", "OpenAIEmbedding"), ("openai_like", "OpenAILikeEmbedding")]
)
def test_llamaindex_gets_the_vectors_of_encode(address, encoder, module, name):
    package = f"llama-index-embeddings-{module.replace('_', '-')}"
    found = pytest.importorskip(
        f"llama_index.embeddings.{module}", reason=f"{package} is not installed"
    )
    model = getattr(found, name)(model_name="tiny", api_base=address, api_key="none")
    close(model.get_text_embedding_batch(TEXTS), encoder.encode(TEXTS), 1e-6)
    close(model.get_query_embedding(TEXTS[0]), encoder.encode(TEXTS[0]), 1e-6)
