"""What a program must do to give the same vectors from a saved folder.

Whether stock sentence-transformers gives them is proved on the model. Other programs are not run
here, so nothing is claimed of them: the facts are what the folder requires.
"""

from __future__ import annotations

import json
from typing import Any

from unmasked.forward.positions import rotary_parts
from unmasked.mask.opening import NATIVE_KEY
from unmasked.mask.proof import Proof
from unmasked.text.tokens import TextTokenizer

CLOSED = {"is_causal": True, NATIVE_KEY: False}
"""Config keys that open the mask, and their values if it is closed."""


def requirements(
    report: Proof, config: Any, stock: str, tokens: TextTokenizer, pooling: str
) -> dict[str, str]:
    """Whether stock sentence-transformers gives the vectors, and what other programs must do.

    `config` is that of the model with its mask open, and `stock` the result of `stock_loading`.
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
    kinds = {part.get("rope_type", "default") for part in rotary_parts(config)}
    if scaling := kinds - {"default"}:
        found["positions"] = f"must scale rotary positions by {', '.join(sorted(scaling))}"
    found["pooling"] = f"must pool by {pooling}"
    if "mean" in pooling and tokens.skip_instruction:
        before = tokens.tokenizer.convert_ids_to_tokens(tokens.prefix)
        found["pooling"] += f" and leave out {' and '.join([*before, 'the prompt'])}"
    return found
