"""The server under load, against `encode` on the same texts in the same run.

The server is a process of its own (`python -m unmasked serve`) and the load comes from this one,
over loopback. Everything is a ratio inside one run: `encode` in this process and the server take
turns, and the median round counts. Vectors are compared before anything is timed.

* **closed loop**: so many clients, each of which sends its next text when it has its vector;
* **open loop**: texts come at random (Poisson) at a share of what `encode` does in a second,
  whether the server keeps up or not; latency counts from when a text was due;
* **one client**: what the server adds to the model's own time, which its metrics tell;
* **a rival**: stock sentence-transformers behind a plain FastAPI, under the same closed loop.

The load takes processor time as well: with fewer than two free cores the ratios of wall time are
too low. `closed_vs_encode_cpu` is the ratio of the processor time of both per text, which other
processes distort less.

    python -m benchmarks.serve                             # three minutes on two cores
    python -m benchmarks.serve --model DIR --texts 2000 --json results/serve.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import psutil

from benchmarks.texts import build_mixes, read_sentences
from unmasked import LLM2Vec

LEAST_COSINE = 0.9999
PATIENCE = 120.0
"""Seconds after which a load is given up; what came until then counts."""


@dataclass
class Load:
    """What the clients of one load saw."""

    seconds: float = 0.0
    tokens: int = 0
    latencies: list[float] = field(default_factory=list)
    errors: int = 0

    def facts(self) -> dict[str, float]:
        """Requests and tokens a second, and latencies in milliseconds."""
        found = {
            "requests": len(self.latencies),
            "errors": self.errors,
            "requests_a_second": len(self.latencies) / self.seconds,
            "tokens_a_second": self.tokens / self.seconds,
        }
        for percent in (50, 95, 99):
            found[f"p{percent}_ms"] = float(np.percentile(self.latencies, percent)) * 1000
        return found


class Client:
    """A connection that stays open and sends one request after another."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "", parts.port or 80

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        if not hasattr(self, "reader"):
            self.reader, self.writer = await asyncio.open_connection(
                self.host, self.port, limit=1 << 24
            )
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        self.writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        return int(answer.split(b" ", 2)[1]), await self.reader.readexactly(length)

    def close(self) -> None:
        if hasattr(self, "writer"):
            self.writer.close()


def body_of(text: str) -> bytes:
    """A request as the openai client sends it."""
    return json.dumps({"input": [text], "model": "m", "encoding_format": "base64"}).encode()


async def closed_loop(url: str, texts: Sequence[str], clients: int) -> Load:
    """Each text once, from clients that wait for their answers."""
    bodies, load = iter([body_of(text) for text in texts]), Load()

    async def work() -> None:
        client = Client(url)
        for body in bodies:
            await timed(client, body, time.perf_counter(), load)
        client.close()

    begun = time.perf_counter()
    await asyncio.wait_for(asyncio.gather(*(work() for _ in range(clients))), PATIENCE)
    load.seconds = time.perf_counter() - begun
    return load


async def open_loop(url: str, texts: Sequence[str], rate: float) -> Load:
    """Each text once, at random moments, `rate` a second on average."""
    draw, load, idle = random.Random(0), Load(), [Client(url)]

    async def send(body: bytes, due: float) -> None:
        client = idle.pop() if idle else Client(url)
        await timed(client, body, due, load)
        idle.append(client)

    begun = due = time.perf_counter()
    sent = []
    for text in texts:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        sent.append(asyncio.ensure_future(send(body_of(text), due)))
    await asyncio.wait_for(asyncio.gather(*sent), PATIENCE)
    load.seconds = time.perf_counter() - begun
    for client in idle:
        client.close()
    return load


async def timed(client: Client, body: bytes, since: float, load: Load) -> None:
    """Send a request and note how long it took."""
    status, answer = await client.post("/v1/embeddings", body)
    load.latencies.append(time.perf_counter() - since)
    if status == 200:
        load.tokens += json.loads(answer)["usage"]["total_tokens"]
    else:
        load.errors += 1


# --- servers --------------------------------------------------------------------------------------


@contextmanager
def server(command: Sequence[str]) -> Iterator[tuple[str, psutil.Process]]:
    """A server that says on its first line where it is."""
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " at http" in line, "the server did not start"
        yield line.split(" at ")[1].split()[0].removesuffix("/v1"), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(PATIENCE)


