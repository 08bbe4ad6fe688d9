"""What vLLM and text-embeddings-inference (TEI) read from a folder.

Both run the saved weights with their own code, so nothing is converted. But the folder must say, in
the keys that their loaders read, that the mask is off and how to pool. `LOADERS` lists these keys
with the reasons, and `check_keys` refuses a folder that lacks one. Both programs always pool all
tokens. They are not run here: `exporting` computes what they would by these rules, and compares
that. `unmasked verify` compares a running server.

Source: vllm (transformers_utils/config.py, model_executor/models/llama.py and qwen2.py),
text-embeddings-inference (router/src/lib.rs, backends/candle/src/models).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmasked.errors import ModelError
from unmasked.mask.opening import NATIVE_KEY

POOLING_FILE = "1_Pooling/config.json"
FLAGS = {
    "mean": "pooling_mode_mean_tokens",
    "bos_token": "pooling_mode_cls_token",
    "last_token": "pooling_mode_lasttoken",
    "eos_token": "pooling_mode_lasttoken",
}
"""Pooling mode → its flag in the pooling config; both programs support these modes."""
CAUSAL_IN_TEI = ("mistral",)  # families that TEI always runs with the causal mask
IN_TEI = ("gemma3_text", "qwen2", "qwen3")
"""Families that TEI runs with the mask open; of all others it can only run the ONNX graph."""


@dataclass(frozen=True)
class Key:
    """A key that a loader reads."""

    file: str  # its file in the folder
    name: str  # the name of the key
    wanted: bool | None  # the value that the loader needs; None for any that is not empty
    why: str  # what the loader does with it


SENTENCE = "sentence_bert_config.json"
COMMON = (
    Key("config.json", "architectures", None, "names the class that runs the weights"),
    Key(SENTENCE, "max_seq_length", None, "where a text is cut"),
)
LOADERS = {
    "vllm": (
        *COMMON,
        Key("config.json", "is_causal", False, "without it attention is causal"),
        Key(SENTENCE, "do_lower_case", False, "without it max_seq_length is ignored"),
        Key("modules.json", "sentence_transformers.models.Pooling", None, "finds the pooling"),
    ),
    "tei": (
        *COMMON,
        Key("config.json", NATIVE_KEY, None, "without it attention is causal"),
        Key(POOLING_FILE, "pooling_mode_max_tokens", False, "the flag is required"),
        Key(POOLING_FILE, "pooling_mode_mean_sqrt_len_tokens", False, "the flag is required"),
    ),
}
"""The keys that each loader reads."""


def check_keys(folder: Path, kind: str, mode: str) -> None:
    """Refuse a saved folder that the loader of ``vllm`` or ``tei`` would misread.

    Raises:
        ModelError: the folder lacks a key, or the program does not support its family or pooling.
    """
    config = _read(folder / "config.json")
    family = str(config.get("model_type"))
    if mode not in FLAGS:
        raise ModelError(
            f"{kind} does not support the pooling mode {mode}, and would silently use another one. "
            f"Allowed: {', '.join(FLAGS)}. Fix: --to onnx."
        )
    if kind == "tei" and family not in IN_TEI:
        causal = family in CAUSAL_IN_TEI
        why = "always has its causal mask" if causal else "has no bidirectional form there"
        raise ModelError(
            f"text-embeddings-inference: {family} {why}. Allowed: {', '.join(IN_TEI)}. "
            "Fix: --to onnx, which it runs as well (the images for CPUs)."
        )
    for key in (*LOADERS[kind], Key(POOLING_FILE, FLAGS[mode], True, "how to pool")):
        value = _value(_read(folder / key.file), key.name)
        fits = bool(value) if key.wanted is None else value is key.wanted
        # Some families have a key of their own that removes the mask.
        if not (fits or (key.name == "is_causal" and config.get(NATIVE_KEY))):
            raise ModelError(
                f"{kind} reads {key.name} in {key.file} ({key.why}), but it is {value!r} there. "
                "Fix: save the encoder again with this version."
            )


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _value(content: Any, name: str) -> Any:
    if isinstance(content, list):  # modules.json: return the path of the module of type `name`
        return next((row["path"] for row in content if row["type"] == name), None)
    return content.get(name)
