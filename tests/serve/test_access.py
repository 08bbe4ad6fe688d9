"""Who may come in, with what; and what a client and a log are told of a failure."""

from __future__ import annotations

import json
import logging
import random

import numpy as np
import pytest
from starlette.testclient import TestClient

from unmasked.errors import UnmaskedError
from unmasked.serve import Limits, Service, application, read_keys
from unmasked.serve.access import OPEN, Keys

SECRET = "a text that is nobody's business"
JSON = {"content-type": "application/json"}


def refused(answer, status: int, code: str) -> str:
    """The message of an error, which is in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == code
    return error["message"]


# --- bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, code, said",
    [
        ({"input": []}, "empty_input", "the list is empty"),
        ({"input": [[], []]}, None, ""),
        ({}, "missing", "input: Field required"),
        ({"input": None}, "invalid_type", "input is not a string, a list"),
        ({"input": ["a", 1]}, "invalid_type", "input is not a string, a list"),
        ({"input": [1, True]}, "invalid_type", "input is not"),
        ({"input": [-1]}, "invalid_type", "input is not"),
        ({"input": [[1], "a"]}, "invalid_type", "input is not"),
        ({"input": [10**6]}, "invalid_token", "token 1000000 is not one of the"),
        ({"input": "a", "promt": "b"}, "unknown_field", "did you mean 'prompt'?"),
        ({"inputs": "a"}, "unknown_field", "did you mean 'input'?"),
        ({"input": "a", "prompt_name": "qery"}, "no_prompt", "did you mean 'query'?"),
        ({"input": "a", "prompt": "b", "input_type": "query"}, "conflict", "exclude each other"),
        ({"input": "a", "dimensions": 33}, "invalid_dimensions", "tiny has 32"),
        ({"input": "a", "dimensions": 0}, "greater_than_equal", "dimensions: Input should be"),
        ({"input": "a", "encoding_format": "hex"}, "literal_error", "'float' or 'base64'"),
        ({"input": "a", "prompt": "b " * 40}, "invalid_input", "leaves no room for the text"),
    ],
)
def test_a_body_that_does_not_fit_is_told_why(client, body, code, said):
    answer = client.post("/v1/embeddings", json=body)
    if code is None:  # two empty texts
        assert answer.status_code == 200
    else:
        assert said in refused(answer, 400, code)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b'{"input": "\\ud800"}', b"\xff\xfe", b'{"input": NaN}']
)
def test_a_body_that_is_no_json_is_told_so(client, body):
    answer = client.post("/v1/embeddings", content=body, headers=JSON)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_an_error_names_the_field_at_fault(encoder):
    """As the body calls it; a nested field is compared with its neighbours."""
    compared = {"source_sentence": "a", "sentences": ["b", "c", "d"]}
    with Service({"tiny": encoder}, Limits(inputs=2)) as service:
        client = TestClient(application(service))
        for path, body, field in (
            ("/v1/embeddings", {"input": []}, "input"),
            ("/embed", {"inputs": []}, "inputs"),
            ("/v1/embeddings", {"input": ["a"] * 3}, "input"),
            ("/embed", {"inputs": ["a"] * 3}, "inputs"),
            ("/similarity", {"inputs": compared}, "inputs"),
        ):
            assert client.post(path, json=body).json()["error"]["param"] == field
        for body, said in (
            ({"inputs": {**compared, "x": 1}}, "Allowed: source_sentence, sentences."),
            ({"inputs": compared, "parameters": {"trunkate": 1}}, "did you mean 'truncate'?"),
        ):
            assert said in refused(client.post("/similarity", json=body), 400, "unknown_field")


def test_the_similarity_of_nothing_is_an_error(client):
    body = {"inputs": {"source_sentence": "a", "sentences": []}}
    refused(client.post("/similarity", json=body), 400, "empty_input")
    body = {"inputs": {"source_sentence": "a", "sentences": ["b"]}, "prompt_name": "query"}
    body["parameters"] = {"prompt_name": "query"}
    assert "given twice" in refused(client.post("/similarity", json=body), 400, "value_error")


def test_a_body_has_to_be_declared_as_json_and_may_not_be_compressed(client):
    plain = client.post(
        "/embed", content=b'{"inputs": "a"}', headers={"content-type": "text/plain"}
    )
    refused(plain, 415, "unsupported_media_type")
    packed = {**JSON, "content-encoding": "gzip"}
    refused(client.post("/embed", content=b"", headers=packed), 415, "unsupported_encoding")


def test_routes_that_do_not_exist_are_errors_in_the_same_shape(client):
    refused(client.get("/v2/embeddings"), 404, "http_error")
    refused(client.get("/v1/embeddings"), 405, "http_error")
    assert [client.head(path).status_code for path in ("/health", "/ready")] == [200, 200]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_refused(encoder, declared):
    body = b'{"input": "' + b"a" * 2000 + b'"}'
    with Service({"tiny": encoder}, Limits(body=1000)) as service:
        client = TestClient(application(service))
        content = body if declared else iter([body[:1500], body[1500:]])  # iterators are chunked
        refused(client.post("/embed", content=content, headers=JSON), 413, "body_too_large")


def test_too_many_texts_in_a_request_are_refused(encoder):
    with Service({"tiny": encoder}, Limits(inputs=3)) as service:
        client = TestClient(application(service))
        for many in (["a"] * 4, [[5]] * 4):
            answer = client.post("/v1/embeddings", json={"input": many})
            assert "4 inputs; 3 are allowed" in refused(answer, 400, "too_many_inputs")
        assert client.post("/v1/embeddings", json={"input": [5] * 9}).status_code == 200


# --- hostile bodies -------------------------------------------------------------------------------

WORDS = ["input", "inputs", "model", "prompt", "dimensions", "truncate", "parameters", "x", ""]


def hostile(draw: random.Random, depth: int = 0) -> str:
    """A piece of JSON, or of what looks like it."""
    kinds = 12 if depth < 4 else 8
    kind = draw.randrange(kinds)
    if kind < 8:
        return draw.choice([
            "NaN", "Infinity", "1e999", "-0", "9" * 5000, "null", "true", '"\\u0000"',
            '"\\ud83d"', '"\\udc00\\ud800"', json.dumps("a" * draw.randrange(300)), "\x00", "1.5",
            "[" * draw.randrange(3000), '"' + "\ufdd0" * 5 + '"', "[" + "1," * 2000 + "1]",
            "[" + ",".join(['"a"'] * 50) + "]", '{"a":' * 300 + "1" + "}" * 300, '""', '"<s>"',
        ])  # fmt: skip
    if kind < 10:
        parts = [hostile(draw, depth + 1) for _ in range(draw.randrange(4))]
        return "[" + ",".join(parts) + "]"
    names = [draw.choice(WORDS) for _ in range(draw.randrange(5))]
    return "{" + ",".join(f'"{name}": {hostile(draw, depth + 1)}' for name in names) + "}"


def hostile_body(draw: random.Random, path: str) -> bytes:
    """A request whose fields hold, mostly, something else; now and then with bytes mixed up."""
    usual = {"/v1/embeddings": '"input": "a"', "/embed": '"inputs": ["a", ""]'}.get(
        path, '"inputs": {"source_sentence": "a", "sentences": ["b"]}'
    )
    fields = [usual] if draw.random() < 0.5 else []
    fields += [
        f'"{draw.choice(WORDS)}": {hostile(draw)}' for _ in range(draw.choice([0, 0, 1, 2, 3]))
    ]
    body = bytearray(f"{{{','.join(fields)}}}".encode())
    for _ in range(draw.choice([0, 0, 1, 5])):
        body[draw.randrange(len(body))] = draw.randrange(256)
    return bytes(body)


def attack(client, count: int) -> None:
    draw = random.Random(count)
    seen = set()
    for _ in range(count):
        path = draw.choice(["/v1/embeddings", "/embed", "/similarity"])
        body = hostile_body(draw, path)
        answer = client.post(path, content=body, headers=JSON)
        assert answer.status_code in (200, 400, 404), (body[:300], answer.text[:300])
        assert answer.status_code == 200 or answer.json()["error"]["message"]
        seen.add(answer.status_code)
    assert {200, 400} <= seen
    assert client.post("/embed", json={"inputs": "a"}).status_code == 200


def test_hostile_bodies_are_answered_and_leave_no_mark(client):
    attack(client, 300)


@pytest.mark.slow
def test_thousands_of_hostile_bodies_are_answered(client):
    attack(client, 5000)


@pytest.mark.parametrize("element", ["1.5", "null", '"a", 1', "[[1]]", "{}"])
def test_the_first_fault_of_a_huge_list_ends_its_check(client, element):
    """A fault a member would make a list of errors that is many times the body."""
    body = b'{"input": [' + b", ".join([element.encode()] * 200_000) + b"]}"
    refused(client.post("/v1/embeddings", content=body, headers=JSON), 400, "invalid_type")


# --- keys -----------------------------------------------------------------------------------------


def test_without_a_key_nobody_comes_in(service):
    client = TestClient(application(service, Keys(["first", "k\u00e9y"])))
    body = {"inputs": "a"}
    for header in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer firs",
        "Bearer first2",
        "first",
        "Basic x",
    ):
        headers = {} if header is None else {"authorization": header}
        answer = client.post("/embed", json=body, headers=headers)
        assert "Authorization: Bearer KEY" in refused(answer, 401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    for key in ("Bearer first", "bearer first", "Bearer k\u00e9y"):
        headers = {"authorization": key.encode()}
        assert client.post("/embed", json=body, headers=headers).status_code == 200
    for path in ("/v1/models", "/metrics", "/nothing"):
        refused(client.get(path), 401, "invalid_api_key")
    assert {client.get(path).status_code for path in OPEN} == {200}


def test_keys_come_from_a_file_and_from_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# mine\n one \n\ntwo\n")
    assert [*map(len, (read_keys(file, {})._digests, read_keys(None, {})._digests))] == [2, 0]
    assert len(read_keys(file, {"UNMASKED_API_KEYS": "three,four five\n"})._digests) == 5
    file.write_text("# none yet\n")
    with pytest.raises(UnmaskedError, match="holds no key. Fix: openssl rand"):
        read_keys(file, {})
    file.write_bytes(b"\xef\xbb\xbfone\n")  # with a BOM
    read_keys(file, {}).admit({"path": "/embed", "headers": [(b"authorization", b"Bearer one")]})
    for empty in ("", " ,\n"):
        with pytest.raises(UnmaskedError, match="is set but holds no key. Fix: export UNMASKED_"):
            read_keys(None, {"UNMASKED_API_KEYS": empty})


# --- failures -------------------------------------------------------------------------------------


def test_a_failure_tells_neither_client_nor_log_what_it_was_about(encoder, caplog):
    """Only the text at fault fails, however many shared its forward."""

    def compute(rows):
        if any(9 in row.ids for row in rows):
            raise KeyError(SECRET)
        return np.zeros((len(rows), 32), np.float32)

    service = Service({"tiny": encoder})
    service.forwards.models = {"tiny": compute}
    with service, caplog.at_level(logging.DEBUG):
        client = TestClient(application(service, Keys(["the key"])))
        client.headers = {"authorization": "Bearer the key"}
        bad = {"input": [[3, 9], [3]]}
        message = refused(client.post("/v1/embeddings", json=bad), 500, "internal_error")
        assert "its log says where" in message
        assert client.post("/v1/embeddings", json={"input": [[3]]}).status_code == 200
        assert client.get("/ready").status_code == 200
        for _ in range(5):
            client.post("/v1/embeddings", json={"input": [3, 9], "prompt": SECRET[:9]})
        assert client.get("/ready").json() == {"status": "failing"}
        assert client.get("/health").status_code == 503
        assert client.post("/v1/embeddings", json={"input": [[3]]}).status_code == 200
        assert client.get("/health").status_code == 200
    assert "A forward failed with KeyError" in caplog.text and "test_access.py" in caplog.text
    assert SECRET not in caplog.text and "the key" not in caplog.text


def test_numbers_that_are_not_finite_are_an_error(encoder, monkeypatch):
    service = Service({"tiny": encoder})
    with service:
        client = TestClient(application(service))
        pool = encoder[1]
        original = pool.forward

        def broken(features, **options):
            found = original(features, **options)
            found["sentence_embedding"] = found["sentence_embedding"] * float("inf")
            return found

        monkeypatch.setattr(pool, "forward", broken)
        refused(client.post("/embed", json={"inputs": "a"}), 500, "internal_error")


# --- what is shown --------------------------------------------------------------------------------


def test_the_page_describes_every_route_and_its_bodies(client):
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/v1/embeddings", "/v1/models", "/v1/models/{name}", "/embed", "/similarity", "/health",
        "/ready", "/metrics",
    }  # fmt: skip
    names = set(described["components"]["schemas"])
    text = json.dumps(described)
    used = {word.split('"')[0] for word in text.split("#/components/schemas/")[1:]}
    assert used <= names and {"EmbeddingsBody", "EmbedBody", "SimilarityBody"} <= used
    assert client.get("/docs").status_code == 200


def test_metrics_count_requests_texts_and_tokens(encoder):
    with Service({"tiny": encoder}) as service:
        client = TestClient(application(service))
        client.post("/embed", json={"inputs": [[5, 6], [7]]})
        client.post("/embed", json={"inputs": []})
        client.get("/made/up/by/a/client")
        text = client.get("/metrics").text
    for line in (
        'unmasked_requests_total{route="/embed",status="200"} 1.0',
        'unmasked_requests_total{route="/embed",status="400"} 1.0',
        'unmasked_requests_total{route="other",status="404"} 1.0',
        'unmasked_texts_total{model="tiny"} 2.0',
        'unmasked_tokens_total{model="tiny"} 5.0',
        "unmasked_waiting_texts 0.0",
    ):
        assert line in text
    assert "made/up" not in text


@pytest.mark.slow
def test_requests_made_up_from_the_openapi_page_are_answered_as_it_says(service):
    """Whatever schemathesis makes of the page: no server error, and no answer it does not list."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance as accepted

    schema = schemathesis.openapi.from_asgi("/openapi.json", application(service))

    for operation in schema.get_all_operations():
        made = operation.ok().as_strategy()

        @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=made)
        def answered(case):
            case.call_and_validate(excluded_checks=[accepted])  # a fitting body may ask too much

        answered()
