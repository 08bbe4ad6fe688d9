"""The loop of encode: what a GPU would be given, windows read ahead, and the time it waited."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unmasked import LLM2Vec
from unmasked.errors import DataError
from unmasked.forward import batches
from unmasked.forward.batches import filling, plan_batches, tier, token_budget, windows
from unmasked.forward.host.waiting import DeviceTime
from unmasked.forward.loop import running
from unmasked.forward.loop.preparing import (
    AT_ONCE,
    Request,
    TextWindow,
    prepare_batches,
    tokenised,
)
from unmasked.forward.pooling import STOCK_MODES

TEXTS = [f"text number {i}" + " and more words" * (i % 6) for i in range(60)]


@pytest.fixture(scope="module")
def model(tiny_decoder):
    return LLM2Vec.from_pretrained(tiny_decoder, dtype="float32", device="cpu")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The host's side of the loop does what it does for a GPU; forwards run on the CPU."""
    monkeypatch.setattr(Request, "on_gpu", True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(running, "BEHIND", {"cpu": 3})
    monkeypatch.setattr(batches, "FIRST_WINDOW", 4)
    monkeypatch.setattr(batches, "TOKEN_BUDGET", {"cpu": 200})


def test_windows_hold_every_input_once_and_grow_for_a_gpu_only():
    for growing in (False, True):
        slices = list(windows(100_000, growing))
        taken = np.concatenate([np.arange(100_000)[piece] for piece in slices])
        assert taken.tolist() == list(range(100_000))
    assert [piece.stop - piece.start for piece in slices][:6] == [
        1024,
        2048,
        4096,
        8192,
        *[16384] * 2,
    ]
    assert next(windows(100_000)) == slice(0, 16384)
    assert list(windows(0)) == []


def test_tiers_are_few_and_little_larger():
    tiers = {tokens: tier(tokens) for tokens in range(1, 40_000)}
    assert all(size >= tokens for tokens, size in tiers.items())
    assert all(size <= 1.125 * tokens for tokens, size in tiers.items() if tokens > 512)
    assert len(set(tiers.values())) < 70
    assert tier(32768) == 32768
    for lengths in ([5], [300, 2, 1], [7] * 40):
        more = filling(lengths)
        assert sum(lengths) + sum(more) == tier(sum(lengths))
        assert not more or 0 < max(more) <= max(lengths)


@pytest.mark.parametrize(("memory", "tokens"), [(80e9, 32768), (40e9, 32768), (24e9, 16384)])
def test_a_gpu_of_forty_gigabytes_gets_larger_forwards(monkeypatch, memory, tokens):
    given = SimpleNamespace(total_memory=int(memory))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: given)
    assert token_budget(torch.device("cuda"), torch.bfloat16) == tokens


def test_a_forward_on_a_cpu_has_as_many_bytes_in_each_dtype():
    cpu = torch.device("cpu")
    budgets = {dtype: token_budget(cpu, dtype) for dtype in (torch.float32, torch.bfloat16)}
    assert budgets == {torch.float32: 1024, torch.bfloat16: 2048}
    assert token_budget(cpu, torch.float16) == 2048


def test_encode_fills_a_forward_by_the_dtype_of_the_weights(tiny_decoder):
    texts = ["a text of some words"] * 3000
    texts = [f"{text} {number}" for number, text in enumerate(texts)]
    rows = {}
    for dtype in ("float32", "bfloat16"):
        encoder = LLM2Vec.from_pretrained(tiny_decoder, dtype=dtype, device="cpu")
        request = Request(torch.device("cpu"), by_tokens=True)
        pieces = tokenised(encoder.backbone, [TextWindow(texts)], request)
        prepared = prepare_batches(encoder.backbone, pieces, request)
        rows[dtype] = max(sum(batch.lengths) for batch in prepared)
    assert 900 < rows["float32"] <= 1024
    assert 1900 < rows["bfloat16"] <= 2048


def test_without_padding_a_forward_is_filled_with_tokens():
    lengths = np.random.default_rng(0).integers(1, 300, 500).tolist()
    planned = plan_batches(lengths, 2000, padded=False)
    assert sorted(np.concatenate(planned).tolist()) == list(range(500))
    sums = [sum(lengths[i] for i in batch) for batch in planned]
    assert all(1700 < size <= 2000 for size in sums[:-1])
    assert [len(batch) for batch in plan_batches([900, 900, 1], 500, padded=False)] == [1, 1, 1]


