"""The encoder as a GGUF file, for llama.cpp and programs built on it (Ollama, LM Studio).

The file says ``attention.causal = false``, how to pool, and whether BOS and EOS are added; the
weights have 16 or 8 bits. llama.cpp pools every token, so an encoder that leaves BOS and the
instruction out of pooling gives other vectors there, and `exporting` measures how different they
are. What llama.cpp cannot compute at all is refused here with the reason: other families, other
rotary positions, an attention window that is shorter than the longest text.

Only the writer of llama.cpp's own ``gguf`` package is used. Cost: the weights are read once.

Source: names and layouts are those of llama.cpp's converter (ggml-org/llama.cpp, gguf-py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unmasked.errors import ModelError, unknown
from unmasked.export.graph import require_packages
from unmasked.mask.opening import window
from unmasked.text.tokens import TextTokenizer

FILE = "model.gguf"


@dataclass(frozen=True)
class Family:
    """How llama.cpp computes a family of transformers."""

    arch: str  # llama.cpp's name for the architecture
    interleaved: bool = False
    """Whether its rotary positions pair neighbouring channels, so that the rows of the query and
    key projections must be stored in another order."""
    shifted: bool = False  # whether it expects norm weights with 1 added to them
    windows: bool = False  # whether its sliding windows reach to both sides
    factors: bool = False  # whether rotary frequencies can be divided by a factor each


FAMILIES = {
    "llama": Family("llama", interleaved=True, factors=True),
    "mistral": Family("llama", interleaved=True, factors=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", shifted=True),
    "gemma2": Family("gemma2", shifted=True),
    "gemma3_text": Family("gemma-embedding", shifted=True, windows=True),
}
"""Model type in transformers → the family in llama.cpp."""
POOLING = {"mean": 1, "bos_token": 2, "last_token": 3, "eos_token": 3}
"""Our pooling modes that llama.cpp supports → its numbers for them."""
NORMAL, UNKNOWN, CONTROL, ADDED, UNUSED, BYTE = range(1, 7)  # the token types of a GGUF file

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTERS = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_LETTERS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_LETTERS + r"\p{N}" + _REST,): "qwen2",
}
"""The pre-tokenizer steps of a tokenizer → llama.cpp's name for them."""


