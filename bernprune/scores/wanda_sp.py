"""Wanda-sp: weight magnitude times input norm, column by column (Sun et al., 2023, arXiv 2306.11695; structured form
as in An et al., 2023, arXiv 2312.11983)."""

import torch

from bernprune.scores.base import Projection


def wanda_sp(projection: Projection) -> torch.Tensor:
    """mean_i |W_ij| * sqrt(E[x_j^2]), ``[E]``."""
    return projection.weight_DE.abs().mean(0).double() * projection.inputs.second_moment_E.sqrt()
