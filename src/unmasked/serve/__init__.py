"""How does a program in any language get the vectors of an encoder, over HTTP?

`run_server` answers OpenAI's ``/v1/embeddings``, TEI's ``/embed`` and ``/similarity`` until it is
told to stop. Its vectors are those that `encode` returns for the same text with the same prompt.

Each request passes through these files: `routes` reads its body and awaits the vectors; a worker
thread checks the body (`wire`) and tokenises the texts (`served_model`); `text_queue` orders the
texts of all requests; `forward_threads` computes the next batch whenever the device is free.
`access` wraps all of it: API keys, limits, errors without a stack trace. `measures` counts.

Cost besides the forward passes: one to two milliseconds per request.
"""

from unmasked.serve.access import Limits, read_keys
from unmasked.serve.process import bind, model_names, run_server
from unmasked.serve.routes import application
from unmasked.serve.service import Service

__all__ = [
    "Limits", "Service", "application", "bind", "model_names", "read_keys", "run_server",
]  # fmt: skip
