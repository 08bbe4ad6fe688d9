"""serve: the server's options, and the messages that it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from unmasked.cli import terminal
from unmasked.cli.options import DTYPE
from unmasked.errors import MissingExtraError

EXTRA_OF_SERVE = ("fastapi", "prometheus_client", "starlette", "uvicorn")
SERVED = Annotated[
    list[str],
    Argument(
        metavar="MODEL",
        help="Hub name, folder or 'nano'; NAME=MODEL sets the name that clients use.",
    ),
]
HOST = Annotated[str, Option(help="Address to listen on; 0.0.0.0 for every network interface.")]
PORT = Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
KEYS = Annotated[
    Path | None,
    Option(
        help="File of API keys, one per line; or set UNMASKED_API_KEYS.", show_default="no keys"
    ),
]
INPUTS = Annotated[int, Option(min=1, help="Maximum number of texts per request.")]
BODY = Annotated[int, Option(min=1, help="Maximum size of a request in MiB.")]
TOKENS = Annotated[
    int | None, Option(min=2, help="Maximum number of tokens per text.", show_default="the model's")
]
CUT = Annotated[
    bool,
    Option("--truncate", help="Cut texts that are too long, unless a request says otherwise."),
]
QUEUE = Annotated[
    int, Option(min=1, help="Maximum number of waiting texts; further requests get status 429.")
]
TIMEOUT = Annotated[float, Option(min=0.1, help="Time limit of a request in seconds.")]
WAIT = Annotated[
    float, Option(min=0, help="Milliseconds that a text may wait for others to join its batch.")
]
BATCH = Annotated[
    int | None,
    Option(min=1, help="Maximum number of tokens per forward pass.", show_default="by device"),
]
EIGHT_BITS = Annotated[
    Literal["int8"] | None,
    Option(help="Use 8-bit weights, on a CPU only: faster, slightly less exact."),
]

COMPILE = Annotated[
    Literal["auto", "always", "never"],
    Option(help="Compile the decoder layers before listening. auto: on a GPU."),
]


def serve(
    models: SERVED,
    host: HOST = "127.0.0.1",
    port: PORT = 8000,
    api_key_file: KEYS = None,
    max_inputs: INPUTS = 2048,
    max_body: BODY = 8,
    max_tokens: TOKENS = None,
    truncate: CUT = False,
    max_queue: QUEUE = 4096,
    timeout: TIMEOUT = 60.0,
    wait_ms: WAIT = 2.0,
    batch_tokens: BATCH = None,
    dtype: DTYPE = "auto",
    quantize: EIGHT_BITS = None,
    compile: COMPILE = "auto",
) -> None:
    """Serve OpenAI's /v1/embeddings and TEI's /embed over HTTP, until SIGTERM or Ctrl-C."""
    with terminal.waiting("starting"):
        try:
            from unmasked import serve as server
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in EXTRA_OF_SERVE:
                raise
            raise MissingExtraError(str(error.name), "serve") from error
    names, keys = server.model_names(models), server.read_keys(api_key_file)
    limits = server.Limits(
        max_body << 20,
        max_inputs,
        max_tokens,
        truncate,
        max_queue,
        timeout,
        wait_ms / 1000,
        batch_tokens,
    )
    with server.bind(host, port) as bound:
        options = {"dtype": dtype, "quantize": quantize, "compile": compile}
        encoders = {name: terminal.load_encoder(m, **options) for name, m in names.items()}
        if host not in ("127.0.0.1", "::1", "localhost") and not keys:
            terminal.say(f"anyone who reaches {host} can use this server: it has no API keys")
        with terminal.waiting("preparing the server"):
            service = server.Service(encoders, limits)
        with service:
            said = ", ".join(names)
            unanswered = server.run_server(
                service, keys, bound, lambda url: terminal.show(f"{said} at {url}/v1 (page: /docs)")
            )
    if unanswered:
        terminal.say(f"stopped; accepted requests that were not answered: {unanswered}")
    else:
        terminal.say("stopped; every accepted request was answered")
