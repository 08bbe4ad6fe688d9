"""Merges encoders of one base into one, weight by weight, so that it keeps what each has learned.

The result is a weighted mean of the weights (model soups, Wortsman et al., arXiv 2203.05482), or,
for two encoders, their spherical interpolation (slerp; Shoemake, 1985, doi 10.1145/325334.325242).
An adapter counts as its base with the adapter merged. The mean of encoders with different bases
would be noise, so they are refused: by names, shapes and tokenizers, and by their weights, which
are nearly parallel if both were trained from one base and orthogonal if not.

Cost: the encoders are loaded one after the other, so that memory holds two of them and a copy of
all weights in float32; and the proof.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
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
"""Minimum cosine between the weights of two encoders of one base. Between unrelated encoders it is
near 0, and training changes it little: 0.97 is already far from the base."""
_PARALLEL = 1e-4  # radians; at a smaller angle, spherical interpolation is done linearly


def merge_encoders(
    names: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    method: str = "linear",
    **options: Any,
) -> LLM2Vec:
    """Merge several encoders of the same base into one.

    Args:
        names: folders or hub names of encoders or adapters. The first one's settings are kept, and
            its prompts take precedence.
        weights: the share of each encoder; by default all are equal.
        method: ``linear``, or ``slerp`` for two encoders.
        options: further arguments of `LLM2Vec.from_pretrained`.

    Returns:
        The merged encoder, proved.

    Raises:
        ModelError: the weights or the method cannot be used, or the encoders have different bases
            or pool differently.
        NotBidirectionalError: the proof failed.
    """
    shares = check_weights(list(map(str, names)), weights, method)
    _check_bases(names)

    def load(name: str | Path) -> LLM2Vec:
        return LLM2Vec.from_pretrained(name, **{"dtype": "checkpoint", **options})

    first = load(names[0])
    others = ((str(name), partial(load, name)) for name in names[1:])
    allow_partial = bool(options.get("allow_partial"))
    blend(first, others, shares, method, allow_partial=allow_partial)
    first.base_name = find_base(names[0]).name
    return first


def merge_card(
    encoder: TextEncoder, names: Sequence[str], weights: Sequence[float], how: str
) -> Card:
    """The model card of a merged encoder: its parts and their shares."""
    rows = [f"| {name} | {share:g} |" for name, share in zip(names, weights, strict=True)]
    table = [f"By `{how}`, weight by weight:\n", "| encoder | share |", "|---|---|", *rows]
    parts = {"Merged from": "\n".join(table)}
    return Card(encoder.base_name, encoder.report.summary(), parts)


def check_weights(
    names: Sequence[str], weights: Sequence[float] | None, method: str
) -> list[float]:
    """The share of each encoder; equal shares if `weights` is None.

    Raises:
        ModelError: there are fewer than two encoders or two equal ones, the method does not exist
            or does not take this many, or the shares are not one positive number for each encoder
            with a sum of 1.
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
        first: the encoder whose weights are replaced.
        others: pairs of a name and a function that loads that encoder. They are loaded one at a
            time and released after use.
        weights: the share of each encoder, beginning with the first.
        method: as in `merge_encoders`.
        allow_partial: accept layers that stay causal.

    Raises:
        ModelError: the encoders have different bases or pool differently.
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
        for key in _float_keys(own):
            a, b = own[key].float(), theirs[key].to(own[key].device).float()
            if method == "slerp":
                sums[key] = _slerp(a, b, weights[1])
            else:
                sums[key] = sums.get(key, a * weights[0]) + b * weights[number]
        del other, theirs  # before the next one is loaded
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
    given = filter(adapters.is_adapter, places)
    bases = {str(place.name): find_base(place.name).name for place in given}
    if len({*bases.values()}) > 1:
        said = "; ".join(f"{name}: {base}" for name, base in bases.items())
        fix = "Fix: merge adapters of one base."
        raise ModelError(f"these adapters are of different bases ({said}). {fix}")


def _float_keys(state: Mapping[str, Tensor]) -> Iterator[str]:
    return (key for key, value in state.items() if value.is_floating_point())


def _check_alike(first: TextEncoder, other: TextEncoder, name: str) -> None:
    """Refuse an encoder with other shapes, another vocabulary, other pooling or other modules."""
    own, theirs = first.state_dict(), other.state_dict()
    if own.keys() != theirs.keys() or any(own[key].shape != theirs[key].shape for key in own):
        odd = sorted(own.keys() ^ theirs.keys())
        odd = odd or [key for key in own if own[key].shape != theirs[key].shape]
        raise ModelError(
            f"{name} is not of the same base as {first.base_name}: {len(odd)} weights are missing "
            f"or of another shape, first {odd[0]}. Fix: merge encoders of one base and size."
        )
    if first.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise ModelError(
            f"{name} has another vocabulary than {first.base_name}, so the same row of their "
            "embeddings belongs to different tokens. Fix: merge encoders of one base."
        )
    for what in ("pooling_mode", "skip_instruction", "template", "compat"):
        ours, its = (getattr(encoder.settings, what) for encoder in (first, other))
        if ours != its:
            raise ModelError(
                f"{name} has {what} {its}, and {first.base_name} {ours}, so their vectors cannot "
                f"be compared. Fix: merge encoders that were trained with the same {what}."
            )
    kinds = [[type(module) for module in list(encoder)[2:]] for encoder in (first, other)]
    if kinds[0] != kinds[1]:
        raise ModelError(
            f"{name} has other modules after its pooling than {first.base_name}. "
            "Fix: merge encoders that have the same modules."
        )


def _check_origin(
    own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], ours: str, name: str
) -> None:
    """Refuse weights that are not nearly parallel, all matrices taken as one long vector.

    One-dimensional weights are not counted: those of norm layers are near 1 in every model.
    """
    dots, norms = 0.0, [0.0, 0.0]
    for key in _float_keys(own):
        if own[key].dim() > 1:
            a, b = own[key].float().flatten(), theirs[key].to(own[key].device).float().flatten()
            dots += float(a @ b)
            norms = [norms[0] + float(a @ a), norms[1] + float(b @ b)]
    cosine = dots / max(math.sqrt(norms[0] * norms[1]), 1e-30)
    if not cosine >= LEAST_COSINE:
        raise ModelError(
            f"{name} is not of the same base as {ours}: the cosine between their weights is "
            f"{cosine:.3f}, but for encoders of one base it is near 1. "
            "Fix: merge encoders of one base."
        )


def _take_prompts(first: TextEncoder, other: TextEncoder, name: str) -> None:
    """Add the prompts that the first encoder lacks; a warning names those that differ.

    Of two different prompts the first encoder's is kept, unless it is empty.
    """
    for key, prompt in other.prompts.items():
        kept = first.prompts.get(key)
        if not kept:
            first.prompts[key] = prompt
        elif prompt and kept != prompt:
            logger.warning("prompt '%s': %r is kept, not %r of %s.", key, kept, prompt, name)


def _slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation from ``a`` to ``b``, each taken as one long vector.

    Parallel and opposite tensors, which lie on no single great circle, are interpolated linearly.
    """
    cosine = float(cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if not _PARALLEL < angle < math.pi - _PARALLEL:
        return torch.lerp(a, b, share)
    parts = [math.sin((1 - share) * angle), math.sin(share * angle)]
    return (a * parts[0] + b * parts[1]) / math.sin(angle)
