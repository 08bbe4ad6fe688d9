"""Prove with forward passes that a decoder's causal mask is off.

Opening a model (`opening`) can fail silently: some families obey the flag in padded batches only,
some keep single layers causal. So `prove` trusts no config and observes the model: it changes
tokens, or the states that enter a layer, and checks which states to the left of them change. This
costs eleven forwards of at most 12 rows by 16 tokens, 0.03 s for a tiny model.

Shapes: R rows, T tokens of a row, D width of a state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from unmasked.errors import NotBidirectionalError
from unmasked.mask.opening import (
    as_stock,
    attention_name,
    clear_module_flags,
    decoder_of,
    full_mask,
    layers_of,
    mirror_triangles,
    set_flag,
    window,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Verdict = Literal["full", "partial", "impossible"]

# Hooks recognise states by their (R, T) axes; no model is likely to have 11 or 13 heads.
TOKENS, PADS = 11, 2
LENGTHS = (TOKENS, 9, 6, 3)  # they end at different places in blocks of 2, 4 or 8 tokens

NOT_FINITE = "the states are not finite"


@dataclass(frozen=True)
class Proof:
    """The result of the forwards.

    Attributes:
        verdict: ``full``: every layer looks both ways. ``partial``: every token sees the next one,
            but some layers, or parts of them, stay left-to-right. ``impossible``: neither, or the
            states depend on padding, or the forward fails.
        reason: the verdict in words.
        causal_layers: the layers that stay left-to-right: a number, or ``"0 (conv)"`` with the
            layer type in the config or the part of the layer that stays so.
        layers: number of decoder layers probed one by one; 0 if no list of layers was found.
        padding_drift: relative difference between a text's states alone and in a batch with a
            longer text; NaN if the forward fails.
        attention: the attention implementation that ran.
        model_type: the family, as its config names it.
        window: tokens to each side that sliding layers see; None without such layers.
    """

    verdict: Verdict
    reason: str
    causal_layers: tuple[int | str, ...]
    layers: int
    padding_drift: float
    attention: str
    model_type: str
    window: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields as strict JSON has them: a list instead of a tuple, None instead of NaN."""
        drift = self.padding_drift if math.isfinite(self.padding_drift) else None
        return asdict(self) | {"causal_layers": list(self.causal_layers), "padding_drift": drift}

    def summary(self) -> str:
        """One line for the terminal."""
        window = f"; sliding layers see {self.window} tokens to each side" if self.window else ""
        what = f"{self.verdict} ({self.model_type}, {self.attention})"
        return f"bidirectional: {what}: {self.reason}{window}"


def open_mask(model: nn.Module) -> Proof:
    """Make a loaded model bidirectional and prove it.

    For Gemma 3 and 4 `open_config` before loading is better, because their windows are fixed when
    they are built: a loaded one gets ``is_causal=False``, with twice the reach of its own key.
    """
    decoder = decoder_of(model)
    set_flag(decoder.config, rebuild=False)
    clear_module_flags(model)
    mirror_triangles(model)
    report = prove(model)
    if report.verdict != "impossible" or report.attention != "eager" or report.window:
        return report  # `full_mask` cannot help: it needs eager attention and lifts windows
    handle = decoder.register_forward_pre_hook(full_mask, with_kwargs=True)
    masked = prove(model)
    if masked.verdict != "impossible":
        return masked
    handle.remove()
    return report


def prove(model: nn.Module) -> Proof:
    """Run the self-check on a loaded model, which is left as it was.

    Args:
        model: a bare ``*Model``, a ``*ForCausalLM`` or a PEFT model around either.
    """
    decoder = decoder_of(model)
    depth = getattr(decoder.config.get_text_config(), "num_hidden_layers", 0)
    about = (attention_name(decoder), decoder.config.model_type, window(decoder.config))
    try:
        with torch.no_grad(), evaluating(decoder):
            sees = [_sees_next(decoder, pads) for pads in (0, PADS)]
            drift, limit = _padding_drift(decoder)
            probed, causal = _left_to_right(decoder, depth)
    except torch.cuda.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        # Some families fail in their own forward without a mask. That is a verdict too.
        reason = f"the forward fails: {type(error).__name__}: {error}"
        return Proof("impossible", reason, (), 0, math.nan, *about)
    verdict: Verdict = "impossible"
    if not math.isfinite(drift):
        reason = NOT_FINITE
    elif not all(sees):
        where = f" {'with' if sees[0] else 'without'} padding" if any(sees) else ""
        reason = f"a token{where} does not see the next one"
    elif drift > limit:
        reason = f"the states depend on padding (relative difference {drift:.1e} > {limit:.0e})"
    else:
        verdict = "partial" if causal else "full"
        reason = f"every token sees the next one, padding drift {drift:.0e}"
    if causal:
        shown = ", ".join(map(str, causal[:8])) + (", ..." if len(causal) > 8 else "")
        reason += f"; left-to-right in {len(causal)} of {depth} layers: {shown}"
    elif not probed:
        reason += "; no layers were found to be probed one by one"
    return Proof(verdict, reason, causal, probed, drift, *about)


