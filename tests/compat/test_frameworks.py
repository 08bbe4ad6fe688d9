"""Frameworks that take a sentence-transformers model get the vectors of `LLM2Vec.encode`.

Each is given a saved folder and, where it takes one, the loaded encoder, in the words of
docs/how-to/frameworks.md. A framework that is not installed is skipped by its name.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from support.vectors import close

from unmasked import LLM2Vec

pytestmark = pytest.mark.slow
TEXTS = ["A cat on a mat", "word", "한국어 문장", "opens a file and reads it"]
QUERY = "Find the docstring that this sentence begins:\n"
TOLERANCE = 2e-5  # of vectors of length 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder whose queries have an instruction, and its encoder in the precision that it has."""
    folder = str(tmp_path_factory.mktemp("frameworks") / "encoder")
    LLM2Vec.from_pretrained("nano", prompts={"query": QUERY}, dtype="float32").save(folder)
    return folder, LLM2Vec.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    for name, value in {
        "HF_HUB_OFFLINE": "1", "ANONYMIZED_TELEMETRY": "False", "HAYSTACK_TELEMETRY_ENABLED": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


def prompts_of(folder):
    """As docs/how-to/frameworks.md reads them."""
    text = (Path(folder) / "config_sentence_transformers.json").read_text(encoding="utf-8")
    return json.loads(text)["prompts"]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def same(found, wanted):
    close(np.asarray(found, dtype=np.float32), wanted, TOLERANCE)


def test_bertopic(saved):
    bertopic = pytest.importorskip("bertopic", reason="BERTopic is not installed")
    backend = pytest.importorskip("bertopic.backend._utils")
    folder, encoder = saved
    for given in (folder, encoder):
        same(backend.select_backend(given).embed(TEXTS), encoder.encode(TEXTS))
    words = ["open", "read", "write", "close", "file", "socket", "thread", "list", "tuple"]
    texts = [f"{a} the {b} and {c}" for a in words for b in words[:5] for c in words[5:]]
    model = bertopic.BERTopic(embedding_model=encoder, min_topic_size=5)
    topics, _ = model.fit_transform(texts)
    assert len(topics) == len(texts)
    assert model.embedding_model.embedding_model is encoder


def test_keybert(saved):
    keybert = pytest.importorskip("keybert", reason="KeyBERT is not installed")
    folder, encoder = saved
    found = []
    for given in (folder, encoder):
        model = keybert.KeyBERT(given)
        same(model.model.embed(TEXTS), encoder.encode(TEXTS))
        found.append(model.extract_keywords("Opens a file and reads every line of it.", top_n=2))
    assert [word for word, _ in found[0]] == [word for word, _ in found[1]]


def test_langchain(saved):
    langchain = pytest.importorskip(
        "langchain_huggingface", reason="langchain-huggingface is not installed"
    )
    folder, encoder = saved
    model = langchain.HuggingFaceEmbeddings(
        model_name=folder,
        encode_kwargs={"prompt_name": "document"},
        query_encode_kwargs={"prompt_name": "query"},
    )
    same(model.embed_documents(TEXTS), encoder.encode_document(TEXTS))
    same([model.embed_query(text) for text in TEXTS], encoder.encode_query(TEXTS))
    same(model.embed_documents(["two\nlines"]), encoder.encode_document(["two lines"]))
    plain = langchain.HuggingFaceEmbeddings(model_name=folder)
    same(plain.embed_documents(TEXTS), encoder.encode(TEXTS))
    same([plain.embed_query(text) for text in TEXTS], encoder.encode(TEXTS))


def test_llama_index(saved):
    llama = pytest.importorskip(
        "llama_index.embeddings.huggingface", reason="LlamaIndex is not installed"
    )
    folder, encoder = saved
    prompts = prompts_of(folder)
    model = llama.HuggingFaceEmbedding(
        model_name=folder,
        query_instruction=prompts["query"],
        text_instruction=prompts["document"],
    )
    same(model.get_text_embedding_batch(TEXTS), unit(encoder.encode_document(TEXTS)))
    same([model.get_query_embedding(t) for t in TEXTS], unit(encoder.encode_query(TEXTS)))


def test_chroma(saved):
    functions = pytest.importorskip(
        "chromadb.utils.embedding_functions", reason="Chroma is not installed"
    )
    folder, encoder = saved
    function = functions.SentenceTransformerEmbeddingFunction(model_name=folder)
    same(function(TEXTS), encoder.encode_document(TEXTS))
    same(function.embed_query(TEXTS), encoder.encode(TEXTS))  # it has one call for both


def test_haystack(saved):
    haystack = pytest.importorskip("haystack", reason="Haystack is not installed")
    embedders = pytest.importorskip(
        "haystack_integrations.components.embedders.sentence_transformers",
        reason="sentence-transformers-haystack is not installed",
    )
    folder, encoder = saved
    of_documents = embedders.SentenceTransformersDocumentEmbedder(model=folder, progress_bar=False)
    of_queries = embedders.SentenceTransformersTextEmbedder(
        model=folder, progress_bar=False, encode_kwargs={"prompt_name": "query"}
    )
    for component in (of_documents, of_queries):
        component.warm_up()
    rows = of_documents.run([haystack.Document(content=text) for text in TEXTS])["documents"]
    same([row.embedding for row in rows], encoder.encode_document(TEXTS))
    same([of_queries.run(text)["embedding"] for text in TEXTS], encoder.encode_query(TEXTS))


def test_empty_prompts_put_over_those_of_a_folder_are_told_of_on_the_card(saved):
    """LlamaIndex does so, and BOS is then averaged in; what the card says instead is exact."""
    folder, encoder = saved
    over = SentenceTransformer(folder, device="cpu", prompts={"query": "", "text": ""})
    assert abs(over.encode(["word"], prompt_name="text") - encoder.encode(["word"])).max() > 0.1
    prompts = prompts_of(folder)
    same(over.encode(TEXTS, prompt=prompts["document"]), encoder.encode_document(TEXTS))
    same(over.encode(TEXTS, prompt=prompts["query"]), encoder.encode_query(TEXTS))
    card = (Path(folder) / "README.md").read_text(encoding="utf-8")
    assert "`prompts` in `config_sentence_transformers.json`" in " ".join(card.split())
