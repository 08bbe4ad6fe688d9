"""Which precision the weights get, and why: used by loading, shown by ``doctor``.

On a CPU with bfloat16 in hardware (AVX512-BF16, AMX, Arm BF16), a wide model runs 2 to 3 times
faster in bfloat16 than in float32; on other CPUs it runs tens of times slower. float16 is slow on
every CPU. At a width of 256 bfloat16 is 1.7 times as fast (`benchmarks/quantize.py`). Narrower
models (`NARROW`) stay in float32 because they are fast enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from unmasked.errors import ModelError, first_line, unknown

NAMES = ("auto", "checkpoint", "float32", "bfloat16", "float16")
NARROW = 256
"""Hidden sizes below this stay in float32 on a CPU."""


@dataclass(frozen=True)
class Precision:
    """A dtype and the reason for it."""

    dtype: torch.dtype
    reason: str


def bfloat16_instructions() -> str | None:
    """The fastest instruction set with which this CPU multiplies bfloat16; None without any."""
    return _first_of("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def int8_instructions() -> str | None:
    """The fastest instruction set for products of 8-bit integers on this CPU; None without any."""
    return _first_of("amx_int8", "avx512_vnni", "avx_vnni")


def has_amx() -> bool:
    """Whether this CPU has matrix units for bfloat16."""
    return _first_of("amx_bf16") is not None


def _first_of(*instructions: str) -> str | None:
    found = torch.cpu.get_capabilities()
    return next((name for name in instructions if found.get(name)), None)


def on_device(name: str | torch.device) -> torch.device:
    """The device with that name, with its number: ``cuda`` is ``cuda:0``.

    Raises:
        ModelError: there is no such device, or this torch cannot use it.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        number = torch.cuda.device_count()
        allowed = ["cpu", *(f"cuda:{index}" for index in range(number))]
        allowed += ["mps"] if torch.backends.mps.is_available() else []
        raise ModelError(
            f"device {str(name)!r} cannot be used: {first_line(error).rstrip('.')}. Allowed here: "
            f"{', '.join(allowed)}. Fix: device='{allowed[1 if number else 0]}', or leave it out "
            "for the best one."
        ) from error


def pick(name: str, device: torch.device, config: Any = None) -> Precision:
    """The precision for a device.

    Args:
        name: ``auto``; ``checkpoint``, which is ``auto`` but keeps a float32 checkpoint in float32;
            or the name of a torch dtype.
        device: where the model will run.
        config: the config of the model. Without it, as in training, a CPU gets float32.

    Raises:
        ModelError: an unknown name, or float16 on a CPU.
    """
    if name not in NAMES:
        raise ModelError(unknown("dtype", name, NAMES))
    if name == "float16" and device.type == "cpu":
        raise ModelError(
            "float16 is many times slower than float32 on a CPU. Fix: choose dtype auto, bfloat16 "
            "or float32."
        )
    if name not in ("auto", "checkpoint"):
        return Precision(getattr(torch, name), "as requested")
    if name == "checkpoint" and getattr(config, "dtype", None) == torch.float32:
        return Precision(torch.float32, "as in the checkpoint")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return Precision(torch.bfloat16, "the GPU has bfloat16")
        return Precision(torch.float32, "this GPU has no bfloat16")
    if device.type != "cpu":
        return Precision(torch.float32, f"float32 is what was tested on {device.type}")
    return _for_cpu(config)


def _for_cpu(config: Any) -> Precision:
    instructions = bfloat16_instructions()
    if instructions is None:
        return Precision(torch.float32, "this CPU has no bfloat16 in hardware")
    if config is None:
        return Precision(torch.float32, "training on a CPU is done in float32")
    width = config.get_text_config().hidden_size
    if width < NARROW:
        return Precision(torch.float32, f"a model of width {width} is fast enough in float32")
    return Precision(torch.bfloat16, f"the CPU has {instructions}")
