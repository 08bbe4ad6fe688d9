"""Merges encoders of one base into one, weight by weight, against forgetting what another learned.

A weighted mean of weights (model soups, Wortsman et al., arXiv 2203.05482), or, of two, the way
along the sphere between them (Shoemake, 1985, doi 10.1145/325334.325242). An adapter counts as its
base with the adapter merged. What was not trained from one base makes noise when it is averaged, so
that is refused: by names, shapes, tokenizers, and by the weights, which are nearly parallel where
they have one origin and at right angles where they have not.

Cost: the encoders are loaded one after the other; a copy of all weights in float32 beside two of
them; and the proof.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from unmasked.checkpoint import adapters
from unmasked.checkpoint.card import Card
from unmasked.checkpoint.location import locate
from unmasked.compat.llm2vec import LLM2Vec
from unmasked.compat.origin import find_base
from unmasked.errors import ModelError, unknown
from unmasked.mask.proof import prove, require
from unmasked.model import TextEncoder

logger = logging.getLogger(__name__)

METHODS = ("linear", "slerp")
LEAST_COSINE = 0.5
"""Of the weights of two encoders of one base. Of two that have nothing in common it is near 0, and
training moves it little: 0.97 is far from the base."""
_PARALLEL = 1e-4  # radians below which the way along the sphere is a straight line


def merge_encoders(
    names: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    method: str = "linear",
    **options: Any,
) -> LLM2Vec:
    """One encoder of several of the same base.

    Args:
        names: encoders or adapters: folders or hub names. The first gives settings and prompts.
        weights: share of each; by default the same for all.
        method: ``linear``, or ``slerp`` for two.
        options: further ones of `LLM2Vec.from_pretrained`.

    Returns:
        The merged encoder, proved.

    Raises:
        ModelError: weights or method do not fit, the encoders are not of one base, or pool
            differently.
        NotBidirectionalError: the proof failed.
    """
    shares = check_weights(list(map(str, names)), weights, method)
    _check_bases(names)
    options = {"dtype": "checkpoint", **options}
    partial = bool(options.get("allow_partial"))
    first = LLM2Vec.from_pretrained(names[0], **options)
    others = ((str(n), lambda n=n: LLM2Vec.from_pretrained(n, **options)) for n in names[1:])
    blend(first, others, shares, method, allow_partial=partial)
    first.base_name = find_base(names[0]).name
    return first


def merge_card(
    encoder: TextEncoder, names: Sequence[str], weights: Sequence[float], how: str
) -> Card:
    """The model card of a merged encoder: its parts and their shares."""
    rows = [f"| {name} | {share:g} |" for name, share in zip(names, weights, strict=True)]
    table = "\n".join(
        [f"By `{how}`, weight by weight:\n", "| encoder | share |", "|---|---|", *rows]
    )
    return Card(encoder.base_name, encoder.report.summary(), {"Merged from": table})


def check_weights(
    names: Sequence[str], weights: Sequence[float] | None, method: str
) -> list[float]:
    """The share of each encoder.

    Raises:
        ModelError: fewer than two encoders, one twice, a method that does not exist or does not
            take so many, or shares that are not one for each, above 0, and 1 together.
    """
    if method not in METHODS:
        raise ModelError(unknown("method", method, METHODS))
    if len(names) < 2 or len({*names}) < len(names):
        given = "one encoder is given" if len(names) < 2 else "an encoder is given twice"
        raise ModelError(
            f"{given}, and merging takes two or more different ones. Fix: name others."
        )
    if method == "slerp" and len(names) != 2:
        raise ModelError(
            f"slerp goes from one encoder to another, and {len(names)} are given. "
            "Fix: --method linear, or merge two, and the result with the next."
        )
    count = len(names)
    if weights is None:
        return [1 / count] * count
    equal = ",".join([f"{1 / count:.6g}"] * (count - 1))
    equal += f",{1 - (count - 1) * float(f'{1 / count:.6g}'):.6g}"
    if len(weights) != count:
        raise ModelError(f"{len(weights)} weights for {count} encoders. Fix: --weights {equal}")
    if not all(math.isfinite(share) and share > 0 for share in weights):
        said = ", ".join(f"{share:g}" for share in weights)
        raise ModelError(f"weights {said}: each should be above 0. Fix: --weights {equal}")
    if abs(sum(weights) - 1) > 1e-4:
        shares = [f"{share / sum(weights):.4f}" for share in weights[:-1]]
        shares.append(f"{1 - sum(map(float, shares)):.4f}")
        raise ModelError(
            f"the weights are {sum(weights):g} together and should be 1. "
            f"Fix: --weights {','.join(shares)}"
        )
    return list(weights)


def blend(
    first: TextEncoder,
    others: Iterable[tuple[str, Callable[[], TextEncoder]]],
    weights: Sequence[float],
    method: str = "linear",
    *,
    allow_partial: bool = False,
) -> None:
    """Put the merged weights of several encoders into the first one, and prove it.

    Args:
        first: changed.
        others: the name of each other one, and what loads it; none is kept.
        weights: the share of each, the first's before the others'.
        method: as in `merge_encoders`.
        allow_partial: accept layers that stay causal.

    Raises:
        ModelError: they are not of one base, or pool differently.
        NotBidirectionalError: the proof failed.
    """
    own = dict(first.state_dict())
    sums: dict[str, Tensor] = {}
    for number, (name, load) in enumerate(others, start=1):
        other = load()
        theirs = other.state_dict()
        _check_alike(first, other, name)
        _check_origin(own, theirs, first.base_name, name)
        _take_prompts(first, other, name)
        for key in _numbers(own):
            a, b = own[key].float(), theirs[key].to(own[key].device).float()
            if method == "slerp":
                sums[key] = _along_sphere(a, b, weights[1])
            else:
                sums[key] = sums.get(key, a * weights[0]) + b * weights[number]
        del other, theirs
    for key, value in sums.items():
        own[key] = value.to(own[key].dtype)
    first.load_state_dict(own)
    trunk = first.backbone.auto_model
    first.report = prove(trunk)
    if first.report.verdict != "full":
        require(first.report, allow_partial=allow_partial)


def _check_bases(names: Sequence[str | Path]) -> None:
    """Refuse adapters that name different bases."""
    places = [locate(name).require() for name in names]
    bases = {
        str(place.name): find_base(place.name).name
        for place in places
        if adapters.is_adapter(place)
    }
    if len({*bases.values()}) > 1:
        said = "; ".join(f"{name}: {base}" for name, base in bases.items())
        raise ModelError(f"these adapters are of different bases ({said}). Fix: those of one base.")


def _numbers(state: Mapping[str, Tensor]) -> Iterator[str]:
    return (key for key, value in state.items() if value.is_floating_point())


def _check_alike(first: TextEncoder, other: TextEncoder, name: str) -> None:
    """Refuse another shape, tokenizer, pooling or module."""
    own, theirs = first.state_dict(), other.state_dict()
    if own.keys() != theirs.keys() or any(own[key].shape != theirs[key].shape for key in own):
        odd = sorted(own.keys() ^ theirs.keys()) or [
            k for k in own if own[k].shape != theirs[k].shape
        ]
        raise ModelError(
            f"{name} is not of the same base as {first.base_name}: {len(odd)} weights are missing "
            f"or of another shape, first {odd[0]}. Fix: merge encoders of one base and size."
        )
    if first.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise ModelError(
            f"{name} has another vocabulary than {first.base_name}, so that its embeddings are of "
            "other tokens. Fix: merge encoders of one base."
        )
    for what in ("pooling_mode", "skip_instruction", "template", "compat"):
        ours, its = (getattr(encoder.settings, what) for encoder in (first, other))
        if ours != its:
            raise ModelError(
                f"{name} has {what} {its}, and {first.base_name} {ours}, so that their vectors "
                "mean other things. Fix: merge encoders that were trained with the same."
            )
    kinds = [[type(module) for module in list(encoder)[2:]] for encoder in (first, other)]
    if kinds[0] != kinds[1]:
        raise ModelError(
            f"{name} has other modules behind its pooling than {first.base_name}. "
            "Fix: merge encoders that have the same."
        )


def _check_origin(
    own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], ours: str, name: str
) -> None:
    """Refuse weights that have nothing in common.

    Vectors are left out: those of norms are near 1 in every model.
    """
    dots, norms = 0.0, [0.0, 0.0]
    for key in _numbers(own):
        if own[key].dim() > 1:
            a, b = own[key].float().flatten(), theirs[key].to(own[key].device).float().flatten()
            dots += float(a @ b)
            norms = [norms[0] + float(a @ a), norms[1] + float(b @ b)]
    cosine = dots / max(math.sqrt(norms[0] * norms[1]), 1e-30)
    if not cosine >= LEAST_COSINE:
        raise ModelError(
            f"{name} is not of the same base as {ours}: the cosine of their weights is "
            f"{cosine:.3f}, and of two that were trained from one it is near 1. "
            "Fix: merge encoders of one base."
        )


def _take_prompts(first: TextEncoder, other: TextEncoder, name: str) -> None:
    """Add prompts that the first lacks; where two differ the first's stays, and a line says so."""
    for key, prompt in other.prompts.items():
        kept = first.prompts.setdefault(key, prompt)
        if kept != prompt and not kept:
            first.prompts[key] = prompt
        elif kept != prompt and prompt:
            logger.warning("prompt '%s': %r is kept, not %r of %s.", key, kept, prompt, name)


def _along_sphere(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From ``a`` to ``b`` by a share of the angle between them, each as one long vector."""
    cosine = float(cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if not _PARALLEL < angle < math.pi - _PARALLEL:
        return torch.lerp(a, b, share)
    parts = [math.sin((1 - share) * angle), math.sin(share * angle)]
    return (a * parts[0] + b * parts[1]) / math.sin(angle)