def test_what_a_gpu_is_given_has_the_sizes_of_tiers_and_the_same_vectors(model, as_on_a_gpu):
    sizes = []
    trunk = model.backbone.auto_model
    hook = trunk.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        vectors = model.encode(TEXTS)
        tensor = model.encode(TEXTS, convert_to_tensor=True)
    finally:
        hook.remove()
    assert len(sizes) > 10
    assert all(size == tier(size) for size in sizes)
    alone = np.stack([model.encode([text], batch_size=1)[0] for text in TEXTS])
    np.testing.assert_allclose(vectors, alone, atol=1e-5)
    np.testing.assert_allclose(tensor.numpy(), alone, atol=1e-5)


def test_vectors_are_looked_at_some_batches_later_on_a_gpu(model, as_on_a_gpu, monkeypatch):
    open_forwards, most = 0, 0

    class Watched(DeviceTime):
        def working(self, device):
            nonlocal open_forwards, most
            open_forwards += 1
            most = max(most, open_forwards)
            return _Landing()

    class _Landing:
        def __enter__(self):
            return self.done

        def __exit__(self, *_):
            pass

        def done(self):
            nonlocal open_forwards
            open_forwards -= 1

    monkeypatch.setattr(model.backbone, "device_time", Watched())
    model.encode(TEXTS)
    assert open_forwards == 0
    assert most == 4  # three behind, and the one that was just given


