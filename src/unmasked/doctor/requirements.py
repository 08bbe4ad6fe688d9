"""What a program has to do to give the vectors of a saved folder.

That stock sentence-transformers does it is proved on the model. Of other programs nothing is
claimed, as none is run here: the facts are what the folder asks of them.
"""

from __future__ import annotations

import json
from typing import Any

from unmasked.mask.opening import NATIVE_KEY
from unmasked.mask.proof import Proof
from unmasked.text.tokens import TextTokenizer

CLOSED = {"is_causal": True, NATIVE_KEY: False}
"""Keys of a config that open the mask, and their values where it is closed."""


def requirements(
    report: Proof, config: Any, stock: str, tokens: TextTokenizer, pooling: str
) -> dict[str, str]:
    """Whether stock sentence-transformers gives the vectors, and the rules that it follows.

    Args:
        report: the proof.
        config: of the model, mask open.
        stock: what `stock_loading` says.
        tokens: how texts become ids.
        pooling: the pooling mode.
    """
    if report.verdict == "impossible" or stock == "causal":
        why = "the mask stays" if report.verdict == "impossible" else "only unmasked opens the mask"
        return {"sentence_transformers": f"no: {why}"}
    eager = "; the saved config names eager attention" if stock == "eager" else ""
    text = config.get_text_config()
    values = {key: getattr(text, key, None) for key in CLOSED}
    flags = [f"{k}: {json.dumps(v)}" for k, v in values.items() if v not in (None, CLOSED[k])]
    mask = f"must read {' or '.join(flags)} in config.json"
    if report.window:
        mask += f"; sliding layers see {report.window} tokens to each side"
    if report.causal_layers:
        mask += "; the causal layers stay causal"
    found = {"sentence_transformers": f"yes, proved{eager}", "mask": mask}
    rope = getattr(text, "rope_parameters", None) or {}  # one for all layers, or for each kind
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    if scaling := {part.get("rope_type", "default") for part in parts} - {"default"}:
        found["positions"] = f"must scale rotary positions by {', '.join(sorted(scaling))}"
    found["pooling"] = f"must pool by {pooling}"
    if "mean" in pooling and tokens.skip_instruction:
        before = tokens.tokenizer.convert_ids_to_tokens(tokens.prefix)
        found["pooling"] += f" and leave out {' and '.join([*before, 'the prompt'])}"
    return found
