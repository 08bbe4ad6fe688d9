"""Arguments and options that several verbs share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class Pooling(str, Enum):
    """From token states to one vector."""

    mean = "mean"
    weighted_mean = "weighted_mean"
    last_token = "last_token"
    eos_token = "eos_token"
    bos_token = "bos_token"


class Dtype(str, Enum):
    """Precision of the weights."""

    auto = "auto"
    checkpoint = "checkpoint"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantize(str, Enum):
    """8-bit numbers in the linear layers of the model."""

    int8 = "int8"
    fp8 = "fp8"


MODEL = Annotated[str, typer.Argument(help="Hub name, folder, or 'nano', the bundled decoder.")]
DTYPE = Annotated[Dtype, typer.Option(help="auto: bfloat16 where the hardware has it.")]
