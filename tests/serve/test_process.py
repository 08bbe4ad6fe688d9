"""The server over real sockets: who hangs up, who does not read, a full queue, and its end."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from unittest.mock import patch

import psutil
import pytest
from support.commands import COMMAND
from support.serving import PATIENCE, Gate, Listener, asked, listening, told
from support.vectors import close

from unmasked.errors import UnmaskedError
from unmasked.serve import Limits, Service, bind, model_names
from unmasked.serve.access import Keys
from unmasked.serve.process import server_config, url

SECRET = "a text that is nobody's business"
KEY = "the-key-that-no-log-may-hold"


@contextmanager
def gated(encoder, limits=None):
    """A running service with one thread of forwards, its address, and the gate before them."""
    with patch("unmasked.serve.service.forwards_at_once", return_value=1):
        service = Service({"tiny": encoder}, limits)
    gate = Gate(service, "tiny")
    with service, listening(service) as address:
        try:
            yield service, address, gate
        finally:
            gate.opened.set()


def connect(address) -> socket.socket:
    return socket.create_connection(address, timeout=PATIENCE)


def closed(connection: socket.socket) -> bool:
    with connection:
        return connection.recv(1) == b""


def status(connection: socket.socket) -> int:
    with connection, connection.makefile("rb") as stream:
        return int(stream.readline().split()[1])


def test_a_client_that_hangs_up_is_not_computed(encoder):
    with gated(encoder) as (service, address, gate):
        dropped, queued = told(service.measures, "dropped"), told(service.queue, "put")
        first = connect(address)
        first.sendall(asked("/embed", {"inputs": [[5]]}))
        assert gate.entered.wait(PATIENCE)
        queued.clear()
        second = connect(address)
        second.sendall(asked("/embed", {"inputs": [[6], [7]]}))
        assert queued.wait(PATIENCE) and service.queue.texts == 2
        second.close()
        assert dropped.wait(PATIENCE) and service.queue.texts == 0
        gate.opened.set()
        assert status(first) == 200
    assert [row.ids[-1] for row in gate.rows] == [5]


def test_a_client_that_hangs_up_with_half_a_body_is_forgotten(encoder):
    with gated(encoder) as (service, address, gate):
        dropped = told(service.measures, "dropped")
        with connect(address) as half:
            half.sendall(asked("/embed", {"inputs": ["a"] * 50})[:-20])
        assert dropped.wait(PATIENCE)
    assert gate.rows == []


def test_a_full_queue_is_told_at_once(encoder):
    with gated(encoder, Limits(queue=2)) as (service, address, gate):
        first, second, third = (connect(address) for _ in range(3))
        first.sendall(asked("/embed", {"inputs": [[5]]}))
        assert gate.entered.wait(PATIENCE)
        queued = told(service.queue, "put")
        second.sendall(asked("/embed", {"inputs": [[5], [6]]}))
        assert queued.wait(PATIENCE)
        third.sendall(asked("/embed", {"inputs": [[7]]}))
        with third.makefile("rb") as stream:
            head = [line.decode() for line in iter(stream.readline, b"\r\n")]
        assert head[0].startswith("HTTP/1.1 429")
        assert any(line.startswith("retry-after: ") for line in head)
        gate.opened.set()
        assert [status(first), status(second)] == [200, 200]
        third.close()


def test_a_forward_that_takes_too_long_is_given_up_by_its_client(encoder):
    with gated(encoder, Limits(seconds=0.2)) as (service, address, _):
        connection = connect(address)
        connection.sendall(asked("/embed", {"inputs": "a"}))
        assert status(connection) == 504
        assert service.queue.texts == 0


def test_headers_that_do_not_end_are_given_up(encoder):
    """Those of the first request of a connection and of a later one; an answer is not cut off."""
    with gated(encoder, Limits(seconds=1.0)) as (_, address, gate):
        gate.opened.set()
        half = b"POST /embed HTTP/1.1\r\nHost: he"
        silent, first, later = (connect(address) for _ in range(3))
        first.sendall(half)
        later.sendall(asked("/embed", {"inputs": "a"}))
        assert later.recv(1 << 16).startswith(b"HTTP/1.1 200")
        later.sendall(half)
        assert [closed(connection) for connection in (silent, first, later)] == [True] * 3
        later = connect(address)
        later.sendall(half)
        later.sendall(asked("/embed", {"inputs": "a"})[len(half) - 2 :])
        assert status(later) == 200


def test_an_idle_connection_outlives_that_of_a_load_balancer(service):
    """Else the balancer sends a request into a connection that is being closed, and says 502."""
    assert server_config(service, Keys()).timeout_keep_alive > 60


def test_a_client_that_does_not_read_holds_up_nobody_and_is_given_up(encoder):
    with gated(encoder, Limits(seconds=2.0)) as (service, address, gate):
        gate.opened.set()
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(address)
        slow.sendall(asked("/embed", {"inputs": [[5]] * 2048, "normalize": False}) * 8)
        connection = HTTPConnection(*address, timeout=PATIENCE)
        for _ in range(3):
            headers = {"content-type": "application/json"}
            connection.request("POST", "/embed", b'{"inputs": "a"}', headers)
            answer = connection.getresponse()
            assert answer.status == 200 and len(json.loads(answer.read())[0]) == 32
        ended = told(service.measures, "answered")
        assert ended.wait(PATIENCE)
        connection.close()
        slow.close()


def test_what_was_accepted_is_answered_before_the_server_ends(encoder):
    service = Service({"tiny": encoder})
    gate, queued = Gate(service, "tiny"), threading.Semaphore(0)
    put = service.queue.put
    service.queue.put = lambda *given: (put(*given), queued.release())
    taken = Listener()
    with service, ExitStack() as running:
        address = running.enter_context(listening(service, taken=taken))
        accepted = [connect(address) for _ in range(5)]
        for connection in accepted:
            connection.sendall(asked("/embed", {"inputs": ["a", "b"]}))
            assert queued.acquire(timeout=PATIENCE)
        end = threading.Thread(target=running.close)
        end.start()
        assert taken.ended.wait(PATIENCE)
        with pytest.raises(ConnectionRefusedError):
            connect(address)
        gate.opened.set()
        assert [status(connection) for connection in accepted] == [200] * 5
        end.join(PATIENCE)


def test_what_a_second_ctrl_c_cuts_off_is_told_so_and_counted(encoder, capfd):
    service = Service({"tiny": encoder})
    gate = Gate(service, "tiny")
    with service:
        with listening(service, force=True) as address:
            connection = connect(address)
            connection.sendall(asked("/embed", {"inputs": "a"}))
            assert gate.entered.wait(PATIENCE)
        answer = connection.recv(1 << 16)
        connection.close()
        gate.opened.set()
    assert answer.startswith(b"HTTP/1.1 503") and b'"code":"server_stopped"' in answer
    assert service.measures.unanswered == 1
    assert 'route="/embed",status="503"} 1.0' in service.measures.text().decode()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "cut_off, said", [(0, "every accepted request was answered"), (2, "not answered: 2")]
)
def test_the_end_is_told_as_it_was(cli, tiny_decoder, monkeypatch, cut_off, said):
    monkeypatch.setattr("unmasked.serve.run_server", lambda *_: cut_off)
    code, _, err = cli("serve", tiny_decoder, "--port", "0")
    assert code == 0 and err.rstrip().endswith(said)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def server(tiny_decoder, tmp_path):
    """The command in a process of its own; its log is in a file."""
    (tmp_path / "keys").write_text(KEY)
    log = (tmp_path / "log").open("w+")
    options = ["--port", "0", "--api-key-file", str(tmp_path / "keys"), "--dtype", "float32"]
    process = subprocess.Popen(
        [*COMMAND, "serve", f"tiny={tiny_decoder}", *options],
        stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert " at http://127.0.0.1:" in line, (tmp_path / "log").read_text()
        yield process, line.split(" at ")[1].split()[0].removesuffix("/v1"), tmp_path / "log"
    finally:
        process.kill()
        process.wait()


def post(address: str, texts: list[str]) -> list[list[float]]:
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    body = json.dumps({"inputs": texts, "normalize": False}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(f"{address}/embed", body, headers), timeout=PATIENCE
    ) as answer:
        return json.load(answer)


def test_sigterm_under_load_ends_the_process_in_order(server, encoder, sentences):
    """Clients get their vectors, or find that nobody is there; never an error or half an answer."""
    process, address, log = server
    expected = encoder.encode(sentences)
    answered, begun = threading.Semaphore(0), time.monotonic()

    def load(_: int) -> int:
        done = 0
        while time.monotonic() < begun + PATIENCE:
            try:
                found = post(address, [*sentences, SECRET])
            except OSError as error:  # the connection itself, or what urllib made of it
                assert isinstance(getattr(error, "reason", error), ConnectionError), error
                return done
            close(found[:-1], expected)
            done += 1
            answered.release()
        raise AssertionError("the server does not stop")

    with ThreadPoolExecutor(8) as clients:
        counts = [clients.submit(load, index) for index in range(8)]
        for _ in range(16):
            while not answered.acquire(timeout=1):
                assert not any(count.done() for count in counts), [c.result() for c in counts]
        process.send_signal(signal.SIGTERM)
        assert sum(count.result(PATIENCE) for count in counts) >= 16
    assert process.wait(PATIENCE) == 0
    said = log.read_text()
    assert "every accepted request was answered" in said
    assert SECRET not in said and KEY not in said and "Traceback" not in said


def test_the_address_is_checked_before_a_model_is_loaded(cli):
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        code, _, said = cli("serve", "no-such-model", "--port", port)
    assert code == 2 and f"cannot listen on 127.0.0.1 port {port}" in said and "Fix:" in said


def test_an_address_that_is_not_of_this_machine_is_an_error():
    with pytest.raises(UnmaskedError, match="Fix: another --port"):
        bind("192.0.2.1", 0)


def test_an_address_is_shown_as_it_is_written():
    with bind("127.0.0.1", 0) as taken:
        assert url(taken) == f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_models_are_named_as_clients_should_call_them(tmp_path):
    folder = tmp_path / "law"
    folder.mkdir()
    given = ["nano", str(folder), "org/model", "a=org/other", f"b={folder}"]
    assert model_names(given) == {
        "nano": "nano", "law": str(folder), "org/model": "org/model", "a": "org/other",
        "b": str(folder),
    }  # fmt: skip
    with pytest.raises(UnmaskedError, match="two models are called 'law'. Fix: .*serve"):
        model_names([str(folder), f"law={folder}"])


# --- much of it -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_thousand_mixed_requests_without_an_error_in_flat_memory(server, sentences):
    """Short and long, one and many, refused and cut; memory is read when a tenth is done."""
    process, address, _ = server
    host = address.removeprefix("http://")
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    ids = [[5] * count for count in range(9)]
    bodies = [
        ("/embed", {"inputs": sentences[0]}, 200),
        ("/embed", {"inputs": [*sentences[:3], ""]}, 200),
        ("/v1/embeddings", {"input": sentences[3] * 40, "truncate": True}, 200),
        ("/v1/embeddings", {"input": sentences[3] * 40}, 400),
        ("/v1/embeddings", {"input": ids, "encoding_format": "base64"}, 200),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": sentences[:2]}}, 200),
        ("/v1/embeddings", {"input": "a", "model": "none"}, 404),
        ("/v1/embeddings", {"input": [], "x": 1}, 400),
    ]  # fmt: skip

    def load(seed: int, count: int) -> int:
        draw, connection, wrong = random.Random(seed), HTTPConnection(host, timeout=PATIENCE), 0
        for _ in range(count):
            path, body, expected = draw.choice(bodies)
            connection.request("POST", path, json.dumps(body), headers)
            answer = connection.getresponse()
            json.loads(answer.read())
            wrong += answer.status != expected
        connection.close()
        return wrong

    memory = psutil.Process(process.pid).memory_info
    with ThreadPoolExecutor(16) as clients:
        assert sum(clients.map(load, range(16), [125] * 16)) == 0
        before = memory().rss
        assert sum(clients.map(load, range(16, 32), [1125] * 16)) == 0
    assert memory().rss - before < 40 << 20
