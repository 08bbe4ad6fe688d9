"""Two numbers that tell a good contrastive space from a bad one, taken from the batch at hand.

(Wang and Isola, arXiv 2005.10242.) Texts that belong together should be close: alignment. All texts
together should be spread over the sphere: uniformity. Both fall as a space gets better; a falling
loss with a rising alignment says that it only spreads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


@torch.no_grad()
def alignment_and_uniformity(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Of two (B, D) batches of vectors whose rows belong together.

    Returns:
        ``alignment``: mean squared distance of the pairs, 0 to 4; ``uniformity``: log of the mean
        of exp(-2 d²) over the distances d within each batch, -8 to 0.
    """
    first, second = normalize(first.float(), dim=1), normalize(second.float(), dim=1)
    apart = torch.cat([torch.pdist(first), torch.pdist(second)])
    return {
        "alignment": (first - second).square().sum(dim=1).mean(),
        "uniformity": apart.square().mul(-2).exp().mean().log(),
    }
