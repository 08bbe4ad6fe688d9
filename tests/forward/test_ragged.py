"""Attention over all texts at once: the code of a GPU, with stand-ins for its kernels."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support import tiny
from torch.nn.attention import varlen
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, Gemma3TextConfig, LlamaConfig, MistralConfig
from transformers.utils.import_utils import is_flash_attn_2_available

from unmasked.forward.packing import (
    attending,
    check,
    dropout,
    enable_packing,
    pack,
    ragged,
    run_packed,
)
from unmasked.mask.opening import attention_name, open_config
from unmasked.mask.proof import open_mask

SMALL = {**tiny.SMALL, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
WINDOWS = {
    "mistral": (MistralConfig(**SMALL, sliding_window=4), {4: (4, 4)}),
    "gemma3": (Gemma3TextConfig(**SMALL, sliding_window=8, **MIXED), {5: (4, 4), 0: (-1, -1)}),
}
LENGTHS = (9, 3, 9, 17, 1, 6)


def build(config):
    torch.manual_seed(0)
    model = AutoModel.from_config(open_config(config)).eval()
    open_mask(model)
    return model


def layout():
    return pack((torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long())


def by_text(q, k, v, ends, scale=None, softcap=0.0, dropped=0.0, window=(-1, -1)):
    """(N, H, d) attention within each text, written out; H queries share G keys."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    parts = []
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop])
        scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        apart = torch.arange(stop - start)[None] - torch.arange(stop - start)[:, None]
        if window[0] >= 0:
            scores = scores.masked_fill(apart < -window[0], -torch.inf)
        if window[1] >= 0:
            scores = scores.masked_fill(apart > window[1], -torch.inf)
        weights = torch.nn.functional.dropout(scores.softmax(dim=-1), dropped)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v[start:stop]))
    return torch.cat(parts)


def kernel_of(release, calls):
    """Pure torch with the signature that `varlen_attn` has in a release."""

    def run(q, k, v, ends, ends_k, longest, longest_k, scale, window, grouped):
        assert ends is ends_k and ends.dtype == torch.int32
        assert longest == longest_k == int(ends.diff().max())
        if grouped is not None and grouped != (q.shape[1] != k.shape[1]):
            raise ValueError("Expect query and key/value to have the same number of heads")
        calls.append(window)
        return by_text(q, k, v, ends, scale, window=window)

    if release == "2.10":

        def varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
        ):
            assert not is_causal
            texts = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
            return run(*texts, None, (-1, -1), None)

    elif release == "2.11":

        def varlen_attn(
            query,
            key,
            value,
            cu_seq_q,
            cu_seq_k,
            max_q,
            max_k,
            *,
            return_aux=None,
            scale=None,
            window_size=(-1, -1),
        ):
            texts = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
            return run(*texts, scale, window_size, None)

    else:  # 2.12 and 2.13 differ in what decoding alone needs

        def varlen_attn(
            query,
            key,
            value,
            cu_seq_q,
            cu_seq_k,
            max_q,
            max_k,
            *,
            return_aux=None,
            scale=None,
            window_size=(-1, -1),
            enable_gqa=False,
            seqused_k=None,
            block_table=None,
            **later,
        ):
            assert release == "2.13" or not later
            texts = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
            return run(*texts, scale, window_size, enable_gqa)

    return varlen_attn


RELEASES = ("2.10", "2.11", "2.12", "2.13")


@pytest.fixture
def on_gpu(monkeypatch):
    """The code of a GPU runs on the CPU; flash-attn is not installed unless a test installs it."""
    monkeypatch.setattr(ragged, "on_half_gpu", lambda query: True)
    monkeypatch.setattr(check, "on_half_gpu", lambda query: True)
    monkeypatch.setattr(ragged, "is_flash_attn_2_available", lambda: False)
    dropout.checked_kernel.cache_clear()
    yield
    dropout.checked_kernel.cache_clear()


@pytest.fixture(params=RELEASES)
def release(request, monkeypatch, on_gpu):
    """(release, windows that were asked for) with the kernel of a release of torch."""
    calls = []
    monkeypatch.setattr(varlen, "varlen_attn", kernel_of(request.param, calls))
    return request.param, calls


