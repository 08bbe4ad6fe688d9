"""What a tokenizer adds, and whether a stock loader finds where a prompt ends."""

from __future__ import annotations

from typing import Any

from unmasked.doctor.machine import Facts
from unmasked.errors import ModelError
from unmasked.text.tokens import TextTokenizer
from unmasked.train.losses.mntp import find_mask_id

PROBES = ("foo", "A sentence.", " after a space", '"quoted"', "1984", "한국어 문장", "\nnew line")
"""Beginnings of texts that merge with what stands before them in one tokenizer or another."""
ENDINGS = {"newline": "Find the answer:\n", "colon": "query:", "space": "query: "}
"""Judged where a model has no prompts of its own."""


def describe(tokens: TextTokenizer, prompts: dict[str, str]) -> Facts:
    """Special tokens, chat template, and whether each prompt's end is found."""
    tokenizer: Any = tokens.tokenizer
    try:
        mask = tokenizer.convert_ids_to_tokens(find_mask_id(tokenizer, "blank"))
    except ModelError:
        mask = "none: '_' is not a single token; train with mntp.mask_token=mask"
    return {
        "vocabulary": len(tokenizer),
        "bos_added": tokenizer.convert_ids_to_tokens(tokens.prefix),
        "eos": tokenizer.eos_token,
        "eos_added": tokenizer.eos_token_id in tokens.suffix,
        "padding": tokenizer.pad_token,
        "mntp_mask": mask,
        "chat_template": bool(getattr(tokenizer, "chat_template", None)),
        "prompt" if prompts else "prompt_ending_in": {
            name: judge(tokenizer, prompt) for name, prompt in (prompts or ENDINGS).items()
        },
    }


def judge(tokenizer: Any, prompt: str) -> str:
    """Whether a stock loader finds where this prompt ends, by tokenising it alone."""
    alone = tokenizer(prompt)["input_ids"]
    if alone and alone[-1] in tokenizer.all_special_ids:
        alone = alone[:-1]  # as sentence-transformers does
    merged = [p for p in PROBES if tokenizer(prompt + p)["input_ids"][: len(alone)] != alone]
    if not merged:
        return f"stable in stock loaders: {prompt!r}"
    return f"UNSTABLE in stock loaders: {prompt!r} merges with {merged[0]!r}; end it in a newline"
