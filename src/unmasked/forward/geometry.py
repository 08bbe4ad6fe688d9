"""Two measures of where vectors lie on the sphere: alignment and uniformity.

Wang and Isola, ICML 2020, arXiv 2005.10242; lower is better for both. Training logs them for every
step, evaluation for a model as a whole. Cost: one product of all vectors with each other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def alignment_and_uniformity(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Mean distance within pairs, and how evenly the first vectors are spread.

    Args:
        first, second: (B, D) vectors of B pairs, B at least 2, of any length above zero.

    Returns:
        ``alignment``, the mean squared distance of the two unit vectors of a pair, and
        ``uniformity``, the logarithm of the mean of exp(-2 squared distance) over all pairs of
        different first vectors; both scalars.
    """
    first, second = (nn.functional.normalize(v.float(), dim=1) for v in (first, second))
    between = (2 - 2 * first @ first.T).clamp(min=0)  # (B, B) squared distances
    others = ~torch.eye(len(first), dtype=torch.bool, device=first.device)
    return {
        "alignment": (first - second).square().sum(dim=1).mean(),
        "uniformity": (-2 * between[others]).exp().mean().log(),
    }
