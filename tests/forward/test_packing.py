"""Packed attention: the states of a text are those it has alone, with gradients too."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from support import tiny
from torch.utils.checkpoint import checkpoint
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

from unmasked import LLM2Vec
from unmasked.checkpoint import adapters
from unmasked.errors import ModelError
from unmasked.forward.packing import (
    NAME,
    attending,
    check,
    checkpoint_contexts,
    dense,
    enable_packing,
    is_checked,
    pack,
    pack_blocks,
    run_packed,
)
from unmasked.mask.opening import attention_name, open_config
from unmasked.mask.proof import open_mask

SMALL = {**tiny.SMALL, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
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
        vocab_size=120,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        **NO_DROPOUT,
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
    nan = lambda query, *_: torch.full_like(query, torch.nan)  # noqa: E731
    monkeypatch.setattr(dense, "attend", nan)
    assert enable_packing(model).startswith("packed and single forwards differ by nan")
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


def planted(monkeypatch, leak):
    """Each token gets this part of its attention from the text beside its own."""
    sound = attending.attend_by_text

    def leaky(query, key, value, mask, packed, extras):
        out = sound(query, key, value, mask, packed, extras)
        return out + leak * (out.roll(packed.longest, dims=1) - out)

    monkeypatch.setattr(attending, "attend_by_text", leaky)


def deep(dtype):
    return build(Qwen3Config(**{**SMALL, "num_hidden_layers": 32}, head_dim=8)).to(dtype)


def test_a_deep_model_in_bfloat16_is_packed_although_it_rounds(monkeypatch):
    """The limit follows the model: what padding does to its states, packing may do as well."""
    model, seen = deep(torch.bfloat16), []
    # With matrix units, SDPA computes both ways and rounds equally.
    monkeypatch.setattr(dense, "has_amx", lambda: False)
    largest = check._largest
    monkeypatch.setattr(check, "_largest", lambda found: seen.append(largest(found)) or seen[-1])
    assert enable_packing(model) is None
    own, drift, leak = seen
    assert own > 5e-3 and drift > 5e-3 and leak == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_leak_of_a_hundredth_is_refused_at_any_precision(monkeypatch, dtype):
    model = deep(dtype)
    planted(monkeypatch, 0.01)
    assert enable_packing(model) is not None
    assert attention_name(model) == "sdpa"
    # The comparison with single forwards alone would not have to see it in a deeper model.
    monkeypatch.setattr(check, "SLACK", 100)
    monkeypatch.setattr(check, "FLOOR", dict.fromkeys([torch.float32, torch.bfloat16], 2e-2))
    assert "see each other" in enable_packing(model) or dtype == torch.float32
    monkeypatch.undo()
    assert enable_packing(model) is None


def test_autocast_is_another_precision_that_is_checked_when_it_comes():
    model = build(PACKED["llama"])
    assert enable_packing(model) is None and is_checked(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_checked(model)
        assert enable_packing(model) is None and is_checked(model)
    assert is_checked(model) and attention_name(model) == NAME


def test_a_batch_under_autocast_is_checked_before_it_runs(monkeypatch, tiny_decoder):
    """A leak that only the kernel of bfloat16 has, in a model that was loaded in float32."""
    encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", dtype="float32")
    assert encoder.backbone.unpackable is None
    sound = attending.attend_by_text

    def leaky(query, key, value, mask, packed, extras):
        out = sound(query, key, value, mask, packed, extras)
        return out.flip(1) if out.dtype == torch.bfloat16 else out

    monkeypatch.setattr(attending, "attend_by_text", leaky)
    texts = ["one text", "another, longer text"]
    expected = encoder.encode(texts)
    assert encoder.backbone.unpackable is None
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder.encode(texts)
    assert encoder.backbone.unpackable is not None
    np.testing.assert_allclose(found, expected, atol=0.1 * abs(expected).max())


# --- a layer that runs twice ----------------------------------------------------------------------


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert found
    return found


def assert_same(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        apart = (value - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)
        assert apart <= tolerance, (name, float(apart))


def trained(name="mistral_window"):
    """A packed model with an adapter that acts, in train mode."""
    model = build(PACKED.get(name) or tiny.config(name))
    assert enable_packing(model) is None
    model.enable_input_require_grads()
    peft_model = adapters.attach(model, rank=4, dropout=0.0).train()
    torch.manual_seed(1)
    for path, weight in peft_model.named_parameters():
        if "lora_B" in path:
            torch.nn.init.normal_(weight, std=0.1)
    return model, peft_model


def test_gradients_are_those_of_the_texts_one_by_one():
    _, model = trained()
    ids, mask = batch()
    together = gradients(model, run_packed(model, ids, pack(mask)).sin().sum())
    alone = gradients(model, sum(s.sin().sum() for s in singles(model, ids, mask)))
    assert_same(together, alone, 1e-4)


def other_batch(model):
    """Another batch of as many tokens, which a state kept for the process would mix up."""
    ids, _ = batch()
    lengths = torch.tensor([len(ids[0]), 9, 9, 8, 1, 1])
    assert int(lengths.sum()) == sum(LENGTHS)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return run_packed(model, ids, pack(mask)).sin().mean()


WAYS = {
    "reentrant": {"use_reentrant": True},
    "not_reentrant": {"use_reentrant": False},
    "with_contexts": {"use_reentrant": False, "context_fn": checkpoint_contexts},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["mistral_window", "llama", "gpt2_positions", "stablelm"])
def test_gradients_are_the_same_with_checkpointing(name, way):
    """Also where another batch of as many tokens runs before the backward pass."""
    base, model = trained(name)
    ids, mask = batch()

    def loss():
        first = run_packed(model, ids, pack(mask)).sin().sum()
        return first + other_batch(model)

    kept = gradients(model, loss())
    base.gradient_checkpointing_enable(WAYS[way])
    assert_same(gradients(model, loss()), kept)


def by_hand(model, reentrant):
    """Each layer of a model behind `torch.utils.checkpoint`, called with all that it was given."""
    for layer in model.layers:
        forward = layer.forward

        def again(states, *args, forward=forward, **kwargs):
            run = partial(forward, **kwargs)
            return checkpoint(run, states, *args, use_reentrant=reentrant)

        layer.forward = again


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("name", ["mistral_window", "llama"])
def test_gradients_are_the_same_with_checkpoints_by_hand(name, reentrant):
    base, model = trained(name)
    ids, mask = batch()
    kept = gradients(model, run_packed(model, ids, pack(mask)).sin().sum())
    by_hand(base, reentrant)
    assert_same(gradients(model, run_packed(model, ids, pack(mask)).sin().sum()), kept)


def test_the_backward_pass_may_run_in_another_thread():
    base, model = trained()
    ids, mask = batch()
    kept = gradients(model, run_packed(model, ids, pack(mask)).sin().sum())
    base.gradient_checkpointing_enable({"use_reentrant": True})
    loss = run_packed(model, ids, pack(mask)).sin().sum()
    with ThreadPoolExecutor(1) as pool:
        assert_same(pool.submit(gradients, model, loss).result(), kept)


def test_functional_calls_are_packed_as_well():
    base = build(PACKED["llama"])
    assert enable_packing(base) is None
    ids, mask = batch()
    weights = {name: p.detach() for name, p in base.named_parameters()}

    def loss(weights):
        class Called:
            def __new__(cls, **kwargs):
                return torch.func.functional_call(base, weights, kwargs=kwargs)

        return run_packed(Called, ids, pack(mask)).sin().sum()

    found = torch.func.grad(loss)(weights)
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    loss(leaves).backward()
    assert_same(found, {name: leaf.grad for name, leaf in leaves.items()})


@pytest.mark.parametrize("name", ["mistral_window", "llama", "gpt2_positions", "stablelm"])
def test_a_layer_that_runs_again_in_a_hook_has_its_states(name):
    model = build(PACKED.get(name) or tiny.config(name))
    assert enable_packing(model) is None
    ids, mask = batch()
    layers = model.h if name == "gpt2_positions" else model.layers
    seen = []

    def again(layer, args, kwargs, output):
        first = output[0] if isinstance(output, tuple) else output
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(layer.forward, *args, **kwargs).result()
        seen.append(torch.equal(first, second[0] if isinstance(second, tuple) else second))

    for layer in layers:
        layer.register_forward_hook(again, with_kwargs=True)
    run_packed(model, ids, pack(mask))
    assert seen == [True] * len(layers)


@pytest.mark.parametrize("name", ["mistral_window", "llama", "gpt2_positions"])
def test_a_layer_without_its_keywords_is_refused_where_texts_would_mix(name):
    model = build(PACKED[name])
    assert enable_packing(model) is None
    ids, mask = batch()
    layer = (model.h if name == "gpt2_positions" else model.layers)[0]
    needed = "position_embeddings"

    def again(layer, args, kwargs, _):
        layer.forward(*args[:1], **{needed: kwargs[needed]} if needed in kwargs else {})

    def masked(layer, args, kwargs, _):
        given = {k: v.detach() if k == "attention_mask" else v for k, v in kwargs.items()}
        given.pop("packed_layout")
        mask = [
            v.detach() for v in args[1:] if isinstance(v, torch.Tensor) and v.dtype == torch.bool
        ]
        layer.forward(args[0], *([None, *mask] if mask else args[1:]), **given)

    for hook in (again, masked):
        handle = layer.register_forward_hook(hook, with_kwargs=True)
        with pytest.raises(ModelError, match="without the layout of its batch.*Fix: "):
            run_packed(model, ids, pack(mask))
        handle.remove()


def test_a_layer_run_by_hand_after_its_forward_or_in_another_thread_is_refused():
    """Its states may be those of many texts, and nothing says so but what came with the call."""
    model = build(PACKED["llama"])
    assert enable_packing(model) is None
    ids, mask = batch()
    kept = []
    handle = model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: kept.append((args, kwargs)), with_kwargs=True
    )
    expected = run_packed(model, ids, pack(mask))
    handle.remove()
    ((states,), kwargs), layer = kept[0], model.layers[0]
    bare = {"position_embeddings": kwargs["position_embeddings"]}
    with ThreadPoolExecutor(1) as other:
        for call in (layer, lambda *args, **given: other.submit(layer, *args, **given).result()):
            with pytest.raises(ModelError, match="no mask, no keywords.*Fix: "):
                call(states, **bare)
            again = call(states, **kwargs)
            assert torch.equal(again, layer(states, **kwargs))
    alone = model(input_ids=ids[:1, mask[0].bool()], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(alone, expected[pack(mask).rows == 0], atol=1e-4, rtol=1e-4)


def test_an_encoder_with_checkpoints_has_its_gradient(tiny_decoder):
    """By every way that sentence-transformers and transformers offer."""
    texts = ["a cat", "한국어 문장", "a third one here", "a much longer text than the others are"]

    def found(switch):
        encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", dtype="float32").train()
        switch(encoder)
        encoder.backbone.auto_model.enable_input_require_grads()
        vectors = encoder(encoder.preprocess(texts))["sentence_embedding"]
        return gradients(encoder, vectors.sin().sum())

    kept = found(lambda encoder: None)
    for way in ({"use_reentrant": True}, {"use_reentrant": False}):
        assert_same(found(lambda e, way=way: e.gradient_checkpointing_enable(way)), kept)
    assert_same(found(lambda e: e.gradient_checkpointing_enable()), kept)


def test_a_trainer_with_checkpoints_ends_with_the_same_weights(tiny_decoder, tmp_path):
    rows = Dataset.from_dict({"anchor": ["a cat", "a dog"] * 4, "positive": ["cats", "dogs"] * 4})

    def weights(checkpointing):
        encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cpu", dtype="float32")
        arguments = SentenceTransformerTrainingArguments(
            str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            gradient_checkpointing=checkpointing,
        )
        loss = MultipleNegativesRankingLoss(encoder)
        SentenceTransformerTrainer(encoder, arguments, rows, loss=loss).train()
        return {name: p.detach().clone() for name, p in encoder.named_parameters()}

    assert_same(weights(True), weights(False))


def test_blocks_are_laid_out_as_rows_without_padding():
    found, wanted = pack_blocks(3, 4, torch.device("cpu")), pack(torch.ones(3, 4, dtype=torch.long))
    assert (found.groups, found.longest) == (wanted.groups, 4)
    for name in ("rows", "columns", "positions", "ends"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))
