"""Take the causal mask off a decoder, and prove with forward passes that it is off.

transformers (5.2 and later) drops the causal mask of almost every family when
``config.is_causal`` is ``False``. Where it does not, nothing fails: some families ignore the flag,
some obey it only when the batch is padded, some keep single layers causal. So no list of
architectures decides here. `open_config` sets the flag, `clear_module_flags` repairs the layers
that read their own, and `prove` looks at what the loaded model really does.

The proof perturbs a token, or the states that enter a layer, and looks for the change to the left
of it, with and without padding. It costs eight forwards of at most 13 rows by 13 tokens (0.1 s
for a tiny model; for a large one, about as much as encoding a few short sentences).
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from unmasked.errors import NotBidirectionalError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NATIVE_KEY = "use_bidirectional_attention"

# Odd sizes that no head count is likely to share, so that a (rows, tokens) pair is unmistakable.
TOKENS, PADS = 11, 2

# What a family that cannot work raises from inside its forward; anything else is a real bug.
FORWARD_ERRORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Report:
    """What the forwards showed.

    Attributes:
        verdict: ``full``: every layer looks both ways. ``partial``: every state depends on the
            token to its right, but some layers or mixers stay left-to-right. ``impossible``: some
            states do not, or they depend on padding.
        reason: the same in words, with what was measured.
        causal_layers: the layers that stay left-to-right: a number, or ``"0 (conv)"`` where the
            config declares layer types or only a part of the layer is causal.
        layers: how many decoder layers were probed one by one (0: no list of layers found).
        padding_drift: relative difference between a text alone and the same text padded beside a
            longer one; NaN if the forward failed.
        attention: the attention implementation the forwards ran with.
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
        """The fields, ready for strict JSON: lists for tuples, null for NaN."""
        drift = self.padding_drift if math.isfinite(self.padding_drift) else None
        layers = list(self.causal_layers)
        return {**dataclasses.asdict(self), "causal_layers": layers, "padding_drift": drift}

    def summary(self) -> str:
        """One line for the terminal."""
        return f"bidirectional: {self.verdict} ({self.model_type}, {self.attention}): {self.reason}"


# --- the flag ---------------------------------------------------------------------------------


