"""What a tokenizer puts around every text, and the copy of it that a stock loader reads alike.

The same tokenizer is used in the process and written into the saved folder, where stock
sentence-transformers has to reach the same result. It excludes "the prompt" from pooling and
measures it by tokenising it alone, so with a prompt BOS is left out, and without one it is pooled.
`prepare_tokenizer` closes that gap with `MARK`: one leading noncharacter that the normalizer
removes. A prompt made of it alone is no text at all, yet it is a prompt: BOS is left out. BOS is
also no longer *named* (it keeps its id and is still added), because the stock loader does not count
a named special token at a prompt's end.

Cost: a copy of the tokenizer, once for a model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unmasked.errors import ModelError

MARK = "\ufdd0"
"""A Unicode noncharacter, never part of a text; only a leading one is removed."""


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, append_eos: bool = False, ending: Sequence[int] = ()
) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer that yields the same ids in ours and in the stock loader.

    For every text it gives exactly the ids of the original: the tokens the original puts before a
    text, then the text. What it would put behind is left out, but for the separator that base
    encoders (BERT) never saw a text without; EOS is appended once if asked.

    Args:
        tokenizer: any fast tokenizer; it is not changed.
        append_eos: end every input with EOS (for ``eos_token`` pooling).
        ending: ids that end every input, before EOS (a template's suffix); named special, so that
            the stock loader does not count the last of them to a prompt.

    Raises:
        ModelError: the tokenizer is slow, EOS is wanted and there is none, or its post-processor
            was made for another vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} has no fast implementation (tokenizer.json). "
            "Fix: load it with AutoTokenizer from a folder that has a tokenizer.json."
        )
    _check_processor(backend)
    prefix, behind = surrounding_ids(tokenizer)
    suffix = [*ending, *(i for i in behind if i == tokenizer.sep_token_id)]
    if append_eos and (eos := _eos_id(tokenizer)) not in suffix[len(ending) :]:
        suffix.append(eos)
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    strip_mark = normalizers.Replace(Regex(r"\A" + MARK), "")
    if not _strips_mark(copy):
        rest = [copy.normalizer] if copy.normalizer else []
        copy.normalizer = normalizers.Sequence([strip_mark, *rest])
    copy.post_processor = _template(copy, prefix, suffix)
    names: dict[str, Any] = _token_names(tokenizer, hidden=prefix[-1] if prefix else None)
    if ending:
        names["extra_special_tokens"] = [str(tokenizer.convert_ids_to_tokens(ending[-1]))]
    return PreTrainedTokenizerFast(
        tokenizer_object=copy,
        padding_side="right",
        truncation_side="right",
        chat_template=getattr(tokenizer, "chat_template", None),
        **names,
    )


def surrounding_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special ids a tokenizer puts before every text (BOS, mostly) and behind it."""
    probe = probe_text(tokenizer)
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start]), list(full[start + len(bare) :])
    return [], []


def probe_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """A text of which this tokenizer keeps something: "a", or else a word of its vocabulary."""
    if tokenizer("a", add_special_tokens=False)["input_ids"]:
        return "a"
    plain = sorted(set(tokenizer.get_vocab().values()) - tokenizer.added_tokens_decoder.keys())
    words = (str(tokenizer.decode([i])) for i in plain)
    keeps = (w for w in words if w and tokenizer(w, add_special_tokens=False)["input_ids"])
    return next(keeps, "a")


def _check_processor(backend: Tokenizer) -> None:
    """Refuse special tokens around a text whose ids are those of another vocabulary.

    A tokenizer that was trained anew keeps the post-processor of the old one.
    """
    post = json.loads(backend.post_processor.__getstate__()) if backend.post_processor else {}
    for part in (post, *post.get("processors", ())):
        for entry in (part.get("special_tokens") or {}).values():
            for token, number in zip(entry["tokens"], entry["ids"], strict=True):
                if (known := backend.token_to_id(token)) != number:
                    raise ModelError(
                        f"the tokenizer puts token {number} around a text as '{token}', which is "
                        f"{known} in its vocabulary: its post-processor is that of another one. "
                        "Fix: set tokenizer.backend_tokenizer.post_processor anew, and save it."
                    )


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "pooling 'eos_token' needs an EOS token and this tokenizer names none. "
            "Fix: use pooling 'last_token', or set tokenizer.eos_token."
        )
    return int(tokenizer.eos_token_id)


def _strips_mark(backend: Tokenizer) -> bool:
    return backend.normalizer is not None and MARK not in backend.normalizer.normalize_str(MARK)


def _template(
    backend: Tokenizer, prefix: list[int], suffix: list[int]
) -> processors.TemplateProcessing:
    tokens = {backend.id_to_token(i): i for i in [*prefix, *suffix]}
    before = [backend.id_to_token(i) for i in prefix]
    after = [backend.id_to_token(i) for i in suffix]
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", "$B", *after],
        special_tokens=list(tokens.items()),
    )


def _token_names(tokenizer: PreTrainedTokenizerBase, hidden: int | None) -> dict[str, str]:
    """Names of special tokens to keep; padding needs one, and `hidden` must have none."""
    names: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "mask_token"):
        token = getattr(tokenizer, name, None)
        if token is not None and tokenizer.convert_tokens_to_ids(token) != hidden:
            names[name] = str(token)
    if "pad_token" not in names:
        # Any token does: padding is masked everywhere. Prefer EOS, as the original package does.
        fallback = names.get("eos_token") or names.get("unk_token")
        names["pad_token"] = fallback or str(tokenizer.convert_ids_to_tokens(int(hidden == 0)))
    return names
