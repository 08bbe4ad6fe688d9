"""Checkpoints in the layout of the published ones, tiny and random, in a hub cache; and the
reference: the same vectors from plain torch, by the rules of the original package.

Nothing here uses the package under test, transformers' models or PEFT.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

MARKER = "!@#$%^&*()"
WIDTH, HIDDEN, LAYERS, HEADS, KEY_HEADS, HEAD = 32, 48, 2, 4, 2, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OWNER = "McGill-NLP"
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEMPLATES = {
    "llama3": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "inst": ("[INST] ", " [/INST]"),
    "plain": ("", ""),
}
POISON = """
from pathlib import Path
Path({mark!r}).touch()
raise RuntimeError("remote code was executed")
"""
"""It leaves its mark even where somebody catches its error; transformers runs a copy of it."""


# --- tokenizers -------------------------------------------------------------------------------


def byte_level_tokenizer(sentences: list[str], chat: bool) -> PreTrainedTokenizerFast:
    """As Llama 3's: byte-level, special tokens of the template in the vocabulary."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", *LLAMA3]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=names, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator([*sentences, *["__init__"] * 50], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=names[0], eos_token=names[1],
        chat_template="".join(LLAMA3) + "{{ messages }}" if chat else None,
    )  # fmt: skip


def sentencepiece_tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    """As Mistral's: spaces become part of words; the template is ordinary text."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    # SentencePiece learns no token across words, though nothing splits words when it encodes
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.train_from_iterator([*sentences, *["__init__"] * 50], trainer)
    backend.pre_tokenizer = None
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template="{{ bos_token }}[INST] {{ messages }} [/INST]",
    )  # fmt: skip


# --- checkpoints ------------------------------------------------------------------------------


def shapes() -> dict[str, tuple[int, int]]:
    """(out, in) of each linear layer."""
    keys = KEY_HEADS * HEAD
    attention = {"q_proj": WIDTH, "k_proj": keys, "v_proj": keys, "o_proj": WIDTH}
    found = {f"self_attn.{name}": (out, WIDTH) for name, out in attention.items()}
    found |= {f"mlp.{name}": (HIDDEN, WIDTH) for name in ("gate_proj", "up_proj")}
    return {
        f"layers.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in (found | {"mlp.down_proj": (WIDTH, HIDDEN)}).items()
    }


def base_weights(vocabulary: int) -> dict[str, torch.Tensor]:
    """Weights of a random Llama, by their names in a causal language model."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return 0.15 * torch.randn(*shape, generator=generator)

    weights = {f"model.{name}.weight": draw(*shape) for name, shape in shapes().items()}
    weights |= {
        f"model.layers.{layer}.{name}.weight": 1 + draw(WIDTH)
        for layer in range(LAYERS)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    weights |= {"model.embed_tokens.weight": 4 * draw(vocabulary, WIDTH)}
    return weights | {
        "model.norm.weight": 1 + draw(WIDTH),
        "lm_head.weight": draw(vocabulary, WIDTH),
    }


def adapter_weights(seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (out, into) in shapes().items():
        key = f"base_model.model.{name}"
        weights[f"{key}.lora_A.weight"] = 0.2 * torch.randn(rank, into, generator=generator)
        weights[f"{key}.lora_B.weight"] = 0.2 * torch.randn(out, rank, generator=generator)
    return weights


def llama_config(vocabulary: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary,
        "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 128, "torch_dtype": "float32",
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def adapter_config(base: str, rank: int = 4) -> dict:
    """As PEFT 0.10 wrote it."""
    return {
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": base,
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
        "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 2 * rank,
        "lora_dropout": 0.05, "megatron_config": None, "megatron_core": "megatron.core",
        "modules_to_save": None, "peft_type": "LORA", "r": rank, "rank_pattern": {},
        "revision": None, "target_modules": list(TARGETS), "task_type": None,
        "use_dora": False, "use_rslora": False,
    }  # fmt: skip


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def repository(cache: Path, name: str, revision: str = "main") -> Path:
    """An empty snapshot of a repository in a hub cache."""
    folder = cache / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def write_base(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", llama_config(len(tokenizer)))
    save_file(base_weights(len(tokenizer)), folder / "model.safetensors", metadata={"format": "pt"})


def write_adapter(folder: Path, base: str, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    write_json(folder / "adapter_config.json", adapter_config(base))
    save_file(adapter_weights(seed), folder / "adapter_model.safetensors")


def publish(cache: Path, tokenizer: PreTrainedTokenizerFast, base: str = "llamas/Tiny-Instruct"):
    """A base, its MNTP checkpoint and a supervised one on top, as McGill-NLP published them."""
    write_base(repository(cache, base), tokenizer)
    with_mask = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token, chat_template=tokenizer.chat_template,
        mask_token="_",
    )  # fmt: skip
    mntp = repository(cache, f"{OWNER}/LLM2Vec-Tiny-mntp")
    write_adapter(mntp, base, seed=1)
    with_mask.save_pretrained(mntp)
    remote = {
        "AutoModel": "modeling_llama_encoder.LlamaEncoderModel",
        "AutoConfig": "modeling_llama_encoder.LlamaEncoderConfig",
    }
    write_json(mntp / "config.json", {**llama_config(len(tokenizer)), "auto_map": remote})
    (mntp / "modeling_llama_encoder.py").write_text(POISON.format(mark=str(mntp / "executed")))
    second = repository(cache, f"{OWNER}/LLM2Vec-Tiny-mntp-supervised")
    write_adapter(second, base, seed=2)
    with_mask.save_pretrained(second)
    write_json(second / "config.json", {**llama_config(len(tokenizer)), "auto_map": remote})
    settings = {"pooling_mode": "mean", "max_length": 64, "doc_max_length": 40}
    write_json(second / "llm2vec_config.json", {**settings, "skip_instruction": True})
    return mntp, second


# --- the reference ----------------------------------------------------------------------------


def merged_weights(base: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    """W + 2 B A, one adapter after the other, without the prefix ``model.``."""
    weights = {
        k.removeprefix("model."): v for k, v in load_file(base / "model.safetensors").items()
    }
    for adapter in adapters:
        factors = load_file(adapter / "adapter_model.safetensors")
        for name in shapes():
            a, b = (factors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + 2 * b @ a
    return weights


def llama(weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """(T, D) last hidden states of a bidirectional Llama."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]

    def rotated(x: torch.Tensor) -> torch.Tensor:  # (T, heads, HEAD)
        frequencies = 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)
        angles = torch.arange(len(x))[:, None] * frequencies  # (T, HEAD / 2)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    x = weights["embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        at = f"layers.{layer}."
        h = norm(x, at + "input_layernorm")
        q, k, v = (
            (h @ weights[f"{at}self_attn.{n}_proj.weight"].T).view(len(ids), -1, HEAD)
            for n in "qkv"
        )
        q, k = rotated(q), rotated(k)
        k, v = (t.repeat_interleave(HEADS // KEY_HEADS, dim=1) for t in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(HEAD)
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(len(ids), WIDTH)
        x = x + mixed @ weights[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm")
        gate, up = (h @ weights[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ weights[at + "mlp.down_proj.weight"].T
    return norm(x, "norm")


def reference(
    tokenizer: PreTrainedTokenizerFast,
    weights: dict[str, torch.Tensor],
    instruction: str,
    text: str,
    template: tuple[str, str],
    mode: str = "mean",
    max_length: int = 64,
    doc_max_length: int = 40,
) -> torch.Tensor:
    """(D,) vector of the original's rules: marker, word cutting, template, counting."""

    def count(part: str) -> int:
        return len(tokenizer(part, add_special_tokens=False)["input_ids"][:max_length])

    while (length := count(text)) > doc_max_length:
        words = text.split()
        text = " ".join(words[: int(len(words) * (doc_max_length / length))])
    joined = f"{instruction.strip()} {MARKER}{text}" if instruction else MARKER + text
    prefix, suffix = template
    if prefix:
        joined = prefix + joined.strip() + suffix
    pooled = count(joined.split(MARKER)[1])
    ids = tokenizer(joined.replace(MARKER, ""))["input_ids"][:max_length]
    states = llama(weights, ids)[-pooled:]
    if mode == "weighted_mean":
        steps = torch.arange(1.0, len(states) + 1)[:, None]
        return (states * steps).sum(0) / steps.sum()
    return states[-1] if mode == "last_token" else states.mean(0)
