"""FLAP: how much an input fluctuates around its mean, weighted by what reads it (An et al., 2023, arXiv 2312.11983,
metric WIFV). Standardised within each projection, so that scores compare across layers and kinds."""

import torch

from bernprune.scores.base import Projection


def flap(projection: Projection) -> torch.Tensor:
    """Standardised Var[x_j] * sum_i W_ij^2, ``[E]``; squared before standardising at the attention output."""
    scores_E = projection.inputs.variance_E * projection.weight_DE.double().square().sum(0)
    if projection.kind == "kv_group":
        scores_E = scores_E.square()
    return (scores_E - scores_E.mean()) / scores_E.std().clamp(min=1e-300)
