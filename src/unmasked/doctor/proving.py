"""The proof as a separate tool for any model, and how large the numbers in its forward get.

`mask.proof.prove` takes a transformer in memory. Here a name or a folder is enough, whoever saved
it: the model is loaded unchanged, with its mask as it is, so that a project can check its own
encoder in its tests. It also looks for overflows in float16, whose largest number is 65504: in many
decoders a few channels are larger, and the vectors become NaN.

Cost: reading the weights, the proof (eleven forwards of a few tokens), and one forward of a
paragraph with a hook on every module.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import get_device_name
from torch import Tensor, nn

from unmasked.checkpoint import loading
from unmasked.errors import NotBidirectionalError
from unmasked.forward.precision import pick
from unmasked.mask.opening import decoder_of
from unmasked.mask.proof import Proof, evaluating, open_mask, prove

LARGEST_FLOAT16 = torch.finfo(torch.float16).max
PARAGRAPH = (
    "A lighthouse keeper counts ships: 14 on Monday, 9 on Tuesday, none in the fog. "
    "for (i = 0; i < n; ++i) { total += ships[i]; }\n\n"
    "등대지기는 매일 배를 세고 공책에 적는다. Он считает корабли. 灯台守は船を数える。"
)
"""The text for the forward: several scripts, digits, code and blank lines."""


@dataclass(frozen=True)
class Peak:
    """The largest absolute number in the outputs of a layer and of the modules in it."""

    layer: str
    """The name of the layer in the transformer, such as ``layers.3``; for a module outside of the
    layers, its own name."""
    module: str  # the module in the layer whose output has the number; empty for the layer itself
    largest: float  # the number; NaN or infinite if the model overflows in its present number type


@dataclass(frozen=True)
class ModelProof:
    """The result of `prove_model`."""

    proof: Proof  # the proof of the mask
    peaks: tuple[Peak, ...]
    """One for each layer, in order, and for each module outside of the layers."""

    @property
    def highest(self) -> Peak | None:
        """The largest of all peaks; None if the forward fails."""
        return max(self.peaks, key=lambda peak: _order(peak.largest), default=None)

    @property
    def float16_overflows(self) -> bool | None:
        """Whether a number of this forward is too large for float16; None if the forward fails."""
        return None if self.highest is None else not self.highest.largest <= LARGEST_FLOAT16

    def as_dict(self) -> dict[str, Any]:
        """The result for strict JSON; numbers that are not finite become None."""
        peaks = [
            asdict(peak) | {"largest": peak.largest if math.isfinite(peak.largest) else None}
            for peak in self.peaks
        ]
        overflows = self.float16_overflows
        return {**self.proof.as_dict(), "float16_overflows": overflows, "peaks": peaks}


def prove_model(model: str | Path | nn.Module, *, open: bool = False, **hub: Any) -> ModelProof:
    """Prove that a model sees both ways, as it is.

    >>> import unmasked
    >>> unmasked.prove("nano").proof.verdict, unmasked.prove("nano", open=True).proof.verdict
    ('impossible', 'full')

    Args:
        model: a folder, a hub name or ``nano``; or a model in memory: a transformer, with or
            without a head or adapters, a `SentenceTransformer` or an `LLM2Vec`. A model in memory
            is not changed, unless it is opened.
        open: open the mask first, as `LLM2Vec.from_pretrained` does.
        hub: options for a hub name: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
        ModelError: the model cannot be loaded.
    """
    ids: list[int] | None = None
    report: Proof | None = None
    network: Any = model
    if isinstance(model, str | Path):
        found = loading.find(model, **hub)
        network, report = _load(found, open)
        ids = found.tokenizer(PARAGRAPH)["input_ids"]
    else:
        if isinstance(model, SentenceTransformer):
            ids = model.tokenizer(PARAGRAPH)["input_ids"]
            network = network[0].auto_model
        report = open_mask(network) if open else None
    decoder = decoder_of(network)
    return ModelProof(report or prove(network), _peaks(decoder, ids or _any_ids(decoder)))


def _load(found: loading.Found, opened: bool) -> tuple[nn.Module, Proof | None]:
    """The transformer, and its proof if it was opened, or if that failed."""
    device = torch.device(get_device_name())
    dtype, report = pick("auto", device, found.config).dtype, None
    try:
        model, report = loading.load_transformer(found, dtype, enable_bidirectional=opened)
    except NotBidirectionalError as error:
        report = error.report
        model, _ = loading.load_transformer(found, dtype, enable_bidirectional=False)
    return model.to(device), report  # type: ignore[arg-type]


def _any_ids(decoder: Any) -> list[int]:
    """Ids from the middle of the vocabulary, where families have no special tokens."""
    size = decoder.config.get_text_config().vocab_size
    return [size // 4 + (7 * i) % (size // 2) for i in range(64)]


def _peaks(decoder: Any, ids: list[int]) -> tuple[Peak, ...]:
    """The peak of each layer and of each module outside of the layers, in the order they ran."""
    found: dict[str, Peak] = {}

    def note(name: str, _: nn.Module, __: Any, output: Any) -> None:
        layer, module = _place(name)
        for value in output if isinstance(output, tuple | list) else [output]:
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                largest = float(value.detach().abs().max())
                if layer not in found or _order(largest) > _order(found[layer].largest):
                    found[layer] = Peak(layer, module, largest)

    hooks = [m.register_forward_hook(partial(note, n)) for n, m in decoder.named_modules() if n]
    text = decoder.config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or len(ids)
    try:
        with torch.no_grad(), evaluating(decoder):
            decoder(input_ids=torch.tensor([ids[:most]], device=decoder.device), use_cache=False)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return ()  # the proof has the error
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(found.values())


def _place(name: str) -> tuple[str, str]:
    """``layers.3.mlp.down_proj`` → ``layers.3`` and ``mlp.down_proj``."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: number + 1]), ".".join(parts[number + 1 :])


def _order(value: float) -> float:
    """The number as it is compared: NaN is the largest."""
    return math.inf if math.isnan(value) else value
