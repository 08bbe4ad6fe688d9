"""Take the causal mask off a decoder, and prove with forward passes that it is off.

transformers (5.2 and later) drops the causal mask of almost every family when
``config.is_causal`` is ``False``. Where it does not, nothing fails: some families obey only when
the batch is padded, some keep single layers causal, some have no attention. So no list of
architectures decides here. `open_config` sets the flag, `clear_module_flags` repairs the layers
that read their own, and `prove` looks at what the loaded model really does.

The proof perturbs tokens, and the states that enter a layer, and looks for the change to the
left of them. It costs eight forwards of at most 12 rows by 13 tokens: 0.02 s for a tiny model,
for a large one about as much as encoding two batches of short sentences.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from unmasked.errors import NotBidirectionalError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NATIVE_KEY = "use_bidirectional_attention"

# 11 and 13: no head count is likely to equal them, so a (rows, tokens) shape is unmistakable.
TOKENS, PADS, LONGER = 11, 2, 16

# Some families fail inside their own forward once the mask is gone; that is a verdict too.
FORWARD_ERRORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Report:
    """What the forwards showed.

    Attributes:
        verdict: ``full``: every layer looks both ways. ``partial``: every token sees the next
            one, but some layers, or mixers in them, stay left-to-right. ``impossible``: some
            tokens do not see the next one, or vectors depend on padding, or the forward fails.
        reason: the same in words, with what was measured.
        causal_layers: the layers that stay left-to-right: a number, or ``"0 (conv)"`` where the
            config declares layer types or only a part of the layer is left-to-right.
        layers: decoder layers probed one by one; 0 if no list of layers was found.
        padding_drift: relative difference between the states of a text alone and those of the
            same text padded beside a longer one; NaN if the forward fails.
        attention: the attention implementation that ran.
        model_type: the family, as its config names it.
    """

    verdict: Literal["full", "partial", "impossible"]
    reason: str
    causal_layers: tuple[int | str, ...]
    layers: int
    padding_drift: float
    attention: str
    model_type: str

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for strict JSON: a list for the tuple, None for NaN."""
        drift = self.padding_drift if math.isfinite(self.padding_drift) else None
        fields = {"causal_layers": list(self.causal_layers), "padding_drift": drift}
        return {**dataclasses.asdict(self), **fields}

    def summary(self) -> str:
        """One line for the terminal."""
        return f"bidirectional: {self.verdict} ({self.model_type}, {self.attention}): {self.reason}"


