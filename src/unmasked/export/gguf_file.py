"""The encoder as a GGUF file, for llama.cpp and what is built on it (Ollama, LM Studio).

The file says ``attention.causal = false``, how to pool, and whether BOS and EOS are added; the
weights are of 16 or 8 bits. llama.cpp pools every token, so an encoder that leaves BOS and the
instruction out of pooling is another one there, and `exporting` says so with a number. What it
cannot compute at all is refused here by name: other families, other rotary positions, a window that
a text can leave.

Only the writer of llama.cpp's own ``gguf`` package is used. Cost: the weights are read once.

Source: the names and layouts are those of llama.cpp's converter (ggml-org/llama.cpp, gguf-py).
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
    """How llama.cpp computes a family of transformers.

    Attributes:
        arch: its name of the architecture.
        interleaved: rotary positions pair neighbouring channels, so that the rows of the query and
            key projections are stored in another order.
        shifted: norms are stored with one added to them.
        windows: its windows reach to both sides.
        factors: rotary positions may be scaled by a factor for each channel.
    """

    arch: str
    interleaved: bool = False
    shifted: bool = False
    windows: bool = False
    factors: bool = False


FAMILIES = {
    "llama": Family("llama", interleaved=True, factors=True),
    "mistral": Family("llama", interleaved=True, factors=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", shifted=True),
    "gemma2": Family("gemma2", shifted=True),
    "gemma3_text": Family("gemma-embedding", shifted=True, windows=True),
}
"""By the model type that transformers gives a family."""
POOLING = {"mean": 1, "bos_token": 2, "last_token": 3, "eos_token": 3}
"""Our pooling modes that llama.cpp has, and its numbers for them."""
NORMAL, UNKNOWN, CONTROL, ADDED, UNUSED, BYTE = range(1, 7)
"""What kinds of tokens a file tells apart."""

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTERS = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_LETTERS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_LETTERS + r"\p{N}" + _REST,): "qwen2",
}
"""How a tokenizer cuts a text into words, and what llama.cpp calls that."""


def write_gguf(
    folder: Path, model: Any, tokens: TextTokenizer, mode: str, weights: Literal["float16", "int8"]
) -> Path:
    """Write ``model.gguf`` into a saved folder.

    Args:
        folder: with the saved tokenizer.
        model: the bare transformer.
        tokens: how texts become ids.
        mode: the pooling mode.
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
    path = folder / FILE
    writer = gguf.GGUFWriter(path, family.arch)
    _shape(writer, model, tokens.max_length, family)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType(POOLING[mode]))
    _vocabulary(writer, json.loads((folder / "tokenizer.json").read_text("utf-8")), model, tokens)
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[family.arch]
    names = gguf.get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    small = gguf.GGMLQuantizationType.Q8_0
    kind = gguf.LlamaFileType.MOSTLY_Q8_0 if weights == "int8" else gguf.LlamaFileType.MOSTLY_F16
    writer.add_file_type(kind)
    for name, value in _tensors(model, family):
        there = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        array = value.float().numpy()
        if array.ndim < 2:
            writer.add_tensor(there, array)
        elif weights == "int8" and array.shape[-1] % 32 == 0:
            writer.add_tensor(there, gguf.quants.quantize(array, small), raw_dtype=small)
        else:
            writer.add_tensor(there, array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _family(model: Any) -> Family:
    text = model.config.get_text_config()
    if text.model_type not in FAMILIES:
        raise ModelError(
            f"{unknown('family for llama.cpp', text.model_type, FAMILIES)} "
            "Fix: --to onnx or --to openvino, which take any family."
        )
    family = FAMILIES[text.model_type]
    scalar = getattr(text, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != _head(text):
        raise ModelError(
            f"llama.cpp scales attention by the width of a head ({_head(text)}), this model by "
            f"query_pre_attn_scalar {scalar}. Fix: --to onnx."
        )
    return family


def _head(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _shape(writer: Any, model: Any, max_length: int, family: Family) -> None:
    """The numbers that llama.cpp builds the transformer from."""
    text = model.config.get_text_config()
    head = _head(text)
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
        writer.add_sliding_window(2 * reach)
        writer.add_sliding_window_pattern([t == "sliding_attention" for t in text.layer_types])
        writer.add_rope_freq_base_swa(rope.get("sliding_attention", rope)["rope_theta"])
    elif reach is not None and max_length > reach + 1:
        raise ModelError(
            f"llama.cpp knows no window to both sides for {text.model_type}, and a text of "
            f"{max_length} tokens leaves this one ({reach} to each side). "
            f"Fix: save the encoder with max_length={reach + 1}, or --to onnx."
        )


def _tensors(model: Any, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every weight, as llama.cpp lays it out."""
    text = model.config.get_text_config()
    for name, value in model.state_dict().items():
        value = value.detach().cpu()
        heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}
        part = name.split(".")[-2]
        if family.interleaved and part in heads:
            halves = value.reshape(heads[part], 2, -1, *value.shape[1:])
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
    """By how much each rotary frequency is divided; None if all are as usual."""
    rotary = model.rotary_emb
    parts = ("full_attention", "sliding_attention") if hasattr(text, "layer_types") else ()
    for part in ("", *parts):
        name = f"{part}_" if part else ""
        found = getattr(rotary, f"{name}inv_freq", None)
        if found is None:
            continue
        rope = text.rope_parameters
        theta = rope.get(part, rope).get("rope_theta", 1e4)
        usual = 1 / theta ** (torch.arange(0, _head(text), 2, device=found.device) / _head(text))
        scaling = getattr(rotary, f"{name}attention_scaling", 1.0)
        if scaling != 1.0 or len(found) != len(usual):
            return torch.zeros(0)
        if not torch.allclose(found, usual, rtol=1e-4):
            factors: Tensor = (usual / found).cpu()
            return factors
    return None


def _vocabulary(writer: Any, saved: dict[str, Any], model: Any, tokens: TextTokenizer) -> None:
    """The tokens, and what is put around a text."""
    vocabulary = saved["model"].get("vocab")
    if saved["model"].get("type") != "BPE":
        raise ModelError(
            f"this tokenizer is of the kind {saved['model'].get('type')}; for llama.cpp only BPE "
            "is written. Fix: --to onnx."
        )
    size = model.config.get_text_config().vocab_size
    texts = [f"[UNUSED{i}]" for i in range(size)]
    kinds = [UNUSED] * size
    for text, number in vocabulary.items():
        texts[number], kinds[number] = text, NORMAL
    fallback = bool(saved["model"].get("byte_fallback"))
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
        _sentencepiece(writer, saved, texts, merges)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitter(saved["pre_tokenizer"]))
        writer.add_token_merges(merges)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    _around(writer, tokens)


def _sentencepiece(writer: Any, saved: Any, texts: list[str], merges: list[str]) -> None:
    """llama.cpp merges the pair with the best score first: that is the order of the merges."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(ranks.get(text, len(merges))) for text in texts])
    before = json.dumps([saved.get("normalizer"), saved.get("pre_tokenizer")])
    prepends = '"Prepend"' in before or '"prepend_scheme": "always"' in before
    writer.add_add_space_prefix(prepends or '"prepend_scheme": "first"' in before)
    writer.add_remove_extra_whitespaces(False)


def _splitter(saved: dict[str, Any] | None) -> str:
    """llama.cpp's name of how a byte-level tokenizer cuts a text into words."""
    parts = (saved or {}).get("pretokenizers", [saved] if saved else [])
    seen = []
    for part in parts:
        if part["type"] == "Digits" and part["individual_digits"]:
            seen.append("digits")
        elif part["type"] == "ByteLevel":
            seen += ["bytes"] if part["use_regex"] and not part["add_prefix_space"] else []
        else:
            seen.append(str(part.get("pattern", {}).get("Regex", part["type"])))
    if tuple(seen) not in SPLITTERS:
        raise ModelError(
            f"llama.cpp has no name here for how this tokenizer cuts words ({seen}). "
            f"Allowed: {', '.join(SPLITTERS.values())}. Fix: --to onnx."
        )
    return SPLITTERS[tuple(seen)]


def _around(writer: Any, tokens: TextTokenizer) -> None:
    eos = tokens.tokenizer.eos_token_id
    if len(tokens.prefix) > 1 or tokens.suffix not in ([], [eos]):
        raise ModelError(
            "llama.cpp can put one token before a text and EOS behind it, and this tokenizer adds "
            f"{len(tokens.prefix)} and {len(tokens.suffix)}. Fix: --to onnx."
        )
    if tokens.prefix:
        writer.add_bos_token_id(tokens.prefix[0])
    if eos is not None:
        writer.add_eos_token_id(eos)
    writer.add_pad_token_id(tokens.tokenizer.pad_token_id)
    writer.add_add_bos_token(bool(tokens.prefix))
    writer.add_add_eos_token(bool(tokens.suffix))