def write_gguf(
    folder: Path, model: Any, tokens: TextTokenizer, mode: str, weights: Literal["float16", "int8"]
) -> None:
    """Write ``model.gguf`` into a saved folder.

    Args:
        folder: the saved folder, with its tokenizer.
        model: the bare transformer.
        tokens, mode: how texts become ids, and how states are pooled.
        weights: ``float16`` (f16) or ``int8`` (q8_0).

    Raises:
        MissingExtraError: the extra ``export`` is not installed.
        ModelError: llama.cpp cannot compute this encoder.
    """
    require_packages("gguf")
    import gguf

    if mode not in POOLING:
        raise ModelError(unknown("pooling mode for llama.cpp", mode, POOLING))
    family = _family(model)
    writer = gguf.GGUFWriter(folder / FILE, family.arch)
    _add_shape(writer, model, tokens.max_length, family)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType(POOLING[mode]))
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    _add_vocabulary(writer, tokenizer, model, tokens)
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[family.arch]
    names = gguf.get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    kind = gguf.LlamaFileType.MOSTLY_Q8_0 if weights == "int8" else gguf.LlamaFileType.MOSTLY_F16
    writer.add_file_type(kind)
    for name, value in _tensors(model, family):
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        array = value.float().numpy()
        if array.ndim < 2:
            writer.add_tensor(gguf_name, array)
        elif weights == "int8" and array.shape[-1] % 32 == 0:  # q8_0 has blocks of 32 numbers
            writer.add_tensor(gguf_name, gguf.quants.quantize(array, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(gguf_name, array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _family(model: Any) -> Family:
    text = model.config.get_text_config()
    if text.model_type not in FAMILIES:
        raise ModelError(
            f"{unknown('family for llama.cpp', text.model_type, FAMILIES)} "
            "Fix: --to onnx or --to openvino, which take any family."
        )
    family = FAMILIES[text.model_type]
    scalar = getattr(text, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != _head_width(text):
        raise ModelError(
            f"llama.cpp scales attention by the width of a head ({_head_width(text)}), but this "
            f"model by query_pre_attn_scalar {scalar}. Fix: --to onnx."
        )
    return family


def _head_width(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _add_shape(writer: Any, model: Any, max_length: int, family: Family) -> None:
    """Write the sizes and constants from which llama.cpp builds the transformer."""
    text = model.config.get_text_config()
    head = _head_width(text)
    writer.add_vocab_size(text.vocab_size)
    writer.add_context_length(max_length)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    rope = text.rope_parameters
    full = rope.get("full_attention", rope)
    writer.add_rope_freq_base(full["rope_theta"])
    if (cap := getattr(text, "attn_logit_softcapping", None)) is not None:
        writer.add_attn_logit_softcapping(cap)
    reach = window(model.config)
    if family.windows and reach is not None:
        writer.add_sliding_window(2 * reach)  # llama.cpp counts the whole window
        writer.add_sliding_window_pattern([t == "sliding_attention" for t in text.layer_types])
        writer.add_rope_freq_base_swa(rope.get("sliding_attention", rope)["rope_theta"])
    elif reach is not None and max_length > reach + 1:
        raise ModelError(
            f"llama.cpp has no window to both sides for {text.model_type}, and a text of "
            f"{max_length} tokens is longer than this one ({reach} tokens to each side). "
            f"Fix: save the encoder with max_length={reach + 1}, or --to onnx."
        )


def _tensors(model: Any, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every weight in llama.cpp's layout."""
    text = model.config.get_text_config()
    for name, value in model.state_dict().items():
        value = value.detach().cpu()
        heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}
        part = name.split(".")[-2]
        if family.interleaved and part in heads:
            # Rotary pairs of channels in a head: i and i + head/2 here, 2i and 2i + 1 in llama.cpp.
            halves = value.reshape(heads[part], 2, -1, *value.shape[1:])  # (heads, 2, head/2, ...)
            value = halves.transpose(1, 2).reshape(value.shape)
        if family.shifted and part.endswith("norm"):
            value = value.float() + 1
        yield f"model.{name}", value
    factors = _rotary_factors(model, text)
    if factors is None:
        return
    if not family.factors:
        raise ModelError(
            f"llama.cpp does not scale the rotary positions of {text.model_type} as this model "
            "does. Fix: --to onnx."
        )
    yield "rope_freqs.weight", factors


def _rotary_factors(model: Any, text: Any) -> Tensor | None:
    """The number by which each rotary frequency is divided; None if all have their usual values.

    An empty tensor stands for a scaling that cannot be written as such numbers.
    """
    rotary = model.rotary_emb
    parts = ("full_attention", "sliding_attention") if hasattr(text, "layer_types") else ()
    for part in ("", *parts):
        name = f"{part}_" if part else ""
        found = getattr(rotary, f"{name}inv_freq", None)
        if found is None:
            continue
        rope = text.rope_parameters
        theta = rope.get(part, rope).get("rope_theta", 1e4)
        head = _head_width(text)
        usual = 1 / theta ** (torch.arange(0, head, 2, device=found.device) / head)
        scaling = getattr(rotary, f"{name}attention_scaling", 1.0)
        if scaling != 1.0 or len(found) != len(usual):
            return torch.zeros(0)
        if not torch.allclose(found, usual, rtol=1e-4):
            factors: Tensor = (usual / found).cpu()
            return factors
    return None


def _add_vocabulary(writer: Any, saved: dict[str, Any], model: Any, tokens: TextTokenizer) -> None:
    """Write the tokenizer; `saved` is the content of ``tokenizer.json``."""
    vocabulary = saved["model"].get("vocab")
    if saved["model"].get("type") != "BPE":
        raise ModelError(
            f"this tokenizer is of type {saved['model'].get('type')}; only BPE can be written for "
            "llama.cpp. Fix: --to onnx."
        )
    size = model.config.get_text_config().vocab_size
    texts = [f"[UNUSED{i}]" for i in range(size)]
    kinds = [UNUSED] * size
    for text, number in vocabulary.items():
        texts[number], kinds[number] = text, NORMAL
    fallback = bool(saved["model"].get("byte_fallback"))  # as in tokenizers from SentencePiece
    if fallback:
        for number, text in enumerate(texts):
            if len(text) == 6 and text.startswith("<0x"):
                kinds[number] = BYTE
    for added in saved["added_tokens"]:
        texts[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else ADDED
    merges = [m if isinstance(m, str) else " ".join(m) for m in saved["model"]["merges"]]
    if fallback:
        unknown_token = saved["model"].get("unk_token")
        if unknown_token in vocabulary:
            kinds[vocabulary[unknown_token]] = UNKNOWN
            writer.add_unk_token_id(vocabulary[unknown_token])
        _add_sentencepiece(writer, saved, texts, merges)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitter(saved["pre_tokenizer"]))
        writer.add_token_merges(merges)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    _add_special_tokens(writer, tokens)


def _add_sentencepiece(writer: Any, saved: Any, texts: list[str], merges: list[str]) -> None:
    """Write scores in the order of `merges`: llama.cpp merges the pair with the best one first."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(ranks.get(text, len(merges))) for text in texts])
    # A space before the text is added by a normalizer, or by the pre-tokenizer's prepend_scheme.
    steps = json.dumps([saved.get("normalizer"), saved.get("pre_tokenizer")])
    marks = ('"Prepend"', '"prepend_scheme": "always"', '"prepend_scheme": "first"')
    writer.add_add_space_prefix(any(mark in steps for mark in marks))
    writer.add_remove_extra_whitespaces(False)


def _splitter(saved: dict[str, Any] | None) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level tokenizer."""
    parts = (saved or {}).get("pretokenizers", [saved] if saved else [])
    steps = []
    for part in parts:
        if part["type"] == "Digits" and part["individual_digits"]:
            steps.append("digits")
        elif part["type"] == "ByteLevel":
            steps += ["bytes"] if part["use_regex"] and not part["add_prefix_space"] else []
        else:
            steps.append(str(part.get("pattern", {}).get("Regex", part["type"])))
    if tuple(steps) not in SPLITTERS:
        raise ModelError(
            f"this tokenizer splits texts into words by {steps}, for which no name in llama.cpp is "
            f"known. Allowed: {', '.join(SPLITTERS.values())}. Fix: --to onnx."
        )
    return SPLITTERS[tuple(steps)]


def _add_special_tokens(writer: Any, tokens: TextTokenizer) -> None:
    eos = tokens.tokenizer.eos_token_id
    if len(tokens.prefix) > 1 or tokens.suffix not in ([], [eos]):
        raise ModelError(
            "llama.cpp can add one token before a text and EOS after it, but this tokenizer adds "
            f"{len(tokens.prefix)} before and {len(tokens.suffix)} after it. Fix: --to onnx."
        )
    if tokens.prefix:
        writer.add_bos_token_id(tokens.prefix[0])
    if eos is not None:
        writer.add_eos_token_id(eos)
    writer.add_pad_token_id(tokens.tokenizer.pad_token_id)
    writer.add_add_bos_token(bool(tokens.prefix))
    writer.add_add_eos_token(bool(tokens.suffix))
