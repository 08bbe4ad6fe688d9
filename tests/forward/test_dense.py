"""Attention on a CPU: which of its two ways runs, and that both give the same."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from unmasked.forward.packing import dense
from unmasked.forward.packing.dense import LONG, Extras, attend


@pytest.mark.parametrize("tokens", [LONG - 1, LONG, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("amx", [True, False], ids=["amx", "no_amx"])
def test_matrix_products_are_for_long_bfloat16_texts_without_amx(monkeypatch, tokens, dtype, amx):
    calls = []

    def sdpa(*args, **kwargs):
        calls.append(args)
        return scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(dense, "has_amx", lambda: amx)
    monkeypatch.setattr(dense, "scaled_dot_product_attention", sdpa)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, tokens, 16, generator=generator).to(dtype) for heads in (6, 2, 2)
    )
    found = attend(query, key, value, None, Extras())
    assert bool(calls) == (dtype == torch.float32 or tokens < LONG or amx)
    exact = (x.double() for x in (query, key, value))
    expected = scaled_dot_product_attention(*exact, enable_gqa=True)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
