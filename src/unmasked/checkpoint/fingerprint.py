"""What tells one model from another, so that scores and vectors are never taken for another's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from unmasked.model import LLM2Vec

_SAMPLED = 1024  # values looked at of each tensor
_PLAIN = (bool, bytes, float, int, str, torch.dtype, type(None))


def fingerprint(model: LLM2Vec) -> str:
    """A digest, in hexadecimal, of the weights, the tokenizer and the settings of a model.

    Of each weight it reads 1024 values, evenly spaced: milliseconds, and no training step leaves
    them all as they were.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        for part in _parts(value):
            digest.update(part)
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        words = json.loads(backend.to_str())
        words.pop("truncation", None)  # these two change as it is used
        words.pop("padding", None)
    else:
        words = model.tokenizer.get_vocab()
    settings = [words, asdict(model.settings), model.backbone.tokens.counted]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _parts(value: object) -> Iterator[bytes]:
    """What is looked at of an entry of a state dict; quantised layers pack theirs.

    Of an object that is neither a tensor nor a plain value its type alone counts: what it shows of
    itself may differ from process to process.
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
        if hasattr(value, "__tensor_flatten__"):  # a subclass made of other tensors
            yield from _parts([getattr(value, name) for name in value.__tensor_flatten__()[0]])
            return
        plain = value.detach().dequantize() if value.is_quantized else value.detach()
        flat = plain.reshape(-1)[:: max(1, plain.numel() // _SAMPLED)]
        yield flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()