def attend(packed=None, head=8, mask=None, reach=None, **options):
    """(N, H, d) packed attention of random states, 4 heads on 2 keys."""
    torch.manual_seed(0)
    packed = packed or layout()
    q, k, v = (torch.randn(1, heads, len(packed.rows), head) for heads in (4, 2, 2))
    if reach is not None:
        mask = torch.empty(0, 1, reach[0] + 1, reach[1] + 1, dtype=torch.bool)
    options = {"scaling": 0.3, **options, attending.LAYOUT: packed}
    return attending.attention(None, q, k, v, mask, **options)[0][0]


def in_groups(monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr(ragged, "on_half_gpu", lambda query: False)
        return attend(**options)


# --- varlen_attn ----------------------------------------------------------------------------------


def test_every_release_takes_all_texts_at_once(monkeypatch, release):
    _, calls = release
    for scaling in (0.3, None):
        torch.testing.assert_close(
            attend(scaling=scaling), in_groups(monkeypatch, scaling=scaling), atol=1e-5, rtol=1e-5
        )
    assert calls == [(-1, -1)] * 2


def test_a_window_is_a_number_where_the_kernel_takes_one(monkeypatch, release):
    name, calls = release
    found = attend(reach=(2, 3))
    torch.testing.assert_close(found, in_groups(monkeypatch, reach=(2, 3)), atol=1e-5, rtol=1e-5)
    assert calls == ([] if name == "2.10" else [(2, 3)])


@pytest.mark.parametrize("family", WINDOWS)
@torch.no_grad()
def test_a_model_with_windows_is_packed_in_one_call_a_layer(release, family):
    name, calls = release
    config, reaches = WINDOWS[family]
    model = build(config)
    ids = torch.randint(3, 120, (len(LENGTHS), max(LENGTHS)))
    rows = list(zip(ids, LENGTHS, strict=True))
    expected = [model(input_ids=r[None, :n]).last_hidden_state[0] for r, n in rows]
    assert enable_packing(model) is None
    confirmed = {size: reach for size, reach in reaches.items() if name != "2.10" or not size}
    assert {size: model.packed_reaches.get(size) for size in confirmed} == confirmed
    calls.clear()
    packed = layout()
    states = run_packed(model, ids, packed)
    if name != "2.10":
        assert len(calls) == 2 and (4, 4) in calls
    for row, single in enumerate(expected):
        torch.testing.assert_close(states[packed.rows == row], single, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", WINDOWS)
def test_a_window_that_the_kernel_understands_otherwise_is_not_used(monkeypatch, on_gpu, family):
    """A kernel that counts the query itself sees one token less to each side."""

    def varlen_attn(q, k, v, ends, _, longest, __, *, scale=None, window_size=(-1, -1)):
        return by_text(q, k, v, ends, scale, window=tuple(w - 1 for w in window_size))

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    model = build(WINDOWS[family][0])
    assert enable_packing(model) is None
    assert {*model.packed_reaches} <= {0}


def test_a_kernel_that_differs_is_left_out_and_the_texts_are_still_packed(monkeypatch, on_gpu):
    def varlen_attn(q, k, v, ends, _, longest, __, *, scale=None):
        return by_text(q, k, v, ends, scale).flip(0)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    model = build(LlamaConfig(**SMALL))
    assert enable_packing(model) is None and attention_name(model) == "unmasked"
    assert not model.packed_at_once
    ids = torch.randint(3, 120, (len(LENGTHS), max(LENGTHS)))
    with torch.no_grad():
        single = model(input_ids=ids[:1, : LENGTHS[0]]).last_hidden_state[0]
        packed = layout()
        torch.testing.assert_close(
            run_packed(model, ids, packed)[packed.rows == 0], single, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("failure", [TypeError, RuntimeError])
def test_a_kernel_that_fails_is_left_out(monkeypatch, on_gpu, failure):
    def varlen_attn(*_, **__):
        raise failure("no such argument")

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    model = build(LlamaConfig(**SMALL))
    assert enable_packing(model) is None and not model.packed_at_once


# --- flash-attn -----------------------------------------------------------------------------------


@pytest.fixture
def flash_attn(monkeypatch, on_gpu):
    """Pure torch with the signature of flash-attn 2.8; (dropout, soft cap, window) of each call."""
    calls = []

    def flash_attn_varlen_func(
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
    ):
        assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        assert not causal
        assert dropout_p == 0 or softcap == 0  # the kernel refuses them together
        calls.append((dropout_p, softcap, window_size))
        return by_text(q, k, v, cu_seqlens_q, softmax_scale, softcap, dropout_p, window_size)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(ragged, "is_flash_attn_2_available", lambda: True)
    return calls


@pytest.mark.parametrize("reach", [None, (2, 2)], ids=["full", "window"])
def test_a_soft_cap_goes_to_flash_attention(monkeypatch, flash_attn, reach):
    found = attend(softcap=2.0, reach=reach)
    assert flash_attn == [(0.0, 2.0, reach or (-1, -1))]
    expected = in_groups(monkeypatch, softcap=2.0, reach=reach)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_no_kernel_has_goes_text_by_text(flash_attn):
    longest = torch.ones(1, 1, max(LENGTHS), max(LENGTHS), dtype=torch.bool)
    attend(mask=longest)
    attend(s_aux=torch.zeros(4))
    attend(dropout=0.3, softcap=2.0)
    attend(dropout=0.3, head=256)  # a consumer GPU has no backward pass for it
    assert flash_attn == []


# --- dropout --------------------------------------------------------------------------------------


@pytest.fixture(params=["flash-attn", "operator", "nested"])
def dropped(request, monkeypatch):
    """Each way to drop attention weights of all texts at once; nested tensors are torch's own."""
    if request.param == "flash-attn":
        return request.param, request.getfixturevalue("flash_attn")
    request.getfixturevalue("on_gpu")
    calls = []
    if request.param == "operator":
        monkeypatch.setattr(dropout, "flash_operator", lambda: operator(calls))
    else:
        monkeypatch.setattr(dropout, "flash_operator", lambda: operator(calls, "q", "k"))
    return request.param, calls


def operator(calls, *names):
    """Torch's flash attention on a CPU: its own schema, or one with other names."""
    real = torch.ops.aten._flash_attention_forward.default._schema

    def run(q, k, v, ends, ends_k, longest, longest_k, p, causal, debug, *, scale=None, **window):
        assert not causal and not debug and ends is ends_k
        calls.append(p)
        sides = (window.get("window_size_left", -1), window.get("window_size_right", -1))
        out = by_text(q, k, v, ends, scale, dropped=p, window=sides)
        return out, None, None, None, None

    arguments = [SimpleNamespace(name=name) for name in names] or real.arguments
    run._schema = SimpleNamespace(arguments=arguments)
    return run


def test_dropout_acts_and_keeps_the_mean(monkeypatch, dropped):
    """Two views differ, and the mean over many draws is the attention without dropout."""
    name, calls = dropped
    still = in_groups(monkeypatch)
    draws = []
    for seed in range(300):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "manual_seed", lambda *_: None)  # `attend` seeds its states
            torch.random.default_generator.manual_seed(0)
            packed = layout()
            q, k, v = (torch.randn(1, heads, len(packed.rows), 8) for heads in (4, 2, 2))
            torch.random.default_generator.manual_seed(seed)
            options = {"scaling": 0.3, "dropout": 0.3, attending.LAYOUT: packed}
            draws.append(attending.attention(None, q, k, v, None, **options)[0][0])
    assert (draws[0] - draws[1]).abs().max() > 0.1
    mean = torch.stack(draws).mean(0)
    assert (mean - still).norm() / still.norm() < 0.1
    assert bool(calls) == (name != "nested")


def test_a_gradient_flows_through_dropout(dropped):
    packed = layout()
    q, k, v = (torch.randn(1, h, len(packed.rows), 8).requires_grad_() for h in (4, 2, 2))
    options = {"dropout": 0.3, attending.LAYOUT: packed}
    attending.attention(None, q, k, v, None, **options)[0].sin().sum().backward()
    for states in (q, k, v):
        assert states.grad.isfinite().all() and states.grad.abs().sum() > 0


def test_a_checkpointed_layer_may_be_the_first_to_need_dropout(monkeypatch, on_gpu):
    """The comparison of the kernel is no part of the layer, which is computed again without it."""
    monkeypatch.setattr(dropout, "flash_operator", lambda: operator([]))
    packed = layout()
    q, k, v = (torch.randn(1, h, len(packed.rows), 8).requires_grad_() for h in (4, 2, 2))
    options = {"dropout": 0.3, attending.LAYOUT: packed}
    layer = partial(attending.attention, None, **options)
    out, _ = checkpoint(layer, q, k, v, attention_mask=None, use_reentrant=False)
    out.sin().sum().backward()
    assert q.grad.isfinite().all() and q.grad.abs().sum() > 0


def test_an_operator_with_wrong_results_is_not_used(monkeypatch, on_gpu):
    calls = []
    wrong = operator(calls)

    def run(*args, **kwargs):
        return tuple(x if x is None else x.flip(0) for x in wrong(*args, **kwargs))

    run._schema = wrong._schema
    monkeypatch.setattr(dropout, "flash_operator", lambda: run)
    kernel = dropout.find_dropping_kernel(torch.empty(1, 4, 1, 8), dropout.Extras(dropout=0.3))
    assert kernel is dropout.attend_nested and calls


def test_without_any_kernel_dropout_goes_text_by_text(monkeypatch, on_gpu):
    def none():
        raise AttributeError("no such operator")

    monkeypatch.setattr(dropout, "flash_operator", none)
    monkeypatch.setattr(dropout, "attend_nested", lambda *_: none())
    assert (
        dropout.find_dropping_kernel(torch.empty(1, 4, 1, 8), dropout.Extras(dropout=0.3)) is None
    )
    assert (attend(dropout=0.3) - in_groups(monkeypatch)).abs().max() > 0.1


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", *WINDOWS])
@torch.no_grad()
def test_packed_equals_one_by_one_on_a_gpu(monkeypatch, family):
    calls, real = [], varlen.varlen_attn

    def counted(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
    ):
        calls.append(window_size)
        heads = {"enable_gqa": True} if "enable_gqa" in ragged.arguments_of(real) else {}
        texts = (cu_seq_q, cu_seq_k, max_q, max_k)
        return real(query, key, value, *texts, scale=scale, window_size=window_size, **heads)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    config = LlamaConfig(**SMALL) if family == "llama" else WINDOWS[family][0]
    model = build(config).to("cuda", torch.bfloat16)
    ids = torch.randint(3, 120, (len(LENGTHS), max(LENGTHS))).cuda()
    rows = list(zip(ids, LENGTHS, strict=True))
    alone = [model(input_ids=r[None, :n]).last_hidden_state[0] for r, n in rows]
    assert enable_packing(model) is None and model.packed_at_once
    calls.clear()
    packed = layout().to(torch.device("cuda"))
    states = run_packed(model, ids, packed)
    assert len(calls) == 2
    for row, single in enumerate(alone):
        apart = (states[packed.rows == row] - single).float().norm() / single.float().norm()
        assert apart < 5e-2


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
def test_dropout_acts_on_a_gpu_with_flash_attention():
    assert dropout_acts_on_a_gpu() is ragged.attend_flash


@pytest.mark.gpu
def test_dropout_acts_on_a_gpu_without_flash_attention(monkeypatch):
    monkeypatch.setattr(ragged, "is_flash_attn_2_available", lambda: False)
    assert dropout_acts_on_a_gpu() is dropout.attend_flash_operator


def dropout_acts_on_a_gpu():
    model = build(LlamaConfig(**SMALL, head_dim=16)).to("cuda", torch.bfloat16)
    assert enable_packing(model) is None
    ids = torch.randint(3, 120, (len(LENGTHS), max(LENGTHS))).cuda()
    packed = layout().to(torch.device("cuda"))
    still = run_packed(model, ids, packed)
    for layer in model.layers:
        layer.self_attn.attention_dropout = 0.3
    first, second = (run_packed(model.train(), ids, packed) for _ in range(2))
    for one, other in ((first, second), (first, still)):
        assert (one - other).abs().max() > 0.01
    first.float().sin().sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    query = torch.empty(1, 4, 1, 16, device="cuda", dtype=torch.bfloat16)
    return ragged.find_kernel(query, dropout.Extras(dropout=0.3))
