"""What a tokenizer adds, how many tokens a text takes, and whether stock loaders find prompt ends.

Tokens per character decide what training and encoding cost and how much of a text fits: a tokenizer
that encodes a language byte by byte takes several tokens for one Korean syllable. They are counted
before training, on a few sentences of everyday prose. Cost: milliseconds.
"""

from __future__ import annotations

from typing import Any

from unmasked.doctor.machine import Facts
from unmasked.errors import ModelError
from unmasked.text.tokens import TextTokenizer
from unmasked.train.losses.mntp import find_mask_id

PROBES = ("foo", "A sentence.", " after a space", '"quoted"', "1984", "한국어 문장", "\nnew line")
"""Beginnings of texts that some tokenizers merge with the end of the prompt before them."""
ENDINGS = {"newline": "Find the answer:\n", "colon": "query:", "space": "query: "}
"""Prompts that are judged if a model has none."""

SAMPLES = {
    "English": "The library opens at nine on weekdays, and visitors may borrow up to five books "
    "for two weeks. If a book has been reserved by somebody else, the loan cannot be extended. "
    "Please return what you no longer need, so that others can read it.",
    "Korean": "도서관은 평일 아침 아홉 시에 문을 열며, 방문객은 책을 다섯 권까지 두 주 동안 "
    "빌릴 수 있습니다. 다른 사람이 예약한 책은 대출 기간을 연장할 수 없습니다. 더 이상 "
    "필요하지 않은 책은 다른 사람이 읽을 수 있도록 반납해 주세요.",
}
"""The same few sentences of everyday prose in each language."""
POOR = 1.0  # from this many tokens per character on, a tokenizer splits the letters of a language


def describe(tokens: TextTokenizer, prompts: dict[str, str]) -> Facts:
    """Special tokens, chat template, tokens per character, and whether prompts' ends are found."""
    tokenizer: Any = tokens.tokenizer
    try:
        mask = tokenizer.convert_ids_to_tokens(find_mask_id(tokenizer, "blank"))
    except ModelError:
        mask = "none: '_' is not a single token; train with mntp.mask_token=mask"
    return {
        "vocabulary": len(tokenizer),
        "tokens_per_character": {name: per_character(tokens, name) for name in SAMPLES},
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


def per_character(tokens: TextTokenizer, language: str) -> str:
    """How many tokens a character of a language in `SAMPLES` takes, and whether that is many."""
    text, plain = SAMPLES[language], TextTokenizer(tokens.tokenizer)  # no template around it
    (row,) = plain([text], max_length=16 * len(text))
    count = len(row.ids) - len(plain.prefix) - len(plain.suffix)
    said = f"{count / len(text):.2f} ({count} tokens of {len(text)} characters)"
    if count < POOR * len(text):
        return said
    return f"{said}: POOR, letters are split; a base that was trained on {language} takes fewer"


def judge(tokenizer: Any, prompt: str) -> str:
    """Whether a stock loader, which tokenises a prompt alone, finds where it ends before a text."""
    alone = tokenizer(prompt)["input_ids"]
    if alone and alone[-1] in tokenizer.all_special_ids:
        alone = alone[:-1]  # as sentence-transformers leaves it out
    merged = [p for p in PROBES if tokenizer(prompt + p)["input_ids"][: len(alone)] != alone]
    if not merged:
        return f"stable in stock loaders: {prompt!r}"
    return f"UNSTABLE in stock loaders: {prompt!r} merges with {merged[0]!r}; end it in a newline"
