"""An encoding in a process of its own, to be killed, starved and counted."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any


def encode(begun: Any, model: str, source: dict, folder: str, limits: dict, **options: Any) -> None:
    """Runs in the child; sets `begun` once the model is there."""
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from unmasked import LLM2Vec
    from unmasked.corpus import Chunks, Encoding, Local, Shards, encode_folder
    from unmasked.files.source import Source

    encoder = LLM2Vec.from_pretrained(model, max_length=32, device="cpu")
    if "bytes" in limits:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limits["bytes"], limits["bytes"]))
    begun.set()
    encoding, shards = options.pop("encoding", {}), options.pop("shards", {})
    if "chunks" in options:
        encoding = {**encoding, "chunks": Chunks(**options.pop("chunks"))}
    encode_folder(
        Local(lambda: encoder), Source(**source), folder, Encoding(**encoding), Shards(**shards)
    )


class Runner:
    """Starts encodings; the libraries are imported once, by the server that forks them."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["unmasked.compat.llm2vec", "unmasked.corpus", "pyarrow.parquet"]
        )

    def start(self, *arguments: Any, limits: dict | None = None, **options: Any) -> Any:
        begun = self.context.Event()
        process = self.context.Process(
            target=encode, args=(begun, *map(_plain, arguments), limits or {}), kwargs=options
        )
        process.start()
        assert begun.wait(120)
        return process

    def run(self, *arguments: Any, **options: Any) -> float:
        """To the end; how many seconds it took without loading."""
        process = self.start(*arguments, **options)
        begun = time.monotonic()
        process.join(3000)
        assert process.exitcode == 0
        return time.monotonic() - begun

    def kill(self, after: float, *arguments: Any, **options: Any) -> bool:
        """SIGKILL after so many seconds; whether it was still at work."""
        process = self.start(*arguments, **options)
        process.join(after)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0


def _plain(argument: Any) -> Any:
    return str(argument) if isinstance(argument, Path) else argument
