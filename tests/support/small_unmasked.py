"""The command line with `nano` in the place of every model and a few steps in that of many.

Run in the place of ``unmasked`` by the tests of the documentation, so that a page is executed as
it stands. A server is started, asked whether it is ready, and told to end.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from unmasked.recipe.files import load_recipe

SMALL = {
    "mntp": {"steps": 2, "batch_size": 2, "block_length": 16, "held_out": 8, "warmup_steps": 0,
             "schedule_steps": "null"},
    "simcse": {"steps": 2, "batch_size": 4, "held_out": 2, "warmup_steps": 0,
               "schedule_steps": "null"},
    "supervised": {"steps": 2, "batch_size": 4, "held_out": 2, "warmup_steps": 0},
}  # fmt: skip
COMMAND = [sys.executable, "-m", "unmasked"]
SECONDS = 120


def small(words: list[str]) -> list[str]:
    """The command with small settings behind its own, which take precedence."""
    verb = words[0]
    stages: list[str] = []
    if verb == "train":
        stages = [words[1]]
    elif verb in {"run", "plan"}:
        given = [word for word in words[2:] if "=" in word]
        stages = [name for name, _ in load_recipe(words[1], given).stages()]
        words = [*words, "model.base=nano", "model.revision=null"]
    return [*words, *(f"{s}.{key}={value}" for s in stages for key, value in SMALL[s].items())]


def serve(words: list[str]) -> int:
    """Start a server, wait until it is ready, and end it as a supervisor would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([*COMMAND, *words, "--port", str(port)])
    end = time.monotonic() + SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1):
                break
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    server.send_signal(signal.SIGTERM)
    return server.wait(SECONDS)


if __name__ == "__main__":
    given = sys.argv[1:]
    if given[0] == "serve":
        sys.exit(serve(given))
    sys.exit(subprocess.run([*COMMAND, *small(given)], check=False).returncode)
