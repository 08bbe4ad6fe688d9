"""Special tokens around a text, and a copy of the tokenizer that works alike in stock loaders.

The tokenizer that we use is also written into the saved folder, where stock sentence-transformers
must reach the same result. That loader excludes the prompt from pooling and finds its length by
tokenising the prompt alone. So with a prompt BOS is left out of pooling, but without one it is
pooled. `prepare_tokenizer` closes that gap with `MARK`, a noncharacter that the normalizer removes
at the beginning of a text. A prompt of `MARK` alone has no tokens but BOS, so BOS is left out. For
this, BOS loses its *name* as a special token (it keeps its id and is still added), because the
stock loader does not count a named special token at the end of a prompt.

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
    """A copy of a tokenizer that yields the same ids in our loader and in the stock one.

    For every text it yields the ids of the original: the special tokens before the text, then the
    text. Special tokens after the text are left out, except the separator of base encoders such as
    BERT, which never saw a text without it. EOS is appended once on request.

    Args:
        tokenizer: any fast tokenizer; it is not changed.
        append_eos: end every input with EOS (for ``eos_token`` pooling).
        ending: ids at the end of every input, before EOS (a template's suffix). If the last
            one is an added token, it becomes a named special token, so that the stock loader does
            not count it as part of a prompt. An ordinary token is not named: texts would be split
            at it.

    Raises:
        ModelError: the tokenizer is slow, it has no EOS although EOS is needed, or its
            post-processor was made for another vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} has no fast implementation (tokenizer.json). "
            "Fix: load it with AutoTokenizer from a folder that has a tokenizer.json."
        )
    _check_processor(backend)
    prefix, after = surrounding_ids(tokenizer)
    suffix = [*ending, *(i for i in after if i == tokenizer.sep_token_id)]
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
    if ending and ending[-1] in tokenizer.added_tokens_decoder:
        names["extra_special_tokens"] = [str(tokenizer.convert_ids_to_tokens(ending[-1]))]
    return PreTrainedTokenizerFast(
        tokenizer_object=copy,
        padding_side="right",
        truncation_side="right",
        chat_template=getattr(tokenizer, "chat_template", None),
        **names,
    )


def surrounding_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special ids that a tokenizer puts before every text (usually BOS) and after it."""
    probe = probe_text(tokenizer)
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start]), list(full[start + len(bare) :])
    return [], []


def probe_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """A text that has tokens in this tokenizer: "a", or else a word of its vocabulary."""
    if tokenizer("a", add_special_tokens=False)["input_ids"]:
        return "a"
    plain = sorted(set(tokenizer.get_vocab().values()) - tokenizer.added_tokens_decoder.keys())
    words = (str(tokenizer.decode([i])) for i in plain)
    keeps = (w for w in words if w and tokenizer(w, add_special_tokens=False)["input_ids"])
    return next(keeps, "a")


def _check_processor(backend: Tokenizer) -> None:
    """Refuse a post-processor that adds special tokens with the ids of another vocabulary.

    A tokenizer that was trained from another one keeps the post-processor of that one.
    """
    post = json.loads(backend.post_processor.__getstate__()) if backend.post_processor else {}
    for part in (post, *post.get("processors", ())):
        for entry in (part.get("special_tokens") or {}).values():
            for token, number in zip(entry["tokens"], entry["ids"], strict=True):
                if (known := backend.token_to_id(token)) != number:
                    raise ModelError(
                        f"the tokenizer puts token {number} around a text as '{token}', which is "
                        f"{known} in its vocabulary: its post-processor is for another vocabulary. "
                        "Fix: set another tokenizer.backend_tokenizer.post_processor, and save it."
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
    """The named special tokens of the copy: without the id `hidden`, and always a padding token.

    A named token becomes an added token, at which every text is split. So only added tokens of the
    given tokenizer are named (and its EOS): a token that was named after loading, as by
    ``tokenizer.pad_token = "!"``, still has its ordinary merges.
    """
    added, names = tokenizer.added_tokens_decoder, dict[str, str]()
    contents = {str(token) for token in added.values()}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "mask_token"):
        token = getattr(tokenizer, name, None)
        if token is None or tokenizer.convert_tokens_to_ids(token) == hidden:
            continue
        if name == "eos_token" or str(token) in contents:
            names[name] = str(token)
    if "pad_token" not in names:
        # Any token will do: padding is masked everywhere. Prefer EOS, as the original package does.
        others = (str(added[number]) for number in sorted(added) if number != hidden)
        found = names.get("eos_token") or names.get("unk_token") or next(others, None)
        names["pad_token"] = found or _never_in_a_text(tokenizer)
    return names


def _never_in_a_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token of a vocabulary that, letter by letter, is least likely to stand in a text.

    Stock loaders need a padding token, and this tokenizer has none that could be one. In a
    byte-level vocabulary most tokens are spelled with letters that stand for bytes (``ìķĪëħķ``).
    """
    hidden = tokenizer.added_tokens_decoder
    plain = [token for token, number in tokenizer.get_vocab().items() if number not in hidden]
    return max(plain, key=lambda token: (sum(not c.isascii() for c in token), len(token), token))
