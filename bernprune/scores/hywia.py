"""HyWIA: coarse and fine estimates of a unit's importance, fused by an attention over the two (Liu et al., 2024, arXiv
2403.10799). Fine is the sum over its weights of |w g - 1/2 w^2 g^2|, coarse the size of the sum of w g.

The exact attention is not released. Here it is a softmax over the two, each in units of its mean over the layer's units
of the kind, of the same: where one of them says that a unit stands out, that one is heard. Units of the fine estimate
give the layer its scale.

Letters: N units of a kind in a layer.
"""

import torch

from bernprune.scores.base import Metric
from bernprune.scores.stream import of_units
from bernprune.scores.taylor import WeightGradient, by_gradients


def fused(fine_N: torch.Tensor, coarse_N: torch.Tensor) -> torch.Tensor:
    """a fine + (1 - a) coarse, both over their means, with a the softmax of these; times the mean of fine, ``[N]``."""
    pair_2N = torch.stack([fine_N, coarse_N])
    pair_2N = pair_2N / pair_2N.mean(1, keepdim=True).clamp(min=torch.finfo(pair_2N.dtype).tiny)
    return (pair_2N.softmax(0) * pair_2N).sum(0) * fine_N.mean()


def _estimate(found: list[WeightGradient], count: int) -> torch.Tensor:
    first = [each.weight_OI * each.grad_OI for each in found]
    fine_N = of_units([(first_OI - 0.5 * first_OI.square()).abs().sum(1) for first_OI in first], count)
    coarse_N = of_units([first_OI.sum(1) for first_OI in first], count).abs()
    return fused(fine_N, coarse_N)


HYWIA = Metric(
    "hywia",
    "Taylor estimates of weights and of whole units, fused by how much they stand out",
    "Liu et al., 2024",
    by_gradients(_estimate),
    allocation="pooled",
    gradients=True,
    cost_power=1.0,
)
