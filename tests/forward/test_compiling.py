"""Compiled layers: the states of plain ones, one graph for all batches, or undone."""

from __future__ import annotations

import logging

import pytest
import torch
from support import tiny
from support.graphs import Counting

from unmasked import LLM2Vec
from unmasked.checkpoint import adapters
from unmasked.errors import ModelError
from unmasked.forward import backbone, compiling
from unmasked.forward.compiling import compile_layers, is_compiled, pays, put_back
from unmasked.forward.packing import enable_packing, pack, run_packed
from unmasked.mask.opening import open_config
from unmasked.mask.proof import open_mask
from unmasked.train.losses.simcse import noise

QUICK = ("llama", "gpt2")
SLOW = ("gemma3", "qwen3", "mistral", "gemma", "gemma2", "stablelm", "nemotron", "gemma4")


def build(family, **fields):
    model = tiny.model(open_config(tiny.config(family, **fields)))
    open_mask(model)
    assert enable_packing(model) is None
    return model


def batch(lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(3, 100, (len(lengths), max(lengths)), generator=generator)
    return ids, pack((torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long())


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "family", [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)]
)
@torch.inference_mode()
def test_states_are_the_same_and_later_batches_compile_nothing(family):
    """Not even the first, except that of texts that are shorter than any window."""
    model, backend = build(family), Counting()
    batches = [
        batch(lengths) for lengths in ([9, 5, 3], [3, 2], [30, 2], [3, 3, 1], [12, 40, 3, 8])
    ]
    expected = [run_packed(model, *one) for one in batches]
    assert compile_layers(model, backend) is None and is_compiled(model)
    before = backend.graphs
    run_packed(model, *batches[0])
    assert before and (backend.graphs == before or family not in QUICK)
    run_packed(model, *batches[1])
    before = backend.graphs
    for one, states in zip(batches, expected, strict=True):
        torch.testing.assert_close(run_packed(model, *one), states, atol=1e-5, rtol=1e-5)
    assert backend.graphs == before


HOW = {"kept": None, "checkpointed": {"use_reentrant": False}}


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_a_step_is_the_same(how):
    """With an adapter, under autocast, with dropout in attention and adapter, in train mode."""
    trunk = build("llama", initializer_range=0.05)
    model = adapters.attach(trunk, dropout=0.1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    if HOW[how] is not None:
        trunk.activation_checkpointing_enable(HOW[how])
        trunk.enable_input_require_grads()

    def gradient(lengths):
        torch.manual_seed(0)
        model.zero_grad()
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            run_packed(trunk, *batch(lengths)).float().sin().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    backend, lengths = Counting(), ([9, 5, 3], [4, 4])
    with noise(model, 0.3, 0.0):
        expected = [gradient(one) for one in lengths]
        with torch.autocast("cpu", torch.bfloat16):
            assert enable_packing(trunk) is None
            assert compile_layers(trunk, backend, training=True) is None
        checked = backend.calls
        for one, wanted in zip(lengths, expected, strict=True):
            torch.testing.assert_close(gradient(one), wanted, atol=1e-5, rtol=1e-4)
        assert backend.calls > checked  # what is checkpointed is compiled as well
        graphs = backend.graphs
        gradient([11, 2, 2])
        assert backend.graphs == graphs
        put_back(trunk)
        calls = backend.calls
        torch.testing.assert_close(gradient([9, 5, 3]), expected[0], atol=1e-5, rtol=1e-4)
        assert backend.calls == calls and not is_compiled(trunk)


@pytest.mark.slow
def test_the_real_compiler_gives_the_same_states_and_gradients():
    config = tiny.config("llama", num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    model = tiny.model(open_config(config))
    open_mask(model)
    assert enable_packing(model) is None
    expected = run_packed(model, *batch([9, 5]))
    assert compile_layers(model, training=True) is None
    torch.testing.assert_close(run_packed(model, *batch([9, 5])), expected, atol=1e-5, rtol=1e-5)


def test_gradients_that_differ_are_not_compiled(caplog):
    """Where nothing is trained, the same layers are accepted."""

    def steeper(graph, _):
        return lambda *given: tuple(
            1.1 * x - 0.1 * x.detach() if isinstance(x, torch.Tensor) else x
            for x in graph.forward(*given)
        )

    model = build("llama")
    with caplog.at_level(logging.WARNING):
        assert "gradients differ by" in compile_layers(model, steeper, training=True)
    assert len(caplog.records) == 1
    torch.compiler.reset()
    assert compile_layers(model, steeper) is None


def test_layers_that_differ_are_not_compiled(caplog):
    model = build("llama")
    expected = run_packed(model, *batch([9, 5]))

    def wrong(graph, _):
        return lambda *inputs: tuple(
            x * 1.1 if isinstance(x, torch.Tensor) else x for x in graph.forward(*inputs)
        )

    with caplog.at_level(logging.WARNING):
        assert "differ by" in compile_layers(model, wrong)
    assert len(caplog.records) == 1
    assert torch.equal(run_packed(model, *batch([9, 5])), expected)


def test_a_compiler_that_fails_leaves_the_layers_as_they_are():
    model = build("llama")
    expected = run_packed(model, *batch([9, 5]))

    def failing(*_):
        raise RuntimeError("no C++ compiler")

    assert "no C++ compiler" in compile_layers(model, failing)
    assert torch.equal(run_packed(model, *batch([9, 5])), expected)


def test_auto_is_for_a_gpu_and_long_work():
    gpu, cpu, long = torch.device("cuda"), torch.device("cpu"), compiling.LONG_WORK
    assert pays("auto", gpu, long) and not pays("auto", gpu, long - 1)
    assert not pays("auto", cpu, long)
    assert pays("always", cpu, 0) and not pays("never", gpu, long)
    with pytest.raises(ModelError, match=r"unknown compile 'alway', did you mean 'always'\?"):
        compiling.check_choice("alway")


def test_encode_compiles_when_it_is_asked_to(monkeypatch, tiny_decoder):
    seen = []
    monkeypatch.setattr(backbone, "compile_layers", lambda model, **_: seen.append(model))
    encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    encoder.encode(["one text"])  # auto, and no GPU
    encoder.encode(["one text"], compile="never")
    assert seen == []
    encoder.encode([["an instruction", "one text"]], compile="always")
    LLM2Vec.from_pretrained(tiny_decoder, device="cpu", compile="always").encode("one text")
    assert len(seen) == 2
    with pytest.raises(ModelError, match="unknown compile 'ever'"):
        encoder.encode(["one text"], compile="ever")
