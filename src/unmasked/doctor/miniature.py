"""A small config of the same family as a given one, to build a model with random weights.

Whether a decoder can be made bidirectional depends on its code, and on the config fields that
choose its masks: kinds of layers, windows, chunks, positions. These stay; widths, vocabulary and
experts shrink. So a miniature shows in milliseconds, without any weights, what the model does.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

WIDTH, HEADS, HEAD = 64, 4, 16
VOCABULARY = 512
WINDOW = 8  # shorter than the proof's texts, so that the window has an effect

_SIZES: tuple[tuple[int, str], ...] = (
    (WIDTH, "hidden_size n_embd d_model word_embed_proj_dim lru_width"),
    (WIDTH, "embedding_size embedding_dim emb_dim"),
    (2 * WIDTH, "attention_hidden_size mamba_d_ssm"),
    (96, "intermediate_size n_inner ffn_dim dim_ff dff intermediate_size_mlp"),
    (96, "dense_intermediate_size"),
    (VOCABULARY, "vocab_size_per_layer_input"),
    (128, "max_position_embeddings n_positions max_seq_len"),
    (WINDOW, "sliding_window attention_window_size window_size"),
    # attention
    (HEADS, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"),
    (HEAD, "head_dim global_head_dim dim_head v_head_dim kv_channels query_pre_attn_scalar"),
    (HEAD, "swa_head_dim swa_v_head_dim linear_head_dim qk_head_dim"),
    (2 * HEAD, "attention_head_dim"),
    (8, "qk_rope_head_dim qk_nope_head_dim rotary_dim"),
    (16, "q_lora_rank kv_lora_rank o_lora_rank"),
    # mixtures of experts
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_top_k moe_k moe_topk num_experts_per_token zero_expert_num"),
    (32, "moe_intermediate_size shared_expert_intermediate_size"),
    (32, "expert_ffn_hidden_size ffn_hidden_size"),
    (1, "n_group topk_group n_groups n_shared_experts num_shared_experts num_expert_group"),
    (1, "moe_num_shared_experts mamba_n_groups mamba_ngroups"),
    # state spaces, linear and indexed attention
    (8, "mamba_d_state state_size ssm_state_size mamba_n_heads mamba_num_heads index_head_dim"),
    (8, "hidden_size_per_layer_input"),
    (HEAD, "mamba_d_head mamba_head_dim mamba_headdim linear_key_head_dim linear_value_head_dim"),
    (2, "linear_num_key_heads index_n_heads"),
    (4, "linear_num_value_heads mamba_dt_rank time_step_rank"),
    (16, "chunk_size mamba_chunk_size"),  # texts are padded to a multiple
    (64, "index_topk"),
)
SMALL = {name: size for size, names in _SIZES for name in names.split()}
"""Name of a field → its value in a miniature."""


def miniature(config: PretrainedConfig) -> PretrainedConfig:
    """A small config that builds the same layers, with weights large enough for the proof.

    Raises:
        ValueError, TypeError, AttributeError: the rules do not fit the family.
    """
    text = config.get_text_config()
    return type(text).from_dict(small_fields(text))


def small_fields(text: PretrainedConfig) -> dict[str, Any]:
    """The fields of a miniature by name; a list or dict with a value per layer keeps its length."""
    given = text.to_dict()
    small = {name: _shrunk(name, value, given) for name, value in given.items()}
    for name, value in given.items():
        if isinstance(value, list | tuple) and len(value) == text.num_hidden_layers > 1:
            small[name] = [_shrunk(name, item, given) for item in value]
        elif isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
            small[name] = {int(layer): inner for layer, inner in small[name].items()}
        elif name.endswith("token_id") and value is not None:
            small[name] = 0
    small["initializer_range"] = 0.2  # with smaller weights attention is nearly uniform
    return small


def _shrunk(name: str, value: Any, given: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        if "rope" in name:
            return _plain_rope(value)
        return {key: _shrunk(key, inner, {**given, **value}) for key, inner in value.items()}
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    if "key_value_heads" in name or name in ("num_kv_heads", "kv_n_heads"):
        heads = given.get("num_attention_heads") or given.get("n_heads") or value
        return value if value == 1 else HEADS if value == heads else HEADS // 2
    if name == "head_dim" and value == given.get("qk_rope_head_dim"):
        return SMALL["qk_rope_head_dim"]
    if name in SMALL:
        return SMALL[name]
    return min(value, VOCABULARY) if "vocab" in name else value


def _plain_rope(value: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions without long-context scaling, whose tables depend on the head's width."""
    if any(isinstance(inner, dict) for inner in value.values()):  # one dict per kind of layer
        return {key: _plain_rope(inner) if inner else inner for key, inner in value.items()}
    numbers = {key: inner for key, inner in value.items() if not isinstance(inner, list)}
    return {**numbers, "rope_type": "default"}
