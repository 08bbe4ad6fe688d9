"""How does a program in any language get the vectors of an encoder, over HTTP?

`run_server` answers OpenAI's ``/v1/embeddings``, TEI's ``/embed`` and ``/similarity`` until it is
told to stop. A vector is the one that `encode` returns for the same text with the same prompt.

The way of a request: `routes` reads its body and awaits its texts; a worker thread checks it
(`wire`) and tokenises it (`served_model`); `text_queue` orders the texts of all requests; one
thread (`device_thread`) takes as many as fill a forward, whenever the device is free. `access`
stands before all of it: keys, limits, errors without a stack trace. `measures` counts.

Cost beside the forwards: one to two milliseconds a request.
"""

from unmasked.serve.access import Limits, read_keys
from unmasked.serve.process import bind, model_names, run_server
from unmasked.serve.routes import application
from unmasked.serve.service import Service

__all__ = [
    "Limits", "Service", "application", "bind", "model_names", "read_keys", "run_server",
]  # fmt: skip