def open_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of ``config`` that loads a bidirectional model; survives ``save_pretrained``.

    Families with a working key of their own (Gemma 3 and 4) get that key, because it also halves
    their sliding windows, alike on every backend; all others get ``is_causal=False``. A config
    that is bidirectional already keeps its way, so a saved folder loads here as it does elsewhere.
    """
    opened = copy.deepcopy(config)
    _set_flag(opened, rebuild=True)
    return opened


def open_mask(model: nn.Module) -> Report:
    """Make a loaded model bidirectional and prove it.

    A loaded Gemma 3 or 4 has its windows built in, so here it gets ``is_causal=False``, with
    twice the reach of the family's own key. `open_config` before loading is the better way.
    """
    _set_flag(_decoder(model).config, rebuild=False)
    clear_module_flags(model)
    return prove(model)


def clear_module_flags(model: nn.Module) -> list[str]:
    """Set ``is_causal=False`` on every submodule that has it ``True``; returns their names.

    Repairs families whose layers lose the config's flag on the way to the attention (StableLM,
    Nemotron), in this process only: see `stock_needs_eager`.
    """
    names = [n for n, module in model.named_modules() if getattr(module, "is_causal", None) is True]
    _set_module_flags(model, names, causal=False)
    return names


def prove(model: nn.Module, *, tolerance: float | None = None) -> Report:
    """Run the self-check on a loaded model and change nothing about it.

    Args:
        model: a bare ``*Model``, a ``*ForCausalLM`` or a PEFT model around either.
        tolerance: the largest ``padding_drift`` accepted. By default 1e-4, and 0.1 in half
            precision: kernels with and without a mask round differently, which a sound network
            of 32 layers turns into 0.04 in bfloat16, and unsound ones start at 0.3 (measured).
    """
    decoder = _decoder(model)
    layers, ids = _layers(decoder), _ids(decoder)
    attention = str(getattr(decoder.config, "_attn_implementation", None))
    family = str(decoder.config.model_type)
    try:
        with _still(decoder):
            sees = {pads: _next_token_seen(decoder, ids, pads) for pads in (0, PADS)}
            probed, causal = _left_to_right(decoder, layers, ids)
            drift, usual = _padding_drift(decoder, ids)
    except FORWARD_ERRORS as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        reason = f"the forward fails: {type(error).__name__}: {error}"
        return Report("impossible", reason, (), 0, math.nan, attention, family)
    limit = usual if tolerance is None else tolerance
    verdict: Literal["full", "partial", "impossible"] = "impossible"
    if not math.isfinite(drift):
        reason = "the states are not finite"
    elif not all(sees.values()):
        where = "" if not any(sees.values()) else f" {'with' if sees[0] else 'without'} padding"
        reason = f"a token{where} does not see the next one"
    elif drift > limit:
        reason = f"the states depend on padding (relative difference {drift:.1e} > {limit:.0e})"
    else:
        verdict = "partial" if causal else "full"
        reason = f"every token sees the next one, padding drift {drift:.0e}"
    if causal:
        shown = ", ".join(map(str, causal[:8])) + (", ..." if len(causal) > 8 else "")
        reason += f"; {len(causal)} of {len(layers)} layers stay left-to-right: {shown}"
    elif probed < len(layers) or not probed:
        reason += f"; {probed} of {len(layers) or 'the'} layers could be probed one by one"
    return Report(verdict, reason, causal, probed, drift, attention, family)


def require(report: Report, *, allow_partial: bool = False) -> None:
    """Refuse a model that did not pass.

    Raises:
        NotBidirectionalError: unless the verdict is ``full``, or ``partial`` and allowed.
    """
    if report.verdict == "full" or (report.verdict == "partial" and allow_partial):
        return
    fixes = ["choose a decoder that has attention in every layer"]
    if report.attention != "eager":
        fixes.insert(0, "load it with attn_implementation='eager'")
    if report.verdict == "partial":
        fixes.insert(0, "pass allow_partial=True to accept it as it is")
    raise NotBidirectionalError(
        f"'{report.model_type}' with {report.attention} attention is not bidirectional: verdict "
        f"'{report.verdict}', allowed: {'full, partial' if allow_partial else 'full'}. "
        f"Reason: {report.reason}. Fix: {', or '.join(fixes)}.",
        report,
    )


def stock_needs_eager(model: nn.Module) -> bool:
    """Whether a stock loader of the saved model would get another mask than this process has.

    True for families that live from `clear_module_flags`, which no folder carries; their
    ``config.json`` must name ``"attn_implementation": "eager"``. Decided by proof: the model runs
    for a moment with the flags and the attention of a fresh instance of its class (built without
    memory for weights). False for a model that is not bidirectional here either.
    """
    decoder = _decoder(model)
    opened, here = prove(decoder), decoder.config._attn_implementation
    config = copy.deepcopy(decoder.config)
    config._attn_implementation = None
    with torch.device("meta"):
        stock = type(decoder)(config)
    flagged = [n for n, module in stock.named_modules() if getattr(module, "is_causal", None)]
    flagged = [n for n in flagged if getattr(decoder.get_submodule(n), "is_causal", None) is False]
    try:
        _set_module_flags(decoder, flagged, causal=True)
        decoder.set_attn_implementation(stock.config._attn_implementation)
        closed = prove(decoder)
    finally:
        decoder.set_attn_implementation(here)
        _set_module_flags(decoder, flagged, causal=False)
    same = (closed.verdict, closed.causal_layers) == (opened.verdict, opened.causal_layers)
    return opened.verdict != "impossible" and not same


def _set_flag(config: PretrainedConfig, *, rebuild: bool) -> None:
    """Make ``config`` bidirectional in place; ``rebuild``: its windows may still change."""
    text = config.get_text_config()
    config.use_cache = text.use_cache = False  # else every forward fills a key-value cache
    native = _native_fields(text)
    if native and getattr(text, NATIVE_KEY) == native[NATIVE_KEY]:
        return  # open already; is_causal on top of it would widen Gemma 3's windows
    if native and rebuild and getattr(text, "is_causal", True):
        for name, value in native.items():
            setattr(text, name, value)
    else:
        config.is_causal = text.is_causal = False


def _native_fields(text: PretrainedConfig) -> dict[str, Any]:
    """The fields that the family's own bidirectional key changes, or nothing.

    A config class that acts on the key converts its sliding window when it is built with it. That
    is the test: Gemma 1 declares the key but stays causal in padded batches, Gemma 3 wants
    ``True``, Gemma 4 ``"all"``.
    """
    stored = text.to_dict()
    stored.pop("is_causal", None)
    for value in (True, "all") if NATIVE_KEY in stored else ():
        try:
            rebuilt = type(text).from_dict({**stored, NATIVE_KEY: value})
        except (StrictDataclassError, TypeError):  # not a value of this key, or no window at all
            continue
        if getattr(rebuilt, "sliding_window", None) != stored.get("sliding_window"):
            names = (NATIVE_KEY, "sliding_window", "is_causal")
            return {name: getattr(rebuilt, name) for name in names if hasattr(rebuilt, name)}
    return {}


def _set_module_flags(model: nn.Module, names: list[str], *, causal: bool) -> None:
    for name in names:
        vars(model.get_submodule(name))["is_causal"] = causal


def _decoder(model: Any) -> Any:
    """The bare transformers model inside PEFT wrappers and language-model heads."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model


