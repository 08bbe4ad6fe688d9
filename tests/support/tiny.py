"""Tiny random decoders of many families, built in milliseconds.

Their weights are drawn ten times wider than usual: with the usual ones attention is nearly uniform
and a missing mask hardly shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
"""Fields of a still smaller decoder, for tests that build many."""
HEAD = {"head_dim": 16}
HYBRID = {"layer_types": ["conv", "full_attention"]}
GEMMA = {**HEAD, "query_pre_attn_scalar": 16}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
FALCON_H1 = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
JAMBA = {
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "num_experts": 2,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
GEMMA4 = {
    "global_head_dim": 16,
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 8,
}
LLAMA4 = {**HEAD, "attention_chunk_size": 64, "no_rope_layers": [1, 0], "moe_layers": []}
MODERNBERT = {
    "num_key_value_heads": None,
    "layer_types": ["sliding_attention", "full_attention"],
    "local_attention": 8,  # twice the window
}
WITHOUT_HEADS = {"num_attention_heads": None, "num_key_value_heads": None}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon_h1": ("FalconH1Config", FALCON_H1),
    "gemma": ("GemmaConfig", HEAD),
    "gemma2": ("Gemma2Config", {**GEMMA, **WINDOWS}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, **WINDOWS}),
    "gemma4": ("Gemma4TextConfig", {**HEAD, **WINDOWS, **GEMMA4}),
    "gpt2": ("GPT2Config", {"num_key_value_heads": None}),
    "gpt_neo": ("GPTNeoConfig", {"attention_types": [[["global", "local"], 1]]}),
    "jamba": ("JambaConfig", JAMBA),
    "lfm2": ("Lfm2Config", HYBRID),
    "llama": ("LlamaConfig", {}),
    "llama4": ("Llama4TextConfig", LLAMA4),
    "mamba": ("MambaConfig", {"state_size": 8, **WITHOUT_HEADS}),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
    "modernbert_decoder": ("ModernBertDecoderConfig", MODERNBERT),
    "mpt": ("MptConfig", {"num_key_value_heads": None}),
    "nemotron": ("NemotronConfig", {}),
    "qwen3": ("Qwen3Config", HEAD),
    "stablelm": ("StableLmConfig", {}),
}


def config(family: str, **fields: Any) -> PretrainedConfig:
    """A tiny config of a family; ``fields`` replace its own."""
    name, own = FAMILIES[family]
    values = {k: v for k, v in {**COMMON, **own, **fields}.items() if v is not None}
    return getattr(transformers, name)(**values)


def model(
    source: str | PretrainedConfig,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> PreTrainedModel:
    """A random bare decoder in evaluation mode, of a family or a config, always the same one."""
    torch.manual_seed(0)
    chosen = config(source, **fields) if isinstance(source, str) else source
    how = {} if attention is None else {"attn_implementation": attention}
    return AutoModel.from_config(chosen, dtype=dtype, **how).eval()


def save_random(folder: Path, config, tokenizer=None) -> Path:
    """A random causal language model of a config, in a folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