def require(report: Proof, *, allow_partial: bool = False) -> None:
    """Refuse a model that did not pass.

    Raises:
        NotBidirectionalError: unless the verdict is ``full``, or ``partial`` and allowed.
    """
    if report.verdict == "full" or (report.verdict == "partial" and allow_partial):
        return
    partial = "pass allow_partial=True (--allow-partial, model.allow_partial=true) to accept it"
    fixes = [partial] if report.verdict == "partial" else []
    if report.reason == NOT_FINITE:
        fixes += ["load it with dtype='float32'", "download the weights again"]
    else:
        if report.attention != "eager":
            fixes.append("load it with attn_implementation='eager'")
        fixes.append("choose a decoder with attention in every layer")
    raise NotBidirectionalError(
        f"'{report.model_type}' with {report.attention} attention is not bidirectional: verdict "
        f"'{report.verdict}', allowed: {'full, partial' if allow_partial else 'full'}. Reason: "
        f"{report.reason}. Fix: {', or '.join(fixes)}.",
        report,
    )


def stock_loading(model: nn.Module) -> Literal["same", "eager", "causal"]:
    """How a stock loader will load the model once it is saved.

    This is proved too: inside `as_stock` the model runs without the repairs that exist only in this
    process and are not saved.

    Returns:
        ``same``: as it is here. ``eager``: the same, if ``config.json`` has
        ``"attn_implementation": "eager"``. ``causal``: only this package can open it.
    """
    decoder = decoder_of(model)
    here = prove(decoder)
    if here.verdict == "impossible":
        return "same"
    with as_stock(decoder) as default:
        for attention in dict.fromkeys((default, "eager")):
            decoder.set_attn_implementation(attention)
            stock = prove(decoder)
            if (stock.verdict, stock.causal_layers) == (here.verdict, here.causal_layers):
                return "same" if attention == default else "eager"
    return "causal"


@contextmanager
def evaluating(decoder: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module's training flag is restored."""
    training = [module for module in decoder.modules() if module.training]
    decoder.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _states(decoder: PreTrainedModel, rows: list[list[int]], pads: int = 0) -> Tensor:
    """Last states (R, T, D) of rows, right-padded to the longest row plus ``pads`` tokens.

    The numbers in a row, all below 22, stand for distinct tokens from the middle of the vocabulary,
    where no family has special tokens.
    """
    vocabulary = decoder.config.get_text_config().vocab_size
    width, device = max(map(len, rows)) + pads, decoder.device
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[int(i < len(row)) for i in range(width)] for row in rows], device=device)
    ids = vocabulary // 4 + ids * vocabulary // (4 * TOKENS)
    states: Tensor = decoder(input_ids=ids, attention_mask=mask)[0]
    return states


def _changed(states: Tensor) -> Tensor:
    """Which states of (R, T, ...) differ from those of row 0, as (R, T) booleans.

    The last row has the same input as row 0, so its difference is the noise of the kernels.
    """
    # Measured on 17 families on a CPU, in float32 and bfloat16: the noise is at most 5e-7, mostly
    # 0; a change that reaches a state is at least 0.01, and 1e-4 in the mixers of Falcon-H1.
    flat = states.float().flatten(2)
    change: Tensor = (flat - flat[:1]).norm(dim=-1) / flat[:1].norm(dim=-1).clamp_min(1e-30)
    return change.gt((4 * change[-1].max()).clamp_min(1e-6))


def _sees_next(decoder: PreTrainedModel, pads: int) -> bool:
    """Whether the state of every token changes when the next token changes.

    A more distant token would not do, because a sliding window may be shorter than the text.
    """
    text = list(range(TOKENS))
    others = [[*text[:t], t + TOKENS, *text[t + 1 :]] for t in range(1, TOKENS)]
    changed = _changed(_states(decoder, [text, *others, text], pads)[:, :TOKENS])
    return bool(changed[1:-1].diagonal().all())  # token t differs in row t: does state t - 1?


