"""A pretended GPU: tensors say that they are on ``cuda:0``, and have their numbers on the CPU.

What would fail on a GPU fails here: a tensor of the GPU and one of the CPU in one operation, or
``numpy()`` of a tensor of the GPU. What would make the host wait for a GPU is recorded in
the list that `pretended_gpu` yields. Kernels, speed and memory are not those of a GPU.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map

from unmasked.forward.packing import dropout

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
WAITS = {"_local_scalar_dense", "nonzero", "equal", "_unique2", "masked_select", "unique_dim"}
"""Operations whose result has to be known on the host."""
MIX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "copy_"}
"""Operations that take tensors of both devices."""


class OnGpu(Tensor):
    """A tensor of the pretended GPU; for torch's own code it is one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    recorded: list[str] = []  # noqa: RUF012 (one list for all tensors)

    @staticmethod
    def __new__(cls, held):
        given = {"dtype": held.dtype, "layout": held.layout, "device": CPU}
        made = Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), **given)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        ours, theirs = {}, []

        def unwrap(item):
            if isinstance(item, OnGpu):
                ours[id(item.held)] = item
                return item.held
            if isinstance(item, Tensor) and item.dim():
                theirs.append(tuple(item.shape))
            return CPU if item == CUDA and isinstance(item, torch.device) else item

        given, named = tree_map(unwrap, (args, dict(kwargs or {})))
        if ours and theirs and name not in MIX:
            raise RuntimeError(f"tensors on cuda:0 and on the CPU {theirs} meet in {name}")
        masks = name in ("index", "index_put_") and [i for i in args[1] if i is not None]
        if name in WAITS or any(mask.dtype == torch.bool for mask in masks or ()):
            wait(name)
        if name == "copy_" and not isinstance(args[0], OnGpu):
            return args[0].copy_(given[1])
        return tree_map(
            lambda x: ours.get(id(x), OnGpu(x)) if isinstance(x, Tensor) else x,
            func(*given, **named),
        )


def wait(what):
    """Record that the host waits, and where."""
    frames = [f for f in traceback.extract_stack() if "/support/" not in f.filename]
    place = next((f for f in reversed(frames) if "/torch/" not in f.filename), frames[-1])
    OnGpu.recorded.append(f"{what} in {place.name} of {place.filename}:{place.lineno}")


class Move(torch.autograd.Function):
    """A copy to the other device; the gradient comes back."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.held.clone() if isinstance(tensor, OnGpu) else OnGpu(tensor.detach().clone())

    @staticmethod
    def backward(ctx, gradient):
        return Move.forward(None, gradient)


def moved(tensor, device, asynchronous=False):
    """The tensor on a device; None for where it is."""
    to_gpu = torch.device(device).type == "cuda" if device is not None else None
    if to_gpu is None or to_gpu == isinstance(tensor, OnGpu):
        return tensor
    if not asynchronous:
        wait("copy")
    return Move.apply(tensor)


def as_list(tensor):
    """The numbers of a tensor of the GPU, for which the host waits."""
    wait("tolist")
    return tensor.held.tolist()


def no_array(*_, **__):
    """What torch does if a tensor of a GPU should become an array."""
    raise TypeError("can't convert a tensor on cuda:0 to numpy")


ANSWERS = {
    Tensor.device.__get__: lambda tensor: CUDA,
    Tensor.is_cuda.__get__: lambda tensor: True,
    Tensor.get_device: lambda tensor: 0,
    Tensor.cpu: lambda tensor: moved(tensor, CPU),
    Tensor.numpy: no_array,
    Tensor.__array__: no_array,
    Tensor.tolist: as_list,
    Tensor.new_tensor: lambda tensor, *given, **named: OnGpu(
        tensor.held.new_tensor(*given, **named)
    ),
}
"""What a tensor of the GPU does itself."""


class PretendedGpu(TorchFunctionMode):
    """Answers what a tensor says about its device, and moves tensors; within `pretended_gpu`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, first = dict(kwargs or {}), args[0] if args else None
        if isinstance(first, OnGpu) and func in ANSWERS:
            return ANSWERS[func](first, *args[1:], **kwargs)
        if func is Tensor.backward:  # in whose course layers may run again
            ones = torch.ones_like(first)
            with self:
                return _engine_run_backward(
                    (first,), (ones,), False, False, (), accumulate_grad=True
                )
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func in _device_constructors():
            kwargs.pop("pin_memory", None)
        device = kwargs.get("device")
        if device is None or torch.device(device).type not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        made = func(*args, **kwargs | {"device": CPU})
        if torch.device(device).type == "cpu":
            return made.held if isinstance(made, OnGpu) else made
        if isinstance(made, OnGpu):
            return made
        return OnGpu(made.detach()).requires_grad_(made.requires_grad)

    def _to(self, tensor, *given, **named):
        named.pop("copy", None)
        other = named.pop("other", given[0] if given else None)
        if isinstance(other, Tensor):
            device = CUDA if isinstance(other, OnGpu) else CPU
            return moved(tensor, device).to(other.dtype)
        device, dtype, asynchronous, _ = torch._C._nn._parse_to(*given, **named)
        tensor = moved(tensor, device, asynchronous)
        return tensor if dtype is None else Tensor.to(tensor, dtype)