def open_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of ``config`` that loads a bidirectional model; survives ``save_pretrained``.

    Families with a working key of their own (Gemma 3 and 4) get that key, because it also halves
    their sliding window on every backend; all others get ``is_causal=False``. A config that is
    already bidirectional is left as it is, so a saved folder loads here as it does elsewhere.
    """
    opened = copy.deepcopy(config)
    _set_flag(opened, rebuild=True)
    return opened


def _set_flag(config: PretrainedConfig, *, rebuild: bool) -> None:
    """Make ``config`` bidirectional in place; ``rebuild``: it may still change the windows."""
    text = config.get_text_config()
    config.use_cache = text.use_cache = False  # else every forward fills a key-value cache
    native = _native_fields(text)
    if native and getattr(text, NATIVE_KEY) == native[NATIVE_KEY]:
        return  # already open; is_causal on top of it would widen Gemma 3's windows
    if native and rebuild and getattr(text, "is_causal", True):
        for name, value in native.items():
            setattr(text, name, value)
    else:
        config.is_causal = text.is_causal = False


def _native_fields(text: PretrainedConfig) -> dict[str, Any]:
    """The fields that the family's own bidirectional key sets, or nothing.

    A config class that acts on the key converts its sliding window when built with it. That is
    the test: Gemma 1 declares the key and does nothing with it (and stays causal in padded
    batches), Gemma 3 wants ``True``, Gemma 4 ``"all"``.
    """
    stored = text.to_dict()
    if NATIVE_KEY not in stored:
        return {}
    stored.pop("is_causal", None)
    for value in (True, "all"):
        try:
            rebuilt = type(text).from_dict({**stored, NATIVE_KEY: value})
        except (StrictDataclassError, TypeError):  # not a value of this key, or no window at all
            continue
        if getattr(rebuilt, "sliding_window", None) != stored.get("sliding_window"):
            names = (NATIVE_KEY, "sliding_window", "is_causal")
            return {name: getattr(rebuilt, name) for name in names if hasattr(rebuilt, name)}
    return {}


def clear_module_flags(model: nn.Module) -> list[str]:
    """Set ``is_causal=False`` on every submodule that has it ``True``; returns their names.

    Repairs families whose layers drop the config's flag on the way to the attention (StableLM,
    Nemotron), in this process only: see `stock_needs_eager`.
    """
    names = [n for n, module in model.named_modules() if getattr(module, "is_causal", None) is True]
    _set_module_flags(model, names, causal=False)
    return names


def _set_module_flags(model: nn.Module, names: list[str], *, causal: bool) -> None:
    for name in names:
        model.get_submodule(name).is_causal = causal  # type: ignore[assignment]


def open_mask(model: nn.Module) -> Report:
    """Make a loaded model bidirectional and prove it.

    The windows of a loaded Gemma 3 or 4 were fixed when it was built, so here it gets
    ``is_causal=False`` and twice the reach of its native key; `open_config` before loading is the
    better way.
    """
    _set_flag(_decoder(model).config, rebuild=False)
    clear_module_flags(model)
    return prove(model)


# --- the proof --------------------------------------------------------------------------------


def prove(model: nn.Module, *, tolerance: float | None = None) -> Report:
    """Run the self-check on a loaded model.

    Args:
        model: a bare ``*Model``, a ``*ForCausalLM`` or a PEFT model around either.
        tolerance: the largest ``padding_drift`` accepted; by default 1e-4, and 5e-2 in half
            precision, where kernels with and without a mask round differently.

    Returns:
        The report. Nothing about the model is changed, and the global random state is not used.
    """
    decoder = _decoder(model)
    layers = _layers(decoder)
    about = {
        "attention": str(getattr(decoder.config, "_attn_implementation", None)),
        "model_type": str(decoder.config.model_type),
    }
    try:
        with _still(decoder):
            sees_right = [_sees_right(decoder, pads) for pads in (0, PADS)]
            probed, causal = _causal_layers(decoder, layers)
            drift, precise = _padding_drift(decoder)
    except FORWARD_ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"the forward fails: {type(error).__name__}: {error}"
        return Report("impossible", reason, (), len(layers), math.nan, **about)
    limit = tolerance or (1e-4 if precise else 5e-2)
    verdict: Literal["full", "partial", "impossible"] = "impossible"
    named = f"left-to-right: {', '.join(map(str, causal))} of {len(layers)} layers"
    if not math.isfinite(drift):
        reason = "the states are not finite"
    elif not all(sees_right):
        batch = "any batch" if not any(sees_right) else "a padded batch"
        batch = "a batch without padding" if sees_right == [False, True] else batch
        reason = f"in {batch} a token does not see the next one"
    elif drift > limit:
        reason = f"the vectors depend on padding (relative difference {drift:.1e} > {limit:.0e})"
    elif causal:
        verdict, reason = "partial", "every token sees the next one"
    else:
        verdict = "full"
        reason = f"{probed} of {len(layers)} layers look both ways, padding drift {drift:.0e}"
    if causal:
        reason += f"; {named}"
    return Report(verdict, reason, causal, probed, drift, **about)


def require(report: Report, *, allow_partial: bool = False) -> None:
    """Refuse a model that did not pass.

    Raises:
        NotBidirectionalError: unless the verdict is ``full``, or ``partial`` and allowed.
    """
    if report.verdict == "full" or (report.verdict == "partial" and allow_partial):
        return
    allowed = "full or partial" if allow_partial else "full"
    fixes = []
    if report.verdict == "partial":
        fixes.append("pass allow_partial=True to accept these layers as they are")
    if report.attention != "eager":
        fixes.append("load it with attn_implementation='eager'")
    fixes.append("choose a decoder with attention in every layer")
    raise NotBidirectionalError(
        f"'{report.model_type}' with {report.attention} attention is not bidirectional: "
        f"verdict '{report.verdict}', allowed: {allowed}. Reason: {report.reason}. "
        f"Fix: {', or '.join(fixes)}.",
        report,
    )


def stock_needs_eager(model: nn.Module) -> bool:
    """Whether a stock loader of the saved model gets another mask than this process has.

    True for families that need `clear_module_flags`, which no folder carries; then its
    ``config.json`` must name ``"attn_implementation": "eager"``. Decided by proof: the model runs
    for a moment with the flags and the attention that a fresh instance of its class comes with
    (built without memory for its weights).
    """
    decoder = _decoder(model)
    here = decoder.config._attn_implementation
    config = copy.deepcopy(decoder.config)
    config._attn_implementation = None
    with torch.device("meta"):
        stock = type(decoder)(config)
    flagged = [n for n, module in stock.named_modules() if getattr(module, "is_causal", None)]
    flagged = [n for n in flagged if getattr(decoder.get_submodule(n), "is_causal", None) is False]
    opened = prove(decoder)
    if not flagged or opened.verdict == "impossible":
        return False
    _set_module_flags(decoder, flagged, causal=True)
    try:
        decoder.set_attn_implementation(stock.config._attn_implementation)
        closed = prove(decoder)
    finally:
        decoder.set_attn_implementation(here)
        _set_module_flags(decoder, flagged, causal=False)
    return (closed.verdict, closed.causal_layers) != (opened.verdict, opened.causal_layers)


# --- the forwards -----------------------------------------------------------------------------


def _decoder(model: nn.Module) -> Any:
    """The bare transformers model inside PEFT wrappers and language-model heads."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.base_model


