"""Alignment and uniformity: how close the vectors of pairs are, and how evenly all are spread.

The training log and `analyse` both use this function. Cost: one matrix product of the vectors with
each other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def alignment_and_uniformity(
    first: Tensor, second: Tensor, all_texts: bool = False
) -> dict[str, Tensor]:
    """Alignment and uniformity of pairs (Wang and Isola, arXiv 2005.10242); lower is better.

    Alignment is the mean squared distance between the unit vectors of a pair. Uniformity is the
    logarithm of the mean Gaussian potential, exp(-2 squared distance), of texts of different pairs.

    Args:
        first, second: (B, D) vectors of the pairs, B at least 2.
        all_texts: measure the uniformity of all 2B texts, not of the first of each pair alone.
    """
    wide = torch.promote_types(first.dtype, torch.float32)
    first, second = (nn.functional.normalize(v.to(wide), dim=1) for v in (first, second))
    texts = torch.cat([first, second]) if all_texts else first
    pair = torch.arange(len(texts), device=texts.device) % len(first)
    distances = (2 - 2 * texts @ texts.T).clamp(min=0)  # squared; (B, B), or (2B, 2B)
    different = pair[:, None] != pair
    return {
        "alignment": (first - second).square().sum(dim=1).mean(),
        "uniformity": (-2 * distances[different]).exp().mean().log(),
    }
