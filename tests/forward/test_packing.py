"""Packed attention: the states of a text are those it has alone, with gradients too."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

import pytest
import torch
from support import tiny
from torch.nn.attention import varlen
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
from transformers.utils.import_utils import is_flash_attn_2_available

from unmasked.checkpoint import adapters
from unmasked.forward import packing
from unmasked.forward.packing import NAME, checkpoint_contexts, enable_packing, pack, run_packed
from unmasked.mask.opening import attention_name, open_config
from unmasked.mask.proof import open_mask

SMALL = {**tiny.SMALL, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
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
    before = attention_name(model)
    assert enable_packing(model) is not None
    assert attention_name(model) == before != NAME


def test_states_that_are_not_numbers_are_not_packed(monkeypatch):
    model = build(PACKED["llama"])
    monkeypatch.setattr(packing, "_attend", lambda query, *_: torch.full_like(query, torch.nan))
    assert enable_packing(model) == "packed and single forwards differ by nan"
    assert attention_name(model) == "sdpa"


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


# --- the kernels of a GPU -------------------------------------------------------------------------


def by_text(q, k, v, cu_seqlens, scale, softcap=0.0, dropout=0.0):
    """(N, H, d) attention within each text, written out; H queries share G keys."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    parts = []
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        weights = torch.nn.functional.dropout(scores.softmax(dim=-1), dropout)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v[start:stop]))
    return torch.cat(parts)


@pytest.fixture
def kernels(monkeypatch):
    """Pure torch in place of both kernels, with their signatures; says which were called."""
    calls = []
    of_torch = inspect.signature(varlen.varlen_attn)

    def varlen_attn(*args, **kwargs):
        given = of_torch.bind(*args, **kwargs).arguments
        q, k, v, ends = (given[name] for name in ("query", "key", "value", "cu_seq_q"))
        assert ends is given["cu_seq_k"] and ends.dtype == torch.int32
        assert given["enable_gqa"] == (q.shape[1] != k.shape[1])
        assert given["max_q"] == given["max_k"] == int(ends.diff().max())
        calls.append("torch")
        return by_text(q, k, v, ends, given["scale"])

    def flash_attn_varlen_func(  # as in flash-attn 2.8
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        assert not causal and window_size == (-1, -1)
        assert dropout_p == 0 or softcap == 0  # the kernel refuses them together
        calls.append(("flash-attn", dropout_p, softcap))
        return by_text(q, k, v, cu_seqlens_q, softmax_scale, softcap, dropout_p)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(packing, "_on_half_gpu", lambda query: True)
    return calls


def attend(head=8, **options):
    """(N, H, d) packed attention of random states, 4 heads on 2 keys."""
    torch.manual_seed(0)
    packed = pack(batch()[1])
    q, k, v = (torch.randn(1, heads, len(packed.rows), head) for heads in (4, 2, 2))
    with packing.packed_attention(packed):
        mask = options.pop("mask", None)
        return packing.attention(None, q, k, v, mask, scaling=0.3, **options)[0][0]


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
def test_a_kernel_takes_all_texts_at_once(monkeypatch, kernels, softcap):
    found = attend(softcap=softcap)
    assert kernels == ["torch" if softcap is None else ("flash-attn", 0.0, softcap)]
    monkeypatch.setattr(packing, "_on_half_gpu", lambda query: False)
    torch.testing.assert_close(found, attend(softcap=softcap), atol=1e-5, rtol=1e-5)


def test_dropout_goes_to_flash_attention(kernels):
    dropped = attend(dropout=0.3)
    assert kernels == [("flash-attn", 0.3, 0.0)]
    assert (dropped - attend()).abs().max() > 0.1


def test_what_no_kernel_has_goes_text_by_text(monkeypatch, kernels):
    longest = torch.ones(1, 1, max(LENGTHS), max(LENGTHS), dtype=torch.bool)
    attend(mask=longest)
    attend(s_aux=torch.zeros(4))
    attend(dropout=0.3, softcap=2.0)
    attend(dropout=0.3, head=256)  # a consumer GPU has no backward pass for it
    monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda: False)
    attend(dropout=0.3)
    attend(softcap=2.0)
    assert kernels == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_packed_equals_one_by_one_on_a_gpu(monkeypatch, name):
    calls = []
    real = varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", lambda *a, **k: calls.append(1) or real(*a, **k))
    model = build(PACKED[name]).to("cuda", torch.bfloat16)
    ids, mask = (tensor.cuda() for tensor in batch())
    expected = singles(model, ids, mask)
    assert enable_packing(model) is None
    packed = pack(mask)
    states = run_packed(model, ids, packed)
    assert calls or name != "llama"
    for row, single in enumerate(expected):
        apart = (states[packed.rows == row] - single).float().norm() / single.float().norm()
        assert apart < 5e-2


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
def test_dropout_acts_on_a_gpu_with_flash_attention(monkeypatch):
    from flash_attn import flash_attn_varlen_func as real

    calls = []
    count = lambda *a, **k: calls.append(k["dropout_p"]) or real(*a, **k)  # noqa: E731
    monkeypatch.setattr("flash_attn.flash_attn_varlen_func", count)
    model = build(PACKED["llama"]).to("cuda", torch.bfloat16)
    assert enable_packing(model) is None
    ids, mask = (tensor.cuda() for tensor in batch())
    still = run_packed(model, ids, pack(mask))
    for layer in model.layers:
        layer.self_attn.attention_dropout = 0.3
    first, second = (run_packed(model.train(), ids, pack(mask)) for _ in range(2))
    assert calls == [0.3] * 4
    for one, other in ((first, second), (first, still)):
        assert (one - other).abs().max() > 0.01
    first.float().square().sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
