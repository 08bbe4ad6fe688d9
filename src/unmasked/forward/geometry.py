"""How the vectors of pairs of texts lie: near each other, and spread over the sphere.

The one place that measures it, for training's log and for `analyse`. Cost: one matrix product of
the vectors with each other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def alignment_and_uniformity(
    first: Tensor, second: Tensor, all_texts: bool = False
) -> dict[str, Tensor]:
    """How near the two of a pair are, and how evenly texts spread; lower is better for both.

    Mean squared distance of the unit vectors of a pair, and the logarithm of the mean Gaussian
    potential, exp(-2 squared distance), of texts of different pairs (Wang and Isola, arXiv
    2005.10242).

    Args:
        first, second: (B, D) vectors of the pairs, B at least 2.
        all_texts: measure the spread of all 2B texts, and not of the first ones alone.
    """
    wide = torch.promote_types(first.dtype, torch.float32)
    first, second = (nn.functional.normalize(v.to(wide), dim=1) for v in (first, second))
    texts = torch.cat([first, second]) if all_texts else first
    pair = torch.arange(len(texts), device=texts.device) % len(first)
    between = (2 - 2 * texts @ texts.T).clamp(min=0)  # (B, B), or (2B, 2B)
    others = pair[:, None] != pair
    return {
        "alignment": (first - second).square().sum(dim=1).mean(),
        "uniformity": (-2 * between[others]).exp().mean().log(),
    }
