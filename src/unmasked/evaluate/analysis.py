"""A look inside: how ready a decoder is for an open mask, and what shape its vectors have.

* Readiness: the cosine between the states of the same token with the mask closed and open, layer by
  layer (arXiv 2404.05961, section 5, where Mistral's stay alike and LLaMA's do not).
* Alignment and uniformity (Wang and Isola, ICML 2020, arXiv 2005.10242) of texts that belong
  together, and of all: lower is better in both.
* Anisotropy (Ethayarajh, EMNLP 2019, arXiv 1909.00512): the mean cosine of unlike texts, and the
  share of all variance that lies along one direction.

Without texts of the user's, the docstrings of this Python serve: a first sentence belongs to the
rest. Cost: two loads of the model and one forward of `TEXTS` texts with each.

Shapes: N texts, T tokens, L layers and the embedding, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unmasked.errors import DataError, ModelError
from unmasked.evaluate.scorer import encode_by_role
from unmasked.evaluate.tasks.files import load_task
from unmasked.evaluate.tasks.kinds import alike
from unmasked.evaluate.tasks.vectors import encoded, norms
from unmasked.files import docstrings

TEXTS = 256  # pairs that are looked at
READ = 32  # texts whose layers are looked at
_DOCSTRINGS = 4000


@dataclass(frozen=True)
class Shape:
    """What shape the vectors of texts have.

    Attributes:
        alignment: mean squared distance of unit vectors that belong together.
        uniformity: log of the mean of exp(-2 squared distance) over all others.
        mean_cosine: of texts that do not belong together.
        first_direction: share of the variance along the first principal component.
    """

    alignment: float
    uniformity: float
    mean_cosine: float
    first_direction: float


@dataclass(frozen=True)
class Analysis:
    """What was seen.

    Attributes:
        model: which.
        layers: mean cosine of states with the mask closed and open, the embedding first; None for
            a model that has no closed mask any more.
        spread: the 10th and 90th percentile beside each.
        shapes: of the vectors, "causal" and "bidirectional".
        pairs: how many pairs of texts were looked at.
    """

    model: str
    layers: list[float] | None
    spread: list[tuple[float, float]] | None
    shapes: dict[str, Shape]
    pairs: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def analyse(model: str, task: str | Path | None = None) -> Analysis:
    """Look inside a model.

    Args:
        model: hub name, folder or ``nano``.
        task: a file or folder of texts that belong together: STS, pairs, reranking, retrieval. By
            default the docstrings of this Python.

    Raises:
        DataError: the task has no texts that belong together.
        ModelError: the model cannot be loaded.
    """
    from unmasked.compat.llm2vec import LLM2Vec

    pairs = _task_pairs(task) if task else _docstring_pairs()
    opened = LLM2Vec.from_pretrained(model, allow_partial=True)
    try:
        closed = LLM2Vec.from_pretrained(model, enable_bidirectional=False)
    except ModelError:
        closed = opened
    shapes = {}
    layers = spread = None
    if closed.report.verdict == "impossible":  # its mask is really closed
        texts = [text for pair in pairs for text in pair][:READ]
        cosines = np.concatenate([_compare(closed, opened, text) for text in texts], axis=1)
        layers = [float(value) for value in cosines.mean(axis=1)]
        low, high = np.quantile(cosines, (0.1, 0.9), axis=1)
        spread = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
        shapes["causal"] = _shape(closed, pairs)
    shapes["bidirectional"] = _shape(opened, pairs)
    return Analysis(model, layers, spread, shapes, len(pairs))


def draw(analysis: Analysis, folder: Path) -> list[Path]:
    """The small figures, as PNG and SVG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    from unmasked.evaluate.report import figures

    drawn = {"shape": figures.bars_figure({k: asdict(s) for k, s in analysis.shapes.items()})}
    if analysis.layers is not None and analysis.spread is not None:
        drawn["layers"] = figures.layers_figure(analysis.layers, analysis.spread)
    for name, figure in drawn.items():
        figures.save_figure(figure, folder, name)
    return sorted(folder / f"{name}{suffix}" for name in drawn for suffix in (".png", ".svg"))


def measure_shape(first: np.ndarray, second: np.ndarray) -> Shape:
    """The shape of vectors.

    Args:
        first: (N, D).
        second: (N, D), each belongs to the same row of `first`.
    """
    x, y = (v / norms(v)[:, None] for v in (first, second))
    both = np.concatenate([x, y])
    cosines = both @ both.T
    count = len(x)
    other = ~np.eye(2 * count, dtype=bool)
    other[np.arange(count), count + np.arange(count)] = False
    other[count + np.arange(count), np.arange(count)] = False
    values = np.linalg.svd(both - both.mean(axis=0), compute_uv=False) ** 2
    return Shape(
        alignment=float(((x - y) ** 2).sum(axis=1).mean()),
        uniformity=float(np.log(np.exp(-2 * (2 - 2 * cosines[other])).mean())),
        mean_cosine=float(cosines[other].mean()),
        first_direction=float(values[0] / max(values.sum(), np.finfo(float).tiny)),
    )


def _shape(model: Any, pairs: Sequence[tuple[str, str]]) -> Shape:
    encode = encode_by_role(model)
    first, second = (encoded(encode, side).astype(np.float64) for side in zip(*pairs, strict=True))
    return measure_shape(first, second)


def _compare(closed: Any, opened: Any, text: str) -> np.ndarray:
    """Cosines (L + 1, T) of one text's states in two models."""
    import torch

    states = []
    for model in (closed, opened):
        features = model.preprocess([text])
        with torch.inference_mode():
            out = model.backbone.auto_model(
                input_ids=features["input_ids"].to(model.device),
                attention_mask=features["attention_mask"].to(model.device),
                output_hidden_states=True,
                use_cache=False,
            )
        states.append(torch.cat([layer.float() for layer in out.hidden_states]))  # (L + 1, T, D)
    first, second = states
    return np.asarray(torch.nn.functional.cosine_similarity(first, second, dim=-1).cpu())


def _docstring_pairs() -> list[tuple[str, str]]:
    found = docstrings.pairs(docstrings.collect(limit=_DOCSTRINGS))
    return _some([(doc.summary, doc.body) for doc in found])


def _task_pairs(path: str | Path) -> list[tuple[str, str]]:
    task = load_task(path)
    found = [(a, b) for a, b in alike(task) if a != b]
    if len(found) < 2:
        raise DataError(
            f"{path}: no texts that belong together in a task of {task.kind}. "
            "Fix: give scored pairs (STS), labelled pairs, reranking or retrieval."
        )
    return _some(found)


def _some(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    order = np.random.default_rng(0).permutation(len(pairs))[:TEXTS]
    return [pairs[i] for i in order]