def _padding_drift(decoder: PreTrainedModel) -> tuple[float, float]:
    """Relative difference of states of texts alone and in a padded batch, and the limit for it."""
    texts = [list(range(length)) for length in LENGTHS]
    together, drifts = _states(decoder, [*texts, list(range(6, 2 * TOKENS))]), []
    for padded, text in zip(together, texts, strict=False):
        alone = _states(decoder, [text])[0].float()
        drifts.append((padded[: len(text)].float() - alone).norm() / alone.norm())
    drift = float(torch.stack(drifts).max())
    # Kernels with and without a mask round differently: 0.04 in 32 sound layers in bfloat16, while
    # unsound families start at 0.28 (measured). For deeper models the rounding is measured.
    if torch.finfo(together.dtype).bits > 16:
        return drift, 1e-4
    return drift, min(0.25, max(0.1, 2 * _rounding(decoder) if drift > 0.1 else 0))


def _rounding(decoder: PreTrainedModel) -> float:
    """Relative difference of states when the embeddings move by a unit in the last place."""
    exact = _states(decoder, [list(range(TOKENS))]).float()

    def move(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
        signs = torch.ones_like(embedded).cumsum(-1) % 2 * 2 - 1
        return embedded * (1 + signs * torch.finfo(embedded.dtype).eps)

    handle = decoder.get_input_embeddings().register_forward_hook(move)
    try:
        moved = _states(decoder, [list(range(TOKENS))]).float()
    finally:
        handle.remove()
    return float((moved - exact).norm() / exact.norm())


def _left_to_right(decoder: PreTrainedModel, depth: int) -> tuple[int, tuple[int | str, ...]]:
    """How many layers were probed, and which are left-to-right, wholly or in a part.

    The layers of a parallel hybrid look both ways through their attention, while a mixer beside or
    inside it does not (Falcon-H1). So the parts of the layers are probed too, one level of the
    module tree at a time: perturbing the input of a part hides what happens inside the part.
    """
    layers = layers_of(decoder, depth)
    probed, causal = 0, list[str]()  # causal: paths such as "3" or "3.mixer"
    for dots, pads in ((0, 0), (0, PADS), (1, 0), (2, 0)):
        named = layers.named_modules(remove_duplicate=False)
        modules = {path: part for path, part in named if path and path.count(".") == dots}
        found = _both_ways(decoder, modules, pads)
        probed = probed or len(found)
        new = [path for path, both in found.items() if not both]
        causal += [path for path in new if not any(f"{path}.".startswith(f"{c}.") for c in causal)]
    types = getattr(decoder.config.get_text_config(), "layer_types", None)
    kinds: dict[int, str] = {}
    for path in causal:
        number, _, part = path.partition(".")
        kind = part or (types[int(number)] if types else "")
        kinds[int(number)] = ", ".join(filter(None, (kinds.get(int(number)), kind)))
    return probed, tuple(f"{i} ({kind})" if kind else i for i, kind in sorted(kinds.items()))


def _both_ways(
    decoder: PreTrainedModel, modules: dict[str, nn.Module], pads: int
) -> dict[str, bool]:
    """Whether each module that ran looks both ways, or does not mix tokens at all.

    One forward of four equal rows serves all modules. At the entry of a module, the rows are made
    equal again; then the right half of row 1 and the left half of row 2 get other states. At its
    exit, a change in the other half of these rows has crossed over. Row 3 shows the noise.
    """
    half, size, found = TOKENS // 2, (4, TOKENS + pads), dict[str, bool]()

    def perturbed(value: Any) -> Any:
        if _rows(value, size) is None:
            return value
        value = value.clone()
        states: Any = _rows(value, size)
        states[1:] = states[:1]
        states[1, half:TOKENS] = states[0, half:TOKENS].flip(-1)  # another vector, same length
        states[2, :half] = states[0, :half].flip(-1)
        return value

    def enter(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return tuple(map(perturbed, args)), {k: perturbed(v) for k, v in kwargs.items()}

    def leave(name: str, _: nn.Module, __: Any, output: Any) -> None:
        for value in output if isinstance(output, tuple | list) else [output]:
            if (states := _rows(value, size)) is not None:
                changed = _changed(states[:, :TOKENS])
                leftward, rightward = changed[1, :half].any(), changed[2, half:].any()
                # A module that moves nothing to the right either treats tokens singly (an MLP).
                found[name] = found.get(name, True) and bool(leftward or not rightward)
                return

    hooks = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in modules.values()]
    hooks += [m.register_forward_hook(partial(leave, name)) for name, m in modules.items()]
    try:
        _states(decoder, [list(range(TOKENS))] * size[0], pads)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _rows(value: object, size: tuple[int, int]) -> Tensor | None:
    """A view (R, T, ...) of states; some families stack several streams before the rows."""
    if isinstance(value, Tensor) and value.is_floating_point():
        for at in range(value.dim() - 2):
            if value.shape[at : at + 2] == size:
                return value.movedim((at, at + 1), (0, 1))
    return None
