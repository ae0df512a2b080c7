"""Several metrics in one: what they think of a unit's rank among the layer's units of its kind, averaged.

Weights are equal, or of a few mixtures those that leave the least loss when their worst units are masked.

Letters: M metrics, U units, K candidate weights, W windows.
"""

import math

import torch

from bernprune.objective import masked_objective
from bernprune.scores.base import PARTS, Context, Metric
from bernprune.scores.cfsp import CFSP
from bernprune.scores.flap import FLAP
from bernprune.scores.goa import GOA_MOMENT
from bernprune.scores.stream import without_worst
from bernprune.scores.wanda_sp import WANDA_SP
from bernprune.seeding import generator
from bernprune.units import UnitSpace

MEMBERS = (WANDA_SP, FLAP, GOA_MOMENT, CFSP)
_DRAWN = 24 - len(MEMBERS) - 1  # mixtures that are tried besides each metric alone and all alike
_EVERY = 4  # they are tried on every fourth window


def ranks(space: UnitSpace, scores_U: torch.Tensor) -> torch.Tensor:
    """Rank of each unit among those of its group, from above 0 to below 1, float64 ``[U]``."""
    ranks_U = torch.zeros_like(scores_U, dtype=torch.float64)
    for group, units in zip(space.groups, space.spans, strict=True):
        ranks_U[units] = (scores_U[units].argsort(stable=True).argsort(stable=True).double() + 0.5) / group.count
    return ranks_U


def ranks_of_members(context: Context) -> torch.Tensor:
    """Ranks by each metric, ``[M, U]``."""
    return torch.stack([ranks(context.view.space, metric.run(context)) for metric in MEMBERS])


def _rank_average(context: Context) -> torch.Tensor:
    return ranks_of_members(context).mean(0)


def _learned(context: Context) -> torch.Tensor:
    space, ranks_MU = context.view.space, ranks_of_members(context)
    uniform = torch.rand(_DRAWN, len(MEMBERS), generator=generator(context.seed, "fused"), dtype=torch.float64)
    drawn = -(1 - uniform).log()  # of a flat Dirichlet distribution
    alone = torch.eye(len(MEMBERS), dtype=torch.float64)
    weights_KM = torch.cat([alone, torch.ones_like(alone[:1]), drawn])
    mixed_KU = (weights_KM / weights_KM.sum(1, keepdim=True)) @ ranks_MU
    masks_KU = torch.stack([without_worst(space, mixed_U, context.options.sparsity) for mixed_U in mixed_KU])
    with masked_objective(context.view, context.ops, rows_per_forward=context.rows_per_forward) as objective:
        losses_K = objective.losses(masks_KU, context.windows_WT[::_EVERY])
    best = int(losses_K.nan_to_num(nan=math.inf).argmin())
    for metric, weight in zip(MEMBERS, weights_KM[best] / weights_KM[best].sum(), strict=True):
        context.notes[f"weight of {metric.name}"] = float(weight)
    return mixed_KU[best]


RANK_AVERAGE = Metric(
    "rank-average",
    f"mean rank by {', '.join(metric.name for metric in MEMBERS)}",
    "folklore",
    _rank_average,
    kinds=PARTS,
    passes=lambda layers, options: float(len(MEMBERS)),
    layerwise=True,
)
FUSED = Metric(
    "fused",
    "the same, with weights that a few masked forward passes choose",
    "after Liu et al., 2024",
    _learned,
    kinds=PARTS,
    passes=lambda layers, options: len(MEMBERS) + (_DRAWN + len(MEMBERS) + 1) / _EVERY,
    reads=("sparsity",),
    layerwise=True,
)