def serve_stock(folder: str, dtype: str) -> None:
    """The rival: what one writes in an afternoon around stock sentence-transformers."""
    import torch
    import uvicorn
    from fastapi import FastAPI
    from sentence_transformers import SentenceTransformer

    stock = SentenceTransformer(folder, model_kwargs={"dtype": getattr(torch, dtype)})
    app = FastAPI()

    @app.post("/v1/embeddings")
    def embeddings(body: dict[str, Any]) -> dict[str, Any]:
        vectors = stock.encode(body["input"])
        data = [{"index": i, "embedding": vector.tolist()} for i, vector in enumerate(vectors)]
        return {"data": data, "usage": {"total_tokens": 0}}

    config = uvicorn.Config(app, port=0, log_level="warning")
    taken = config.bind_socket()
    taken.listen()
    print(f"stock at http://127.0.0.1:{taken.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[taken])


def own_seconds(url: str) -> tuple[float, float]:
    """(seconds, number) of the forwards so far."""
    with urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    named = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    parts = ('unmasked_forward_seconds_sum{model="m"}', 'unmasked_forward_seconds_count{model="m"}')
    return float(named[parts[0]]), float(named[parts[1]])


# --- what is measured -----------------------------------------------------------------------------


def check_vectors(url: str, model: LLM2Vec, texts: Sequence[str]) -> float:
    """The least cosine between what the server answers and what `encode` gives."""

    async def ask() -> bytes:
        client = Client(url)
        body = json.dumps({"inputs": list(texts), "truncate": True}).encode()
        status, answer = await client.post("/embed", body)
        client.close()
        assert status == 200, answer
        return answer

    ours = model.encode(list(texts), normalize_embeddings=True)
    least = float((np.array(json.loads(asyncio.run(ask()))) * ours).sum(axis=1).min())
    assert least > LEAST_COSINE, f"the server's vectors differ from encode's: cosine {least}"
    return least


def offline(model: LLM2Vec, texts: Sequence[str]) -> tuple[float, float]:
    """Texts per second of `encode`, and per second of processor time."""
    begun, used = time.perf_counter(), time.process_time()
    model.encode(list(texts))
    used = time.process_time() - used
    return len(texts) / (time.perf_counter() - begun), len(texts) / used


def used_seconds(process: psutil.Process) -> float:
    """Processor time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(options: argparse.Namespace, model: LLM2Vec, texts: list[str]) -> dict[str, Any]:
    """All loads on our server; ratios are medians over the rounds."""
    command = ["unmasked", "serve", f"m={options.model}", "--port", "0", "--truncate"]
    found: dict[str, Any] = {}
    with server([*command, "--dtype", options.dtype]) as (url, process):
        found["least_cosine"] = check_vectors(url, model, texts[:64])
        before = process.memory_info().rss
        speeds, loads, work = [], [], []
        for _ in range(options.rounds):
            speed, alone = offline(model, texts)
            used = used_seconds(process)
            loads.append(asyncio.run(closed_loop(url, texts, options.clients)))
            speeds.append(speed)
            work.append(len(texts) / (used_seconds(process) - used) / alone)
        shares = [
            load.facts()["requests_a_second"] / speed
            for load, speed in zip(loads, speeds, strict=True)
        ]
        found["encode_texts_a_second"] = median(speeds)
        found["closed"] = loads[int(np.argsort(shares)[len(shares) // 2])].facts()
        found["closed_vs_encode"] = median(shares)
        found["closed_vs_encode_cpu"] = median(work)
        rate = options.rate * median(speeds)
        found["open"] = {
            "rate": rate, **asyncio.run(open_loop(url, texts[: options.single * 2], rate)).facts()
        }  # fmt: skip
        short = [texts[0][:40]] * options.single
        seconds, number = own_seconds(url)
        one = asyncio.run(closed_loop(url, short, 1))
        seconds, number = (b - a for a, b in zip((seconds, number), own_seconds(url), strict=True))
        own = seconds / number * 1000
        found["one"] = {**one.facts(), "model_ms": own}
        found["one"]["added_ms"] = sum(one.latencies) / len(one.latencies) * 1000 - own
        after = process.memory_info().rss
        found["memory_mib"] = {"before": before / 2**20, "after": after / 2**20}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--data", type=Path, help="folder with text/enwiki_sentences.txt.gz")
    parser.add_argument("--texts", type=int, default=640)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--rate", type=float, default=0.6, help="open loop: share of encode's speed"
    )
    parser.add_argument("--single", type=int, default=100, help="requests of the one client")
    parser.add_argument("--no-rival", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    model = LLM2Vec.from_pretrained(options.model, dtype=options.dtype, device="cpu")
    count = model.tokenizer.backend_tokenizer.encode
    mixes = build_mixes(
        read_sentences(options.data),
        {"mixed": options.texts},
        lambda text: len(count(text).ids),
    )
    texts = mixes["mixed"]
    offline(model, texts[:32])
    found = measure(options, model, texts)
    if not options.no_rival:
        with tempfile.TemporaryDirectory() as folder:
            model.save(folder)
            command = ["benchmarks.serve", "--stock", folder, options.dtype]
            with server(command) as (url, _):
                asyncio.run(closed_loop(url, texts[:32], 8))
                rival = asyncio.run(closed_loop(url, texts, options.clients)).facts()
        found["stock"] = rival
        found["vs_stock"] = found["closed"]["requests_a_second"] / rival["requests_a_second"]
    show(found, options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def show(found: dict[str, Any], options: argparse.Namespace) -> None:
    print(f"{options.model}, {options.dtype}, {options.texts} texts, {os.cpu_count()} cores")
    print(f"least cosine to encode  {found['least_cosine']:.7f}")
    print(f"encode                  {found['encode_texts_a_second']:.1f} texts/s")
    for name in ("closed", "open", "one", "stock"):
        if name in found:
            told = (f"{key} {value:.1f}" for key, value in found[name].items())
            print(f"{name:<24}{', '.join(told)}")
    for name in ("closed_vs_encode", "closed_vs_encode_cpu", "vs_stock"):
        if name in found:
            print(f"{name:<24}{found[name]:.2f}")
    memory = found["memory_mib"]
    print(f"memory of the server    {memory['before']:.0f} MiB, later {memory['after']:.0f} MiB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stock"]:
        serve_stock(*sys.argv[2:])
    else:
        main()
