"""Wanda-sp: weight magnitude times input norm, column by column (Sun et al., 2023, arXiv 2306.11695; structured form
as in An et al., 2023, arXiv 2312.11983). Published with the inputs of pruned layers; see ``Options.pruned_inputs``."""

import torch

from bernprune.scores.base import Metric
from bernprune.scores.stream import Projection, by_column


def wanda_sp(projection: Projection) -> torch.Tensor:
    """mean_i |W_ij| * sqrt(E[x_j^2]), ``[E]``."""
    return projection.weight_DE.abs().mean(0).double() * projection.inputs.second_moment_E.sqrt()


WANDA_SP = Metric(
    "wanda-sp",
    "mean size of the weights that read a unit, times the norm of what they read",
    "Sun et al., 2023; An et al., 2023",
    by_column(wanda_sp),
    layerwise=True,
)
