"""Packed attention: the states of a text are those it has alone, with gradients too."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModel,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from unmasked import adapters
from unmasked.bidirectional import open_config, open_mask
from unmasked.packing import NAME, checkpoint_contexts, enable_packing, pack, run_packed

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
PACKED = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "mistral_window": MistralConfig(**SMALL, sliding_window=4),
    "gemma2_softcap": Gemma2Config(**SMALL, sliding_window=4, **MIXED),
    "gemma3_native_window": Gemma3TextConfig(**SMALL, sliding_window=8, **MIXED),
    "gpt_oss_sinks": GptOssConfig(
        **SMALL, sliding_window=4, num_local_experts=2, num_experts_per_tok=1, **MIXED
    ),
    "gpt2_positions": GPT2Config(
        vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2
    ),
}
PADDED = {
    "falcon_own_attention": FalconConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "lfm2_convolution": Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
}
LENGTHS = (9, 3, 9, 17, 1, 6)


def build(config):
    torch.manual_seed(0)
    model = AutoModel.from_config(open_config(config)).eval()
    open_mask(model)
    return model


def batch(left=False):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 120, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return (ids, mask.flip(1)) if left else (ids, mask)


def singles(model, ids, mask):
    rows = [row[keep.bool()][None] for row, keep in zip(ids, mask, strict=True)]
    return [model(input_ids=row).last_hidden_state[0] for row in rows]


@pytest.mark.parametrize("left", [False, True], ids=["right_padded", "left_padded"])
@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_packed_equals_one_by_one(name, left):
    model = build(PACKED[name])
    ids, mask = batch(left)
    expected = singles(model, ids, mask)  # the family's own attention, before the switch
    assert enable_packing(model) is None
    packed = pack(mask)
    states = run_packed(model, ids, packed)
    for row, single in enumerate(expected):
        torch.testing.assert_close(states[packed.rows == row], single, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_an_unpacked_call_still_gets_its_mask(name):
    """A padded batch straight into a model that was switched to our attention."""
    model = build(PACKED[name])
    ids, mask = batch()
    expected = singles(model, ids, mask)
    assert enable_packing(model) is None
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for row, single in enumerate(expected):
        length = LENGTHS[row]
        torch.testing.assert_close(states[row, :length], single, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PADDED)
def test_a_family_that_cannot_be_packed_is_left_as_it_was(name):
    model = build(PADDED[name])
    before = model.config._attn_implementation
    assert enable_packing(model) is not None
    assert model.config._attn_implementation == before != NAME


@torch.no_grad()
def test_without_separation_the_check_would_fail():
    """The check can fail: one text for all tokens is another result."""
    model = build(PACKED["llama"])
    assert enable_packing(model) is None
    ids, mask = batch()
    packed = pack(mask)
    together = model(
        input_ids=ids[packed.rows, packed.columns][None], position_ids=packed.positions[None]
    ).last_hidden_state[0]
    assert (together - run_packed(model, ids, packed)).abs().max() > 0.1


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_gradients_with_an_adapter(checkpointing):
    """Packed against one by one, through LoRA, with and without recomputation."""
    model = build(PACKED["mistral_window"])
    assert enable_packing(model) is None
    if checkpointing:
        model.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": checkpoint_contexts}
        )
        model.enable_input_require_grads()
    peft_model = adapters.attach(model, rank=4, dropout=0.0).train()
    torch.manual_seed(1)
    for name, weight in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    ids, mask = batch()

    def gradients(loss):
        peft_model.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in peft_model.named_parameters() if p.requires_grad}

    packed = pack(mask)
    together = gradients(run_packed(peft_model, ids, packed).square().sum())
    alone = gradients(sum(s.square().sum() for s in singles(peft_model, ids, mask)))
    assert together.keys() == alone.keys() != set()
    for name, value in together.items():
        torch.testing.assert_close(value, alone[name], atol=1e-3, rtol=1e-3)
