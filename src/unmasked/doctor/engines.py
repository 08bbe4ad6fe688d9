"""Which engines give the vectors of a saved folder.

For sentence-transformers this is proved on the model (`stock_loading`). What the others do is taken
from their sources as of September 2026, not run here: a list of what other programs support.
"""

from __future__ import annotations

from typing import Any

from unmasked.mask.proof import Proof

VLLM = (
    "apertus",
    "deepseek_v2",
    "deepseek_v3",
    "gemma3_text",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)
"""Families whose own vLLM code reads the bidirectional flag."""
TEI = ("llama", "mistral", "qwen2", "qwen3")
POOLS_ALL = "pools BOS and prompt, too"


def engines(report: Proof, config: Any, stock: str) -> dict[str, str]:
    """A verdict for each engine.

    Args:
        report: the proof.
        config: of the model.
        stock: as `bidirectional.stock_loading` says.
    """
    if report.verdict == "impossible" or stock == "causal":
        why = "the mask stays" if report.verdict == "impossible" else "only unmasked opens the mask"
        names = ("sentence_transformers", "vllm", "tei", "llama_cpp")
        return dict.fromkeys(names, f"no: {why}")
    family, text = report.model_type, config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    found = {"sentence_transformers": "yes, proved"}
    if stock == "eager":
        found["sentence_transformers"] += "; the saved config names eager attention"
    found["vllm"] = "no: its generic backend does not read the flag"
    if family in VLLM:
        found["vllm"] = f"mask yes (from its source); {POOLS_ALL}"
    found["tei"] = "no: not a family it opens"
    if family in TEI:
        lost = rope.get("rope_type") == "llama3"
        note = (
            "no: it loses llama3 RoPE scaling"
            if lost
            else f"mask yes (from its source); {POOLS_ALL}"
        )
        found["tei"] = note
    found["llama_cpp"] = f"mask yes if its converter knows {family} (from its source); {POOLS_ALL}"
    if report.verdict == "partial":
        found["llama_cpp"] = "unknown: causal layers beside attention"
    return found
