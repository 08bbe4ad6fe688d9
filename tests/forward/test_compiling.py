"""Compiled layers: the states of plain ones, one graph for all batches, or undone."""

from __future__ import annotations

import logging

import pytest
import torch
from support import tiny

from unmasked import LLM2Vec
from unmasked.errors import ModelError
from unmasked.forward import backbone, compiling
from unmasked.forward.compiling import compile_layers, is_compiled, pays
from unmasked.forward.packing import enable_packing, pack, run_packed
from unmasked.mask.opening import open_config
from unmasked.mask.proof import open_mask

QUICK = ("llama",)
SLOW = ("gemma3", "qwen3", "mistral", "gpt2", "gemma", "gemma2", "stablelm", "nemotron", "gemma4")


def build(family):
    model = tiny.model(open_config(tiny.config(family)))
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


class Counting:
    """A backend of `torch.compile` that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize(
    "family", [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)]
)
@torch.no_grad()
def test_states_are_the_same_and_later_batches_compile_nothing(family):
    model, backend = build(family), Counting()
    batches = [batch(lengths) for lengths in ([9, 5, 3], [30, 2], [7, 7, 7, 1], [12, 40, 3])]
    expected = [run_packed(model, *one) for one in batches]
    assert compile_layers(model, backend) is None and is_compiled(model)
    assert backend.graphs
    run_packed(model, *batches[0])
    before = backend.graphs
    for one, states in zip(batches, expected, strict=True):
        torch.testing.assert_close(run_packed(model, *one), states, atol=1e-5, rtol=1e-5)
    assert backend.graphs == before


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_gradients_are_the_same(checkpointing):
    def gradients(compiled):
        model = build("llama")
        if compiled:
            assert compile_layers(model, "aot_eager") is None
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        run_packed(model, *batch([9, 5, 3])).sin().sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected = gradients(compiled=False)
    for name, found in gradients(compiled=True).items():
        torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=1e-4)


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
    monkeypatch.setattr(backbone, "compile_layers", seen.append)
    encoder = LLM2Vec.from_pretrained(tiny_decoder, device="cpu")
    encoder.encode(["one text"])  # auto, and no GPU
    encoder.encode(["one text"], compile="never")
    assert seen == []
    encoder.encode([["an instruction", "one text"]], compile="always")
    LLM2Vec.from_pretrained(tiny_decoder, device="cpu", compile="always").encode("one text")
    assert len(seen) == 2
    with pytest.raises(ModelError, match="unknown compile 'ever'"):
        encoder.encode(["one text"], compile="ever")
