"""Attention over texts laid end to end, so that padding never reaches the network.

`layout` says where the texts of a batch are, `attending` keeps them apart, and `check` allows
packing for a model only if that gives the same states. Attention itself is computed in `dense`
(everywhere), `ragged` and `dropout` (on a GPU). `benchmarks/encode.py` measures the speed.
"""

from unmasked.forward.packing.attending import NAME, attention, checkpoint_contexts, run_packed
from unmasked.forward.packing.check import enable_packing, is_checked
from unmasked.forward.packing.layout import Packed, pack, pack_blocks, pack_documents

__all__ = [
    "NAME",
    "Packed",
    "attention",
    "checkpoint_contexts",
    "enable_packing",
    "is_checked",
    "pack",
    "pack_blocks",
    "pack_documents",
    "run_packed",
]