USED: set[str] = set()
"""The kernels that have run."""


def attend(query, key, value, ends, scale=None, dropped=0.0):
    """(N, H, d) attention within each text, for half precision on the pretended GPU only."""
    USED.add("dropout" if dropped else "varlen")
    assert query.is_cuda and ends.is_cuda and query.dtype == torch.bfloat16
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    parts, borders = [], ends.held.tolist()
    for start, stop in pairwise(borders):
        one, other, values = (x[start:stop] for x in (query, key, value))
        scores = torch.einsum("qhd,khd->hqk", one, other) * (scale or query.shape[-1] ** -0.5)
        weights = torch.nn.functional.dropout(scores.softmax(dim=-1), dropped)
        parts.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(parts)


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    """In the place of torch's kernel of this name."""
    assert window_size == (-1, -1)
    return attend(query, key, value, cu_seq_q, scale)


def flash_operator():
    """In the place of the operator with dropout."""

    def run(q, k, v, ends, _, longest, __, dropped, causal, debug, *, scale=None):
        return attend(q, k, v, ends, scale, dropped), None, None, None, None

    run._schema = torch.ops.aten._flash_attention_forward.default._schema
    return run


class Event:
    """In the place of a CUDA event."""

    def __init__(self, **_): ...
    def record(self, *_): ...
    def synchronize(self): ...

    def elapsed_time(self, _):
        return 1.0


@contextlib.contextmanager
def pretended_gpu(patch):
    """Within the block there is a GPU; yields the list of what made the host wait."""
    gpu = SimpleNamespace(total_memory=80 * 10**9, name="pretended", major=9, minor=0)
    answers = {
        "is_available": True, "is_bf16_supported": True, "device_count": 1, "current_device": 0,
        "get_device_properties": gpu, "current_stream": None, "max_memory_allocated": 0,
        "memory_allocated": 0, "device": contextlib.nullcontext(), "synchronize": None,
        "get_rng_state": torch.get_rng_state(), "set_rng_state": None, "set_device": None,
        "empty_cache": None, "manual_seed_all": None, "manual_seed": None,
    }  # fmt: skip
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(Tensor, "pin_memory", lambda tensor, *_: tensor)
    enabled, dtype, begin = (
        torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast.__init__
    )  # fmt: skip
    patch.setattr(torch, "is_autocast_enabled", lambda *_: enabled("cpu"))
    patch.setattr(torch, "get_autocast_dtype", lambda *_: dtype("cpu"))

    def on_cpu(context, device_type, dtype=None, **named):
        begin(context, "cpu", dtype, **named)

    patch.setattr(torch.autocast, "__init__", on_cpu)
    fork = torch.random.fork_rng
    patch.setattr(torch.random, "fork_rng", lambda *_, **__: fork([]))
    patch.setattr(checkpoint.DefaultDeviceType, "_default_device_type", "cuda")
    kinds = {"default": lambda tensor: (tensor.shape, tensor.dtype)}  # not the device
    patch.setattr(checkpoint, "_allowed_determinism_checks_to_fns", kinds)
    patch.setattr(varlen, "varlen_attn", varlen_attn)
    patch.setattr(dropout, "flash_operator", flash_operator)
    dropout.checked_kernel.cache_clear()
    USED.clear()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with mock.patch.dict(os.environ), PretendedGpu():
            yield OnGpu.recorded
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the device
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        dropout.checked_kernel.cache_clear()
        OnGpu.recorded.clear()
