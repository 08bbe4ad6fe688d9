"""Rotary positions that depend on the other texts of a batch.

LongRoPE (Phi-3, Phi-4-mini) has one set of rotary frequencies for texts up to the length of
pretraining and another for longer texts, and the longest text of a batch decides for all of them.
A short text would get another vector beside a long one, so the two share no forward pass here.

The frequencies are kept in the model between forward passes, so two of them may not run at once.
"""

from __future__ import annotations

from typing import Any


def rotary_parts(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters of a model's config, one dict for each kind of layer."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [part for part in (rope, *rope.values()) if isinstance(part, dict)]


def follows_length(config: Any) -> bool:
    """Whether a forward pass changes the rotary frequencies that the model keeps."""
    kinds = [str(part.get("rope_type")) for part in rotary_parts(config)]
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def longest_unscaled(config: Any) -> int | None:
    """Number of tokens up to which LongRoPE leaves a text as in pretraining; None without it."""
    key = "original_max_position_embeddings"
    longrope = [part for part in rotary_parts(config) if part.get("rope_type") == "longrope"]
    return min((int(part[key]) for part in longrope if part.get(key)), default=None)
