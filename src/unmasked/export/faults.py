"""Finds out why another program's vectors differ, by making the usual mistakes.

A `Reading` is a way to turn a text into a vector, right or wrong: mask closed, BOS or the
instruction pooled, the last token pooled, a text cut short, padding attended to, lower precision.
`explain_difference` starts from the right reading. In each step it adopts the mistake that brings
our vectors nearest to theirs, and in the end it drops mistakes that are not needed (greedy
search). Only the other program's vectors are known, nothing else of it.

Cost: a forward pass over each text for each mistake that changes the states (mask, ids, precision,
padding), and a copy of the model with its mask closed; pooling costs almost nothing.

Shapes: N texts, T tokens of a text, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unmasked.checkpoint import loading
from unmasked.checkpoint.weights import load_model
from unmasked.export.parity import cosines
from unmasked.forward.backbone import Backbone
from unmasked.forward.pooling import STOCK_MODES, after_pooling, pool
from unmasked.mask.opening import NATIVE_KEY
from unmasked.model import TextEncoder
from unmasked.text.tokens import TokenRow

BETTER = 0.75  # a mistake is adopted if at most this share of the difference remains with it
CUTS = (8, 16, 32, 64, 77, 128, 256, 384, 512, 1024, 2048, 4096)
"""Lengths in tokens at which programs commonly cut an input."""
NOISE = 2e-6  # differences (1 - cosine) below this come from other kernels and are no mistake


@dataclass(frozen=True)
class Reading:
    """One way from a text to a vector; the defaults are the right one."""

    closed: bool = False  # the causal mask is on
    pooled: str = "text"
    """``text``, or what is pooled with it: ``BOS``, ``instruction`` or ``everything``."""
    mode: str = ""  # the pooling mode; empty for the folder's own
    ids: str = "ours"  # ``ours``; ``without BOS``; ``with EOS`` at the end
    cut: int = 0  # tokens after which an input is cut; 0 for where the folder cuts
    padding: str = ""
    """``left`` or ``right`` if the padding on that side is attended to, else empty."""
    dtype: str = ""  # the number type; empty for the reference's own


RIGHT = Reading()

WORDS = {
    "closed": "the causal mask is on: every token attends only to the tokens on its left",
    "BOS": "BOS is pooled with the text",
    "instruction": "the instruction is pooled with the text",
    "everything": "BOS and the instruction are pooled with the text",
    "without BOS": "BOS is not put before the text",
    "with EOS": "EOS is put after the text",
    "cut": "texts are cut after {cut} tokens",
    "left": "left padding takes part in attention",
    "right": "right padding takes part in attention",
    "mode": "pooled by {mode} instead of {own}",
    "dtype": "computed in {dtype}",
}


@dataclass(frozen=True)
class Explanation:
    """What explains a difference."""

    reading: Reading  # the reading whose vectors are nearest to the other program's
    faults: tuple[str, ...]  # its mistakes in words; empty if none was found
    least: float  # the minimum cosine between the other program's vectors and those of `reading`

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        mistakes = {k: v for k, v in asdict(self.reading).items() if v != getattr(RIGHT, k)}
        return {
            "faults": list(self.faults),
            "reading": mistakes,
            "least_cosine_with_it": self.least,
        }


class Reader:
    """Computes the vectors of inputs in right and wrong readings, with one encoder.

    Args:
        folder: the folder or hub name that it was loaded from, for a copy with the mask closed.
        inputs: N ``[instruction, text]`` pairs.
    """

    def __init__(self, encoder: TextEncoder, folder: str, inputs: Sequence[Any]) -> None:
        self.encoder = encoder
        self.own = encoder.settings.pooling_mode
        self._folder = folder
        self._behind = nn.ModuleList(copy.deepcopy(list(encoder)[2:])).cpu().float().eval()
        self.rows = encoder.backbone.tokenize_inputs(inputs)  # in the right reading
        self._models: dict[tuple[bool, str], Backbone] = {}
        self._states: dict[Any, Tensor] = {}

    @torch.inference_mode()
    def vectors(self, reading: Reading) -> np.ndarray:
        """(N, D) vectors of all inputs in this reading."""
        rows = [self._read(row, reading) for row in self.rows]
        longest = max(len(row.ids) for row in rows) if reading.padding else 0
        found = []
        for row in rows:
            states = self._states_of(row.ids, reading, longest)  # (T, D)
            mask = torch.zeros(len(row.ids), dtype=torch.bool)
            mask[self._pooled(row, reading)] = True
            if not mask.any():
                mask[:] = True
            positions = torch.arange(len(row.ids))
            only = torch.zeros_like(positions)  # every token belongs to the only text, number 0
            mode = reading.mode or self.own
            pooled = pool(states, only, positions, mask, 1, mode).float()
            found.append(after_pooling(self._behind, pooled)[0])
        return torch.stack(found).numpy()

    def _read(self, row: TokenRow, reading: Reading) -> TokenRow:
        """The row as this reading cuts it, without BOS or with EOS."""
        tokens = self.encoder.backbone.tokens
        ids, start, stop = row.ids, row.start, row.stop
        if reading.cut and len(ids) > reading.cut:
            ids, stop = ids[: reading.cut], min(stop, reading.cut)
        before = len(tokens.prefix)
        if reading.ids == "without BOS" and len(ids) > before:
            ids, start, stop = ids[before:], max(start - before, 0), stop - before
        eos = tokens.tokenizer.eos_token_id
        if reading.ids == "with EOS" and eos is not None:
            ids, stop = [*ids, eos], stop + 1
        return TokenRow(list(ids), start, stop)

    def _pooled(self, row: TokenRow, reading: Reading) -> list[int]:
        """The positions that are pooled in this reading, in ascending order."""
        before = 0 if reading.ids == "without BOS" else len(self.encoder.backbone.tokens.prefix)
        text = [*range(row.start, row.stop)]
        added: dict[str, Sequence[int]] = {
            "text": [],
            "BOS": range(before),
            "instruction": range(before, row.start),
            "everything": range(len(row.ids)),
        }
        return sorted({at for at in (*text, *added[reading.pooled]) if at < len(row.ids)})

    @torch.inference_mode()
    def _states_of(self, ids: list[int], reading: Reading, padded_to: int) -> Tensor:
        """(T, D) states of one input, computed with padding up to `padded_to` tokens; cached."""
        pads = max(padded_to - len(ids), 0)
        key = (reading.closed, reading.dtype, reading.padding if pads else "", pads, tuple(ids))
        if key not in self._states:
            backbone = self._model(reading.closed, reading.dtype)
            pad = int(backbone.tokenizer.pad_token_id)
            first = pads if reading.padding == "left" else 0
            padded = [pad] * first + ids + [pad] * (pads - first)
            features = backbone.collate([TokenRow(padded, 0, len(padded))])  # all are attended to
            device = next(backbone.parameters()).device
            features = {name: value.to(device) for name, value in features.items()}
            states = backbone(features)["packed_states"]
            self._states[key] = states[first : first + len(ids)].float().cpu()
        return self._states[key]

    def _model(self, closed: bool, dtype: str) -> Backbone:
        """The backbone, with its mask closed or in another number type; each is made once."""
        if (closed, dtype) not in self._models:
            own = self.encoder.backbone
            if dtype:
                made = copy.deepcopy(self._model(closed, "")).to(getattr(torch, dtype))
            elif closed:
                model = closed_copy(self._folder, next(own.parameters()).dtype)
                made = Backbone(model.to(self.encoder.device), own.tokens, "the mask is closed")
            else:
                made = own
            self._models[closed, dtype] = made.eval()
        return self._models[closed, dtype]


def closed_copy(folder: str, dtype: torch.dtype) -> Any:
    """The transformer of a saved folder with its causal mask on, whatever its config says."""
    found = loading.find(folder)
    config = copy.deepcopy(found.config)
    for part in (config, config.get_text_config()):
        part.is_causal = True
        if getattr(part, NATIVE_KEY, None):
            setattr(part, NATIVE_KEY, False)
    model, _ = load_model(found.trunk, config, dtype, None)
    return model.eval()


def explain_difference(
    reader: Reader, theirs: np.ndarray, batched: np.ndarray | None = None
) -> Explanation:
    """Find the mistakes that bring our vectors nearest to the other program's.

    Args:
        theirs: (N, D) vectors of the other program, each text in a request of its own.
        batched: (N, D) its vectors of all texts in one request, if they differ from `theirs`.
    """

    def all_cosines(reading: Reading) -> np.ndarray:
        alone = cosines(reader.vectors(replace(reading, padding="")), theirs)
        if batched is None:
            return alone
        return np.concatenate([alone, cosines(reader.vectors(reading), batched)])

    def distance(reading: Reading) -> float:
        # A geometric mean. If the program makes two mistakes, one of them alone may explain some
        # texts fully and others not at all; that must count for more than a small improvement of
        # all texts.
        return float(np.exp(np.log(1 - all_cosines(reading) + NOISE).mean()))

    best, least = RIGHT, distance(RIGHT)
    for _ in range(4):
        tried = {reading: distance(reading) for reading in _neighbours(best, reader, batched)}
        nearest = min(tried, key=lambda reading: (round(tried[reading], 7), _mistakes(reading)))
        if tried[nearest] > BETTER * least:
            break
        best, least = nearest, tried[nearest]
    for field in fields(Reading):  # drop mistakes that are not needed
        simpler = replace(best, **{field.name: getattr(RIGHT, field.name)})
        if simpler != best and distance(simpler) <= 1.1 * least:
            best = simpler
    return Explanation(best, _said(best, reader.own), float(all_cosines(best).min()))


def _neighbours(now: Reading, reader: Reader, batched: np.ndarray | None) -> Iterable[Reading]:
    """The readings to try next: every combination of mask and pooling, or one other mistake."""
    modes = ["", *(mode for mode in STOCK_MODES if mode not in ("eos_token", reader.own))]
    for closed, pooled, mode in product(
        (False, True), ("text", "BOS", "instruction", "everything"), modes
    ):
        yield replace(now, closed=closed, pooled=pooled, mode=mode)
    yield from (replace(now, ids=ids) for ids in ("without BOS", "with EOS"))
    longest = max(len(row.ids) for row in reader.rows)
    yield from (replace(now, cut=cut) for cut in CUTS if cut < longest)
    yield from (replace(now, dtype=dtype) for dtype in ("bfloat16", "float16"))
    if batched is not None:
        yield from (replace(now, padding=side) for side in ("left", "right"))


def _mistakes(reading: Reading) -> int:
    """The number of mistakes in a reading."""
    return sum(
        getattr(reading, field.name) != getattr(RIGHT, field.name) for field in fields(reading)
    )


def _said(reading: Reading, own: str) -> tuple[str, ...]:
    """The mistakes of a reading in words."""
    keys = [
        "closed" if reading.closed else "",
        reading.pooled,
        "mode" if reading.mode else "",
        reading.ids,
        "cut" if reading.cut else "",
        reading.padding,
        "dtype" if reading.dtype else "",
    ]
    values = asdict(reading) | {"own": own}
    return tuple(WORDS[key].format(**values) for key in keys if key in WORDS)
