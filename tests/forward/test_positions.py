"""Rotary positions that depend on the longest text of a batch (LongRoPE)."""

from __future__ import annotations

import numpy as np
import pytest

from unmasked import LLM2Vec
from unmasked.forward.batches import plan_batches
from unmasked.forward.loop import running
from unmasked.forward.positions import follows_length, longest_unscaled

SHORT, LONG = "a short text", "many other words " * 120  # below and above 256 tokens


@pytest.fixture(scope="module")
def encoder(longrope_decoder):
    loaded = LLM2Vec.from_pretrained(
        longrope_decoder, max_length=400, doc_max_length=None, device="cpu"
    )
    assert loaded.backbone.longest_unscaled == 256
    short, long = loaded.backbone.tokens([SHORT, LONG])
    assert len(short.ids) < 256 < len(long.ids)
    return loaded


def test_a_vector_does_not_depend_on_a_long_neighbour(encoder):
    alone = np.concatenate([encoder.encode([SHORT]), encoder.encode([LONG])])
    for batch_size in (None, 8):
        together = encoder.encode([SHORT, LONG], batch_size=batch_size)
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-4)


def test_rows_from_a_server_do_not_either(encoder):
    rows = encoder.backbone.tokens([LONG, SHORT, LONG + " x", SHORT + " y"])
    alone = [running.encode_rows(encoder, encoder.backbone, [row], encoder.device) for row in rows]
    together = running.encode_rows(encoder, encoder.backbone, rows, encoder.device)
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=0, atol=1e-4)


def test_the_scaling_is_what_moves_a_vector(encoder, monkeypatch):
    """Else the tests above would pass without the rule."""
    monkeypatch.setattr(encoder.backbone, "longest_unscaled", None)
    alone, (together, _) = encoder.encode([SHORT])[0], encoder.encode([SHORT, LONG])
    assert np.abs(together - alone).max() > 1e-2


@pytest.mark.parametrize("options", [{"budget": 1000}, {"batch_size": 3}, {}])
def test_long_rows_share_no_batch_with_others(options):
    lengths = [5, 300, 257, 256, 7, 400, 1]
    batches = plan_batches(lengths, **options, apart=256)
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(7))
    for batch in batches:
        assert len({lengths[i] > 256 for i in batch}) == 1


def test_only_rotary_positions_that_follow_the_length_count(encoder):
    config = encoder.backbone.auto_model.config
    assert follows_length(config)
    config.rope_parameters = {"rope_type": "llama3", "original_max_position_embeddings": 64}
    try:
        assert not follows_length(config)
        assert longest_unscaled(config) is None
        config.rope_parameters = {"full_attention": {"rope_type": "dynamic"}}
        assert follows_length(config)
    finally:
        config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 256}