def _layers(decoder: PreTrainedModel) -> nn.ModuleList:
    """The outermost list of modules that is as long as the config says, or an empty one."""
    depth = getattr(decoder.config.get_text_config(), "num_hidden_layers", None)
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    return next((found for found in lists if len(found) == depth), nn.ModuleList())


def _ids(decoder: PreTrainedModel) -> list[int]:
    """Token ids from the middle of the vocabulary, away from the special ones."""
    vocabulary = decoder.get_input_embeddings().weight.shape[0]
    special: set[Any] = set()
    for name, value in decoder.config.get_text_config().to_dict().items():
        if name.endswith(("token_id", "token_index")):
            special.update(value if isinstance(value, list) else [value])
    pool = [i for i in range(vocabulary // 4, 3 * vocabulary // 4) if i not in special]
    drawn = random.Random(0).sample(pool, min(2 * TOKENS, len(pool)))
    return [drawn[i % len(drawn)] for i in range(2 * TOKENS)]


@contextmanager
def _still(decoder: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every training flag is as it was."""
    training = [module for module in decoder.modules() if module.training]
    decoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _states(decoder: PreTrainedModel, rows: list[list[int]], pads: int = 0) -> Tensor:
    """Last states (B, T, D) of token rows, right-padded to the longest of them and by ``pads``."""
    device = decoder.get_input_embeddings().weight.device
    width = max(map(len, rows)) + pads
    ids = [row + rows[0][:1] * (width - len(row)) for row in rows]
    mask = [[int(i < len(row)) for i in range(width)] for row in rows]
    tensors = (torch.tensor(values, device=device) for values in (ids, mask))
    states: Tensor = decoder(**dict(zip(("input_ids", "attention_mask"), tensors, strict=True)))[0]
    return states


def _changed(states: Tensor) -> Tensor:
    """Which states of (B, T, ...) differ from row 0's; the last row equals row 0 but for noise."""
    flat = states.float().flatten(2)
    change = (flat - flat[:1]).norm(dim=-1) / flat[:1].norm(dim=-1).clamp_min(1e-30)
    return change > (4 * change[-1].max()).clamp_min(1e-6)


def _next_token_seen(decoder: PreTrainedModel, ids: list[int], pads: int) -> bool:
    """Whether every token's state changes when the next token does.

    The next token, not a far one: a sliding window may be shorter than the probe.
    """
    text, other = ids[:TOKENS], ids[TOKENS:]
    replaced = [text[:t] + other[t : t + 1] + text[t + 1 :] for t in range(1, TOKENS)]
    changed = _changed(_states(decoder, [text, *replaced, text], pads)[:, :TOKENS])
    return bool(changed[1:-1].diagonal().all())


def _padding_drift(decoder: PreTrainedModel, ids: list[int]) -> tuple[float, float]:
    """Relative difference of a text alone and beside a longer one, and what is usual at most."""
    text, longer = ids[:TOKENS], ids[-LONGER:]
    alone = _states(decoder, [text])[0]
    beside = _states(decoder, [text, longer])[0, :TOKENS]
    drift = (beside.float() - alone.float()).norm() / alone.float().norm().clamp_min(1e-30)
    return float(drift), 1e-4 if torch.finfo(alone.dtype).bits > 16 else 0.1


def _left_to_right(
    decoder: PreTrainedModel, layers: nn.ModuleList, ids: list[int]
) -> tuple[int, tuple[int | str, ...]]:
    """How many layers were probed, and those that are left-to-right, wholly or in a part.

    In parallel hybrids attention makes the layer look both ways, and a mixer beside or inside it
    does not, so the parts are probed too: one depth at a time, for the fresh input of a part
    hides what the parts inside it do.
    """
    probed, causal = 0, list[str]()
    for depth, pads in ((0, 0), (0, PADS), (1, 0), (2, 0)):
        named = layers.named_modules(remove_duplicate=False)
        modules = {path: part for path, part in named if path and path.count(".") == depth}
        found = _both_ways(decoder, modules, ids, pads)
        probed = probed or len(found)
        new = [path for path, both in found.items() if not both]
        causal += [path for path in new if not any(f"{path}.".startswith(f"{c}.") for c in causal)]
    types = getattr(decoder.config.get_text_config(), "layer_types", None)
    kinds: dict[int, list[str]] = {}
    for path in causal:
        number, _, part = path.partition(".")
        kinds.setdefault(int(number), []).append(part or (types[int(number)] if types else ""))
    return probed, tuple(
        f"{i} ({', '.join(kinds[i])})" if all(kinds[i]) else i for i in sorted(kinds)
    )


def _both_ways(
    decoder: PreTrainedModel, modules: dict[str, nn.Module], ids: list[int], pads: int
) -> dict[str, bool]:
    """Whether each module that ran looks both ways, or does not mix tokens at all.

    One forward of four equal rows serves all modules. On entry to each, the rows are made equal
    again, then the right half of row 1 and the left half of row 2 are perturbed; on exit, the
    other halves show what reached them. Row 3 shows the noise.
    """
    half, size, found = TOKENS // 2, (4, TOKENS + pads), dict[str, bool]()

    def tokens_first(value: Any) -> Tensor | None:  # noqa: ANN401
        """A view (rows, tokens, ...) of states; some families stack streams before the rows."""
        if isinstance(value, Tensor) and value.is_floating_point():
            for at in range(value.dim() - 2):
                if value.shape[at : at + 2] == size:
                    return value.movedim((at, at + 1), (0, 1))
        return None

    def perturbed(value: Any) -> Any:  # noqa: ANN401
        if tokens_first(value) is not None:
            value = value.clone()
            rows = tokens_first(value)
            rows[:] = rows[:1].clone()
            rows[1, half:TOKENS] = rows[0, half:TOKENS].flip(-1)  # another vector, same length
            rows[2, :half] = rows[0, :half].flip(-1)
        return value

    def enter(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:  # noqa: ANN401
        return tuple(map(perturbed, args)), {k: perturbed(v) for k, v in kwargs.items()}

    def leave(name: str, _: nn.Module, __: Any, output: Any) -> None:  # noqa: ANN401
        values = map(tokens_first, output if isinstance(output, tuple | list) else [output])
        if (states := next((v for v in values if v is not None), None)) is not None:
            changed = _changed(states[:, :TOKENS])
            to_the_left, to_the_right = changed[1, :half].any(), changed[2, half:].any()
            found[name] = found.get(name, True) and bool(to_the_left or not to_the_right)

    hooks = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in modules.values()]
    hooks += [m.register_forward_hook(partial(leave, name)) for name, m in modules.items()]
    try:
        _states(decoder, [ids[:TOKENS]] * size[0], pads)
    finally:
        for hook in hooks:
            hook.remove()
    return found