def _layers(decoder: Any) -> nn.ModuleList:
    """The outermost list of modules that is as long as the config says, or an empty one."""
    depth = getattr(decoder.config.get_text_config(), "num_hidden_layers", None)
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    return next((found for found in lists if len(found) == depth), nn.ModuleList())


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


def _ids(decoder: Any) -> list[int]:
    """Distinct token ids from the middle of the vocabulary, without the special ones."""
    vocabulary = decoder.get_input_embeddings().weight.shape[0]
    special: set[Any] = set()
    for name, value in decoder.config.get_text_config().to_dict().items():
        if name.endswith(("token_id", "token_index")):
            special.update(value if isinstance(value, list) else [value])
    pool = [i for i in range(vocabulary // 4, 3 * vocabulary // 4) if i not in special]
    return random.Random(0).sample(pool, 2 * TOKENS)


def _states(decoder: Any, rows: list[list[int]], pads: int = 0) -> Tensor:
    """Last hidden states (B, T, D) of token rows, right-padded to the longest and by ``pads``."""
    device = decoder.get_input_embeddings().weight.device
    width = max(map(len, rows)) + pads
    ids = [row + rows[0][:1] * (width - len(row)) for row in rows]
    mask = [[int(i < len(row)) for i in range(width)] for row in rows]
    output = decoder(
        input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device)
    )
    states: Tensor = output.last_hidden_state
    return states


def _change(states: Tensor) -> Tensor:
    """Relative change (B, T) of every row's states (B, T, ...) from those of row 0."""
    flat = states.float().flatten(2)
    return (flat - flat[:1]).norm(dim=-1) / flat[:1].norm(dim=-1).clamp_min(1e-30)


def _threshold(states: Tensor, noise: Tensor) -> float:
    """What counts as a change, given how far two equal rows of the same batch came out apart."""
    return max(1e-6 if _precise(states) else 1e-5, 4 * float(noise))


def _precise(states: Tensor) -> bool:
    return torch.finfo(states.dtype).bits > 16


def _sees_right(decoder: Any, pads: int) -> bool:
    """Whether every token's state changes when the next token does.

    The *next* token, not a far one, so that a sliding window shorter than the probe passes.
    """
    ids = _ids(decoder)
    text, other = ids[:TOKENS], ids[TOKENS:]
    replaced = [text[:t] + other[t : t + 1] + text[t + 1 :] for t in range(1, TOKENS)]
    states = _states(decoder, [text, *replaced, text], pads)[:, :TOKENS]
    change = _change(states)
    seen = change[1:-1].diagonal() > _threshold(states, change[-1].max())
    return bool(seen.all())


def _padding_drift(decoder: Any) -> tuple[float, bool]:
    """Relative difference of a text alone and padded; whether the states are full precision."""
    ids = _ids(decoder)
    text, longer = ids[:TOKENS], ids[-16:]
    alone = _states(decoder, [text])[0]
    beside = _states(decoder, [text, longer])[0, :TOKENS]
    difference = (beside.float() - alone.float()).norm() / alone.float().norm().clamp_min(1e-30)
    return float(difference), _precise(alone)


def _causal_layers(decoder: Any, layers: nn.ModuleList) -> tuple[int, tuple[int | str, ...]]:
    """How many layers could be probed, and those that are left-to-right, wholly or in part."""
    whole = {str(i): layer for i, layer in enumerate(layers)}
    unpadded, padded = (_probe(decoder, whole, pads) for pads in (0, PADS))
    causal = {name for name in unpadded if not (unpadded[name] and padded[name])}
    parts: dict[str, list[str]] = {}
    # Parallel hybrids: attention makes the layer look both ways, a mixer beside or inside it does
    # not. One depth at a time, for resetting a part's input hides what its own parts do.
    for depth in (1, 2):
        inner = {
            f"{i}.{name}": part
            for i, layer in whole.items()
            if i not in causal
            for name, part in layer.named_modules()
            if name and name.count(".") == depth - 1
        }
        for name, both_ways in _probe(decoder, inner, 0).items():
            if not both_ways:
                layer, _, part = name.partition(".")
                parts.setdefault(layer, []).append(part)
    types = getattr(decoder.config.get_text_config(), "layer_types", None)
    named: list[int | str] = []
    for i, layer in enumerate(whole):
        if layer in parts:
            named.append(f"{i} ({', '.join(parts[layer])})")
        elif layer in causal:
            named.append(f"{i} ({types[i]})" if types else i)
    return len(unpadded), tuple(named)


def _probe(decoder: Any, modules: dict[str, nn.Module], pads: int) -> dict[str, bool]:
    """Whether each module that was called looks both ways, or does not mix tokens at all.

    One forward of four equal rows serves all modules: on entry, rows are made equal again, then
    the right half of row 1 and the left half of row 2 are perturbed; on exit, the other halves
    show what reached them. Row 3 shows the noise.
    """
    half, found = TOKENS // 2, dict[str, bool]()
    size = (4, TOKENS + pads)

    def axis(value: Any) -> int | None:
        """Where in a tensor's shape (rows, tokens) is found; some families stack streams first."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 3:
            return None
        return next((d for d in range(value.dim() - 2) if value.shape[d : d + 2] == size), None)

    def perturbed(value: Any) -> Any:
        at = axis(value)
        if at is None:
            return value
        rows = value.movedim((at, at + 1), (0, 1)).clone()
        rows[:] = rows[:1].clone()
        rows[1, half:TOKENS] = rows[1, half:TOKENS].flip(-1)  # another vector of the same length
        rows[2, :half] = rows[2, :half].flip(-1)
        return rows.movedim((0, 1), (at, at + 1))

    def enter(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return tuple(map(perturbed, args)), {k: perturbed(v) for k, v in kwargs.items()}

    def leave(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def measure(_: nn.Module, __: Any, output: Any) -> None:
            values = output if isinstance(output, tuple | list) else [output]
            states = next((v for v in values if axis(v) is not None), None)
            if states is None:
                return
            at = axis(states)
            states = states.movedim((at, at + 1), (0, 1))
            change = _change(states)[:, :TOKENS]
            noticed = change > _threshold(states, change[3].max())
            sees_right, sees_left = noticed[1, :half].any(), noticed[2, half:].any()
            found[name] = found.get(name, True) and bool(sees_right or not sees_left)

        return measure

    hooks = []
    try:
        for name, module in modules.items():
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave(name)))
        _states(decoder, [_ids(decoder)[:TOKENS]] * size[0], pads)
    finally:
        for hook in hooks:
            hook.remove()
    return found
