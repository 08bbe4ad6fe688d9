"""A digest that tells one model from another, so that scores and vectors are never mixed up.

Cost: milliseconds; about `SAMPLED` values of each weight are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

SAMPLED = 1024
"""Number of evenly spaced values read of each weight; a training step changes some of them."""
_PLAIN = (bool, bytes, float, int, str, torch.dtype, type(None))


def fingerprint(state: Mapping[str, object], tokenizer: Any, settings: list[Any]) -> str:
    """A digest of a model, in hexadecimal.

    Args:
        state: its `state_dict`.
        tokenizer: its tokenizer; padding and truncation, which change while it is used, are left
            out.
        settings: everything else that determines the vectors, as JSON values.
    """
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        for part in _parts(value):
            digest.update(part)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:
        content.pop("truncation", None)
        content.pop("padding", None)
    digest.update(json.dumps([content, *settings], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _parts(value: object) -> Iterator[bytes]:
    """The bytes that represent an entry of a state dict; quantized layers have nested entries.

    An object that is neither a tensor nor a plain value is represented by its type alone, because
    its ``repr`` may differ from process to process.
    """
    if isinstance(value, Mapping):
        value = sorted(value.items())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    elif not isinstance(value, Tensor):
        yield repr(value if isinstance(value, _PLAIN) else type(value)).encode()
    else:
        yield f"{tuple(value.shape)} {value.dtype}".encode()
        if hasattr(value, "__tensor_flatten__"):  # a tensor subclass that wraps other tensors
            yield from _parts([getattr(value, name) for name in value.__tensor_flatten__()[0]])
            return
        plain = value.detach().dequantize() if value.is_quantized else value.detach()
        flat = plain.reshape(-1)[:: max(1, plain.numel() // SAMPLED)]
        yield flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()