class Waits(TorchDispatchMode):
    """Notes operations whose result has to be known on the host: a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = (
            name.startswith("index")
            and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1] or ())
            if name in ("index", "index_put", "index_put_")
            else False
        )
        if masks or name in (
            "nonzero",
            "_local_scalar_dense",
            "item",
            "masked_select",
            "unique_dim",
        ):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", STOCK_MODES)
def test_no_forward_waits_for_a_result_of_the_device(tiny_decoder, mode):
    options = {"pooling_mode": mode, "dtype": "float32", "device": "cpu"}
    model = LLM2Vec.from_pretrained(tiny_decoder, **options).eval()
    request = Request(torch.device("cpu"), by_tokens=True)
    pieces = tokenised(model.backbone, [TextWindow(TEXTS)], request)
    with torch.inference_mode(), Waits() as waits:
        torch.ones(3).nonzero()
        assert waits.found == ["nonzero"]
        for batch in prepare_batches(model.backbone, list(pieces), request):
            waits.found.clear()
            model(batch.features)
            assert waits.found == []


def test_windows_are_the_vectors_of_encode_to_the_bit(model):
    lists = [TEXTS[:20], [], TEXTS[20:21] * 3, TEXTS[21:]]
    options = {"normalize_embeddings": True, "truncate_dim": 8}
    found = list(running.encode_windows(model, model.backbone, iter(lists), **options))
    for texts, vectors in zip(lists, found, strict=True):
        assert vectors.dtype == np.float32
        assert vectors.tobytes() == model.encode(texts, **options).tobytes()
        assert vectors.shape == (len(texts), 8)


def test_windows_are_read_in_a_thread_and_an_error_there_is_raised_after_what_came_before(model):
    readers = set()

    def lists():
        readers.add(threading.current_thread())
        yield TEXTS[:5]
        yield TEXTS[5:9]
        raise ValueError("the file ends in the middle")

    before = threading.active_count()
    found = running.encode_windows(model, model.backbone, lists())
    assert len(next(found)) == 5
    with pytest.raises(ValueError, match="ends in the middle"):
        list(found)
    assert readers
    assert threading.main_thread() not in readers
    assert threading.active_count() <= before


def test_a_reader_that_stops_early_ends_the_threads_and_gives_the_model_back(model):
    before = threading.active_count()
    model.train()
    found = running.encode_windows(model, model.backbone, ([text] for text in TEXTS))
    next(found)
    assert not model.training
    found.close()
    assert model.training
    assert threading.active_count() <= before
    model.eval()


def test_control_c_while_a_thread_starts_stays_a_control_c(model, monkeypatch):
    """The thread that was started and never waited for still reads the slow lists."""
    model.eval()  # another test may have left it in training mode

    def lists():
        time.sleep(0.3)
        yield TEXTS[:5]

    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        if threading.current_thread() is threading.main_thread():
            monkeypatch.undo()
            time.sleep(0.1)  # it is among the lists by now
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(running.encode_windows(model, model.backbone, lists()))
    assert not model.training


def test_control_c_does_not_wait_until_a_window_is_tokenised(model, monkeypatch):
    """A window has 16,384 inputs on a CPU; what is interrupted is the wait for its first batch."""
    model.eval()  # another test may have left it in training mode
    texts = [f"text {number}" for number in range(10 * AT_ONCE)]
    sizes, waits, begun, result = [], [], threading.Event(), Future.result
    tokenize = type(model.backbone).tokenize_inputs

    def slow(backbone, inputs, *options):
        sizes.append(len(inputs))
        begun.set()
        time.sleep(0.2)
        return tokenize(backbone, inputs, *options)

    def interrupted(future, *options):
        if threading.current_thread() is threading.main_thread():
            waits.append(future)
            if len(waits) == 2:  # the first is that for the thread itself
                assert begun.wait(60)
                raise KeyboardInterrupt
        return result(future, *options)

    monkeypatch.setattr(type(model.backbone), "tokenize_inputs", slow)
    monkeypatch.setattr(Future, "result", interrupted)
    before = {*threading.enumerate()}  # those of earlier tests may end meanwhile
    with pytest.raises(KeyboardInterrupt):
        model.encode(texts)
    assert set(sizes) == {AT_ONCE} and len(sizes) < 4
    assert not {*threading.enumerate()} - before and not model.training


def test_slices_of_a_window_give_the_rows_and_errors_of_the_whole(model):
    texts = [f"text {number} {'and so on ' * (number % 7)}" for number in range(AT_ONCE + 50)]
    request = Request(torch.device("cpu"), by_tokens=True)
    (piece,) = tokenised(model.backbone, [TextWindow(texts)], request)
    assert piece.rows == model.backbone.tokenize_inputs(texts)
    faulty = [*texts[: AT_ONCE + 3], ["a", "pair"]]
    with pytest.raises(DataError, match=f"input {AT_ONCE + 3} is list"):
        list(running.encode_windows(model, model.backbone, [faulty]))


def test_the_share_of_the_time_that_the_device_waited(model, monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 10.0])
    monkeypatch.setattr("unmasked.forward.host.waiting.time.perf_counter", lambda: next(clock))
    spent = DeviceTime()
    assert spent.waited == 0
    with spent.passing(), spent.working(torch.device("cpu")) as done:
        pass
    done()
    assert (spent.passed, spent.worked, spent.waited) == (10.0, 2.0, 0.8)
    monkeypatch.undo()
    before = model.backbone.device_time.passed
    model.encode(TEXTS[:3])
    time = model.backbone.device_time
    assert time.passed > before
    assert 0 < time.worked <= time.passed


def test_on_a_gpu_the_time_is_read_from_events_after_the_work_is_done(monkeypatch):
    told = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            told.append("record")

        def synchronize(self):
            told.append("wait")

        def elapsed_time(self, end):
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    spent = DeviceTime(passed=1.0)
    with spent.working(torch.device("cuda")) as done:
        assert told == ["record"]
    assert told == ["record", "record"]  # nothing waits until the result is asked for
    done()
    assert told[-1] == "wait"
    assert spent.waited == 0.75


@pytest.mark.parametrize("width", [0, -1])
def test_a_vector_of_no_numbers_is_refused(model, width):
    said = f"truncate_dim {width}: .*Fix: a whole number of 1 or more"
    with pytest.raises(DataError, match=said):
        model.encode(["a"], truncate_dim=width)


def test_a_tokenizer_that_lost_its_padding_gives_the_same_vectors(tiny_decoder):
    model = LLM2Vec.from_pretrained(tiny_decoder, dtype="float32", device="cpu")
    texts = ["one", "another one that is longer"]
    before = model.encode(texts)
    model.tokenizer.pad_token = None
    np.testing.assert_allclose(model.encode(texts), before, atol=1e-6)
