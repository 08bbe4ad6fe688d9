"""The answers: the vectors of `encode`, in the shapes of OpenAI and of TEI."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from openai import NotFoundError, OpenAI
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from starlette.testclient import TestClient
from support.serving import EVERYBODY
from support.vectors import close

from unmasked import LLM2Vec
from unmasked.serve import Limits, Service, application

TOLERANCE = 1e-6
TEXTS = [
    "The cat sat on the warm mat.",
    "한국어 문장도 문제없이 벡터가 됩니다.",
    "",
    " ",
    "The cat sat on the warm mat.",
    "e\u0301 🙂 \u0000 <s>",
]


@pytest.fixture(scope="session")
def openai(client):
    return OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client)


def vectors(answer) -> np.ndarray:
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return np.array([item.embedding for item in answer.data])


def post(client, path, status=200, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


# --- OpenAI ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_the_openai_client_gets_the_vectors_of_encode(openai, encoder, encoding):
    form = {} if encoding is None else {"encoding_format": encoding}
    answer = openai.embeddings.create(model="tiny", input=TEXTS, **form)
    found = answer.data[0].embedding
    if isinstance(found, str):
        packed = [base64.b64decode(item.embedding) for item in answer.data]
        found = np.stack([np.frombuffer(one, "<f4") for one in packed])
    else:
        found = vectors(answer)
    close(found, encoder.encode(TEXTS), TOLERANCE)
    assert answer.model == "tiny"


def test_a_single_string_is_one_vector_and_tokens_are_counted(openai, encoder):
    answer = openai.embeddings.create(model="tiny", input="The cat")
    close(vectors(answer), encoder.encode(["The cat"]), TOLERANCE)
    (row,) = encoder.backbone.tokenize_inputs(["The cat"])
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == len(row.ids)


@pytest.mark.parametrize("special", [False, True])
def test_token_ids_are_the_text_they_are_of(openai, encoder, special):
    """With BOS in front or without: it is there once."""
    ids = [encoder.tokenizer(text, add_special_tokens=special)["input_ids"] for text in TEXTS[:3]]
    close(
        vectors(openai.embeddings.create(model="tiny", input=ids)),
        encoder.encode(TEXTS[:3]),
        TOLERANCE,
    )
    one = openai.embeddings.create(model="tiny", input=ids[0])
    close(vectors(one), encoder.encode(TEXTS[:1]), TOLERANCE)


def test_fewer_dimensions_are_those_of_encode(openai, encoder):
    answer = openai.embeddings.create(model="tiny", input=TEXTS, dimensions=5)
    close(vectors(answer), encoder.encode(TEXTS, truncate_dim=5), TOLERANCE)


@pytest.mark.parametrize(
    "chosen, options",
    [
        ({"prompt_name": "query"}, {"prompt_name": "query"}),
        ({"prompt": "Say it:\n"}, {"prompt": "Say it:\n"}),
        ({"prompt": ""}, {"prompt": ""}),
        ({"input_type": "query"}, {"prompt": "Find:\n"}),
        ({"input_type": "document"}, {"prompt": ""}),
    ],
)
def test_a_prompt_is_that_of_encode(openai, encoder, chosen, options):
    answer = openai.embeddings.create(model="tiny", input=TEXTS, extra_body=chosen)
    close(vectors(answer), encoder.encode(TEXTS, **options), TOLERANCE)


def test_token_ids_stand_behind_a_prompt(client, encoder):
    ids = [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS[:2]]
    found = post(client, "/embed", inputs=ids, prompt_name="query", normalize=False)
    close(found, encoder.encode(TEXTS[:2], prompt_name="query"), TOLERANCE)


def test_vectors_are_of_length_one_if_asked(client, encoder):
    answer = post(client, "/v1/embeddings", input=TEXTS, normalize=True, dimensions=7)
    expected = encoder.encode(TEXTS, truncate_dim=7, normalize_embeddings=True)
    close([item["embedding"] for item in answer["data"]], expected, TOLERANCE)


def test_many_texts_of_all_lengths_come_back_in_order(client, encoder, sentences):
    texts = [" ".join(sentences[: i % 4]) + str(i) for i in range(300)]
    found = post(client, "/embed", inputs=texts, normalize=False, truncate=True)
    close(found, encoder.encode(texts), TOLERANCE)


def test_the_openai_client_lists_the_models(openai):
    (model,) = openai.models.list().data
    assert (model.id, model.dimensions, model.max_tokens) == ("tiny", 32, 32)
    assert model.prompts == ["query", "passage"]
    assert openai.models.retrieve("tiny") == model
    with pytest.raises(NotFoundError, match="unknown model 'tinny', did you mean 'tiny'"):
        openai.embeddings.create(model="tinny", input="a")
    with pytest.raises(NotFoundError, match="unknown model 'tinny', did you mean 'tiny'"):
        openai.models.retrieve("tinny")


def test_a_model_is_found_by_a_name_with_a_slash(encoder):
    with Service({"org/tiny": encoder, "other": encoder}) as service:
        client = TestClient(application(service))
        one = OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client)
        assert one.models.retrieve("org/tiny").id == "org/tiny"
        assert client.get("/v1/models/org/tiny").json()["id"] == "org/tiny"


# --- TEI ------------------------------------------------------------------------------------------


def test_embed_is_scaled_to_length_one_as_tei_does(client, encoder):
    close(
        post(client, "/embed", inputs=TEXTS),
        encoder.encode(TEXTS, normalize_embeddings=True),
        TOLERANCE,
    )
    close(post(client, "/embed", inputs="a", normalize=False), encoder.encode(["a"]), TOLERANCE)


def test_similarity_is_that_of_the_model(client, encoder):
    first, *others = TEXTS
    found = post(
        client, "/similarity", inputs={"source_sentence": first, "sentences": others},
        parameters={"prompt_name": "query"},
    )  # fmt: skip
    states = encoder.encode(TEXTS, prompt_name="query")
    close(found, encoder.similarity(states[:1], states[1:])[0], TOLERANCE)


def test_modules_behind_the_pooling_are_run(tiny_decoder):
    """A Dense changes the width; every request was answered with an error of the server."""
    encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    encoder.append(Dense(32, 8))
    encoder.append(Normalize())
    with Service({"tiny": encoder}) as service:
        answer = post(TestClient(application(service, EVERYBODY)), "/v1/embeddings", input=TEXTS)
    found = np.array([item["embedding"] for item in answer["data"]])
    close(found, encoder.encode(TEXTS), TOLERANCE)


# --- several models -------------------------------------------------------------------------------


def test_models_are_called_by_their_names(encoder):
    """The second one has its default prompt and its default number of dimensions."""
    from unmasked import LLM2Vec

    other = LLM2Vec(
        encoder.backbone.auto_model, encoder.tokenizer, max_length=16, device="cpu",
        prompts={"query": "Find:\n"},
    )  # fmt: skip
    other.default_prompt_name, other.truncate_dim = "query", 8
    with Service({"one": encoder, "two": other}) as service:
        client = TestClient(application(service))
        for name, model in service.models.items():
            answer = post(client, "/v1/embeddings", input=["a", "b"], model=name)
            found = [item["embedding"] for item in answer["data"]]
            states = model.encoder.encode(["a", "b"])
            close(found, states, TOLERANCE)
            compared = {"source_sentence": "a", "sentences": ["b"]}
            found = post(client, "/similarity", inputs=compared, model=name)
            close(found, model.encoder.similarity(states[:1], states[1:])[0], TOLERANCE)
        error = post(client, "/v1/embeddings", 400, input="a")["error"]
        assert error["param"] == "model" and "one, two" in error["message"]


# --- long texts -----------------------------------------------------------------------------------

LONG = "cat sat on the mat " * 20


@pytest.mark.parametrize("default", [False, True])
def test_a_text_that_is_too_long_is_cut_only_where_that_is_asked_for(encoder, default):
    with Service({"tiny": encoder}, Limits(truncate=default, tokens=20)) as service:
        client = TestClient(application(service))
        for asked in (None, True, False):
            options = {} if asked is None else {"truncate": asked}
            wanted = default if asked is None else asked
            body = {"inputs": ["a", LONG], "normalize": False, **options}
            answer = client.post("/embed", json=body)
            assert answer.status_code == (200 if wanted else 400)
            if wanted:
                encoder.backbone.tokens.max_length = 20
                expected = encoder.encode(["a", LONG])
                encoder.backbone.tokens.max_length = 32
                close(answer.json(), expected, TOLERANCE)
            else:
                assert answer.json()["error"]["code"] == "context_length_exceeded"
                assert "input 1 has" in answer.text and "takes 20" in answer.text


def test_the_length_of_a_very_long_text_is_not_taken_for_known(client, encoder):
    """Only its beginning is tokenised."""
    text = "cat sat on the mat " * 5000
    said = client.post("/embed", json={"inputs": text}).json()["error"]["message"]
    assert "input 0 has at least " in said
    told = int(said.split("at least ")[1].split()[0])
    assert 32 < told < len(encoder.tokenizer(text)["input_ids"])


def test_ids_that_are_too_many_are_cut_only_where_that_is_asked_for(client, encoder):
    ids = encoder.tokenizer(LONG, add_special_tokens=False)["input_ids"]
    post(client, "/embed", 400, inputs=ids)
    found = post(client, "/embed", inputs=ids, truncate=True, normalize=False)
    close(found, encoder.encode([LONG]), TOLERANCE)


def test_a_text_that_fits_exactly_is_not_refused(client, encoder):
    ids = encoder.tokenizer(LONG, add_special_tokens=False)["input_ids"][:31]
    post(client, "/embed", inputs=ids)
    post(client, "/embed", 400, inputs=[*ids, 5])
