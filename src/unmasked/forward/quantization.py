"""8-bit weights on request, and the measured effect on the vectors.

The linear layers of a loaded trunk multiply 8-bit numbers. The weights have one scale per output
channel, computed once. The activations have one scale per token, computed in every forward, so that
a vector does not depend on its batch, and a token with huge activations (the first one, in most
decoders) costs the others no precision. Embeddings, norms, rotary positions and attention stay as
they are.

int8 runs on a CPU with torch's integer matrix product; `docs/design.md` compares it with libraries,
and says why there is no fp8 for GPUs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from unmasked.errors import ModelError, unknown
from unmasked.forward import precision

logger = logging.getLogger(__name__)

KINDS = ("int8",)
"""The allowed kinds of quantization."""
LARGEST = 127
"""The largest 8-bit number that is used. -128 is not used, so that the range is symmetric."""
ALIGNMENT = 16
"""Both dimensions of a layer must be multiples of this; no others were measured."""

_SHORT_TEXTS = (
    "How do I sort a list of numbers?",
    "Water boils at a lower temperature on a mountain than by the sea.",
    "The court found that the contract had been broken, but awarded no damages, because the buyer "
    "had known of the fault and had used the machine for three years without a word of complaint.",
    "def mean(values): return sum(values) / len(values)",
    "Die Bibliothek ist am Sonntag geschlossen.",
    "물은 바닷가보다 산 위에서 더 낮은 온도에 끓는다.",
    "Invoice 2041: 1,204.50 EUR, due on 31 March.",
    "No.",
)
TEXTS = [*_SHORT_TEXTS, " ".join(_SHORT_TEXTS)]
"""The texts on which the cosine to full precision is measured."""


def to_8bit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) numbers as int8, and the (N, 1) float32 scales to multiply them with again."""
    rows = rows.float()
    largest = rows.abs().amax(dim=1, keepdim=True).clamp_(min=1e-12)  # no division by zero below
    scales = largest / LARGEST
    return (rows * scales.reciprocal()).round_().to(torch.int8), scales


def product(states: Tensor, state_scales: Tensor, weights: Tensor, weight_scales: Tensor) -> Tensor:
    """(N, M) float32 product of int8 (N, K) states and (M, K) weights, scales (N, 1) and (M, 1)."""
    # The public products return int8, which overflows; only the private one returns int32.
    sums = torch._int_mm(states, weights.t())
    return sums.float().mul_(state_scales).mul_(weight_scales.t())


class Linear8bit(nn.Module):
    """A linear layer with 8-bit weights, which quantizes its input with one scale per row.

    It is for inference only. The weights are not called ``weight``, so that code that reads the
    weight of a layer directly fails instead of computing nonsense.
    """

    values: Tensor  # (M, K)
    scales: Tensor  # (M, 1)

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        values, scales = to_8bit(layer.weight.detach())
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)
        self.bias = layer.bias

    def forward(self, states: Tensor) -> Tensor:
        """Turn (..., K) states into (..., M) states of the same dtype."""
        rows, scales = to_8bit(states.reshape(-1, states.shape[-1]))
        outputs = product(rows, scales, self.values, self.scales)
        if self.bias is not None:
            outputs += self.bias
        return outputs.to(states.dtype).reshape(*states.shape[:-1], -1)


@dataclass(frozen=True)
class Quantization:
    """How a model was quantized, and the effect on its vectors.

    Attributes:
        name: ``int8``.
        layers: number of linear layers that have 8-bit weights.
        full: dtype of the model before.
        least_cosine: the lowest cosine between the vectors of `TEXTS` before and after.
    """

    name: str
    layers: int
    full: str
    least_cosine: float

    def __str__(self) -> str:
        return (
            f"{self.name} weights in {self.layers} linear layers: cosine to {self.full} at least "
            f"{self.least_cosine:.4f} ({len(TEXTS)} texts)"
        )


def check(name: str, device: torch.device) -> None:
    """Refuse a quantization that the device does not support, before anything is loaded.

    Raises:
        ModelError: an unknown name, or another device than a CPU.
    """
    if name not in KINDS:
        raise ModelError(unknown("quantize", name, KINDS))
    if device.type != "cpu":
        raise ModelError(
            f"quantize {name} runs on CPUs only, and the model goes to {device}. "
            "Fix: choose device cpu, or leave out quantize."
        )


@torch.no_grad()
def quantize(encoder: SentenceTransformer, trunk: nn.Module, name: str) -> Quantization:
    """Quantize the linear layers of a trunk to 8 bits in place, and measure the effect on vectors.

    Experts in one three-dimensional weight, and layers whose dimensions are not multiples of 16,
    stay as they are. The cost is two encodings of nine texts.

    Args:
        encoder: the encoder that contains the trunk, on its final device; it can no longer be
            trained.
        trunk: a bare transformer.
        name: ``int8``.

    Raises:
        ModelError: as in `check`; or the trunk has no such layers, or does not run with them.
    """
    check(name, encoder.device)
    if precision.int8_instructions() is None:
        logger.warning("This CPU has no 8-bit products (VNNI, AMX): int8 is hardly faster here.")
    if precision.has_amx():  # `benchmarks/quantize.py`: 0.54 times as fast at a width of 576
        logger.warning(
            "This CPU multiplies bfloat16 in matrix units (AMX), which is faster than int8 here. "
            "Fix: leave out quantize, with dtype bfloat16."
        )
    chosen = [
        path
        for path, layer in trunk.named_modules()
        if type(layer) is nn.Linear and not any(side % ALIGNMENT for side in layer.weight.shape)
    ]
    if not chosen:
        raise ModelError(
            f"{type(trunk).__name__} has no linear layers (nn.Linear) that can have 8 bits. "
            "Fix: leave out quantize."
        )
    full = str(next(trunk.parameters()).dtype).removeprefix("torch.")
    encoder.eval().requires_grad_(False)
    before = _encode(encoder)
    for path in chosen:
        trunk.set_submodule(path, Linear8bit(trunk.get_submodule(path)))  # type: ignore[arg-type]
    try:
        after = _encode(encoder)
    except (AttributeError, RuntimeError) as error:
        raise ModelError(
            f"{type(trunk).__name__} does not run with 8-bit layers ({type(error).__name__}: "
            f"{str(error)[:100]}). Fix: leave out quantize."
        ) from error
    least = float(nn.functional.cosine_similarity(before, after, dim=1).min())
    result = Quantization(name, len(chosen), full, least)
    logger.warning("%s", result)
    return result


def _encode(encoder: SentenceTransformer) -> Tensor:
    """(N, D) float32 vectors of `TEXTS`."""
    vectors: Any = encoder.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    return vectors.float()  # type: ignore[no-any-return]
