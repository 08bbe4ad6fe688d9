"""A look inside a model: how ready it is for an open mask, and how its vectors are distributed.

* Readiness: the cosine between the states of the same token with the mask closed and open, layer by
  layer (arXiv 2404.05961, section 5: Mistral's states change little, LLaMA's change much).
* Alignment of texts that belong together, and uniformity of all texts (Wang and Isola, ICML 2020,
  arXiv 2005.10242): lower is better for both.
* Anisotropy (Ethayarajh, EMNLP 2019, arXiv 1909.00512): the mean cosine of texts that do not belong
  together, and the share of the variance along the first principal component.

Without texts from the user, the docstrings of this Python are used: a first sentence belongs to the
rest. Cost: the model is loaded twice, and each encodes `TEXTS` pairs. Shapes: N pairs, T tokens, L
layers, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmasked.compat.llm2vec import LLM2Vec
from unmasked.errors import DataError, ModelError
from unmasked.evaluate.scorer import encode_by_role
from unmasked.evaluate.tasks.kinds import alike
from unmasked.evaluate.tasks.task_files import load_task
from unmasked.evaluate.tasks.task_vectors import encoded
from unmasked.files import docstrings
from unmasked.forward.geometry import alignment_and_uniformity
from unmasked.model import TextEncoder

TEXTS = 256  # pairs whose vectors are measured
READ = 32  # texts whose states are compared, layer by layer
_DOCSTRINGS = 4000  # docstrings that are read, of which pairs are drawn


@dataclass(frozen=True)
class VectorShape:
    """How the vectors of texts are distributed."""

    alignment: float  # mean squared distance of unit vectors that belong together
    uniformity: float  # log of the mean of exp(-2 squared distance) over all others
    mean_cosine: float  # of texts that do not belong together
    first_direction: float  # share of the variance along the first principal component


@dataclass(frozen=True)
class Analysis:
    """The results of an analysis; `layers` and `spread` are None if there is no causal mask."""

    model: str
    layers: list[float] | None  # mean cosine of states, mask closed and open; embedding first
    spread: list[tuple[float, float]] | None  # the 10th and 90th percentile of the same cosines
    shapes: dict[str, VectorShape]  # "causal" and "bidirectional"
    pairs: int  # how many pairs of texts were encoded

    def as_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return asdict(self)


def analyse(model: str, task: str | Path | None = None) -> Analysis:
    """Analyse a model with its mask closed and open.

    Args:
        task: a file or folder of texts that belong together: STS, pairs, reranking or retrieval.
            None uses the docstrings of this Python.

    Raises:
        DataError: the task has no texts that belong together.
        ModelError: the model cannot be loaded.
    """
    pairs = _pairs(task)
    pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))[:TEXTS]]
    opened = LLM2Vec.from_pretrained(model, enable_bidirectional=True, allow_partial=True)
    try:
        closed = LLM2Vec.from_pretrained(model, enable_bidirectional=False)
    except ModelError:  # the mask cannot be closed again
        closed = opened
    layers, spread, shapes = None, None, {}
    if closed.report.verdict == "impossible":  # the proof finds the mask closed
        texts = [text for pair in pairs for text in pair][:READ]
        cosines = np.concatenate([compare_states(closed, opened, text) for text in texts], axis=1)
        layers = cosines.mean(axis=1).tolist()
        spread = [(low, high) for low, high in np.quantile(cosines, (0.1, 0.9), axis=1).T.tolist()]
        shapes["causal"] = _shape(closed, pairs)
    shapes["bidirectional"] = _shape(opened, pairs)
    return Analysis(model, layers, spread, shapes, len(pairs))


def draw(analysis: Analysis, folder: Path) -> list[Path]:
    """Draw the figures, as PNG and SVG; returns the files.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    from unmasked.evaluate.report import figures

    names = ["shape"]
    with figures.style():
        shapes = {name: asdict(shape) for name, shape in analysis.shapes.items()}
        figures.save_figure(folder, "shape", figures.bars(shapes))
        if analysis.layers and analysis.spread:
            figures.save_figure(folder, "layers", figures.layers(analysis.layers, analysis.spread))
            names.append("layers")
    return sorted(folder / f"{name}{suffix}" for name in names for suffix in (".png", ".svg"))


def measure_shape(first: np.ndarray, second: np.ndarray) -> VectorShape:
    """How the vectors (N, D) of two lists are distributed; those of one row belong together."""
    x, y = (torch.as_tensor(v, dtype=torch.float64) for v in (first, second))
    found = alignment_and_uniformity(x, y, all_texts=True)
    x, y = (torch.nn.functional.normalize(v, dim=1) for v in (x, y))
    both, count = torch.cat([x, y]), 2 * len(x)  # (2N, D)
    # The sum of all cosines (the squared length of the sum of all vectors), without those of each
    # text with itself and with its partner.
    cosines = both.sum(dim=0).square().sum() - both.square().sum() - 2 * (x * y).sum()
    mean = cosines.item() / (count * (count - 2))
    values = torch.linalg.svdvals(both - both.mean(dim=0)).square()
    share = (values / values.sum().clamp(min=1e-300))[0].item()
    return VectorShape(found["alignment"].item(), found["uniformity"].item(), mean, share)


def compare_states(closed: TextEncoder, opened: TextEncoder, text: str) -> np.ndarray:
    """Cosines (L + 1, T) of the states of one text in two models."""
    states = []
    for model in (closed, opened):
        features = model.preprocess([text])
        ids = {key: features[key].to(model.device) for key in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            out = model.backbone.auto_model(**ids, output_hidden_states=True, use_cache=False)
        states.append(torch.cat([layer.float() for layer in out.hidden_states]))  # (L + 1, T, D)
    return torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1).cpu().numpy()


def _shape(model: TextEncoder, pairs: Sequence[tuple[str, str]]) -> VectorShape:
    encode = encode_by_role(model)
    return measure_shape(*(encoded(encode, side) for side in zip(*pairs, strict=True)))


def _pairs(path: str | Path | None) -> list[tuple[str, str]]:
    """Pairs of texts that belong together, from a task or from docstrings."""
    if path is None:
        found = docstrings.pairs(docstrings.collect(limit=_DOCSTRINGS))
        return [(doc.summary, doc.body) for doc in found]
    task = load_task(path)
    pairs = [(a, b) for a, b in alike(task) if a != b]
    if len(pairs) < 2:
        raise DataError(
            f"{path}: no texts that belong together in a task of {task.kind}. "
            "Fix: give scored pairs (STS), labelled pairs, reranking or retrieval."
        )
    return pairs
