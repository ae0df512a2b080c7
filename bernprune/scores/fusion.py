"""Several metrics in one: what they think of a unit's rank among the layer's units of its kind, averaged.

Weights are equal, or of a few mixtures those that leave the least loss when their worst units are masked.

Letters: M metrics, U units, K candidate weights, W windows.
"""

import math
from dataclasses import replace

import torch

from bernprune.objective import masked_objective
from bernprune.scores.base import PARTS, Context, Metric, Options, checked_scores
from bernprune.scores.cfsp import CFSP
from bernprune.scores.flap import FLAP
from bernprune.scores.goa import GOA_MOMENT
from bernprune.scores.stream import without_worst
from bernprune.scores.wanda_sp import WANDA_SP
from bernprune.seeding import generator
from bernprune.units import UnitSpace

MEMBERS = (WANDA_SP, FLAP, GOA_MOMENT, CFSP)
_TRIED = 24  # mixtures: each metric alone, all alike, and others
_EVERY = 4  # they are tried on every fourth window


def members_of(options: Options) -> tuple[Metric, ...]:
    """The metrics that are fused."""
    return options.members or MEMBERS


def group_ranks(space: UnitSpace, scores_U: torch.Tensor) -> torch.Tensor:
    """Rank of each unit among those of its group, from above 0 to below 1, float64 ``[U]``."""
    ranks_U = torch.zeros_like(scores_U, dtype=torch.float64)
    for group, units in zip(space.groups, space.spans, strict=True):
        ranks_U[units] = (scores_U[units].argsort(stable=True).argsort(stable=True).double() + 0.5) / group.count
    return ranks_U


def ranks_of_members(context: Context) -> torch.Tensor:
    """Ranks by each metric, ``[M, U]``."""
    members = members_of(context.options)
    return torch.stack([group_ranks(context.view.space, checked_scores(metric, context)) for metric in members])


def _rank_average(context: Context) -> torch.Tensor:
    return ranks_of_members(context).mean(0)


def _learned(context: Context) -> torch.Tensor:
    space = context.view.space
    ranks_MU = ranks_of_members(context)
    members = members_of(context.options)
    drawn, alone = _drawn(len(members)), torch.eye(len(members), dtype=torch.float64)
    uniform = torch.rand(drawn, len(members), generator=generator(context.seed, "fused"), dtype=torch.float64)
    flat = -(1 - uniform).log()  # of a flat Dirichlet distribution
    weights_KM = torch.cat([alone, torch.ones_like(alone[:1]), flat])
    weights_KM /= weights_KM.sum(1, keepdim=True)
    mixed_KU = weights_KM @ ranks_MU
    masks_KU = torch.stack([without_worst(space, mixed_U, context.options.sparsity) for mixed_U in mixed_KU])
    with masked_objective(context.view, context.ops, rows_per_forward=context.rows_per_forward) as objective:
        losses_K = objective.losses(masks_KU, context.windows_WT[::_EVERY])
    best = int(losses_K.nan_to_num(nan=math.inf).argmin())
    for metric, weight in zip(members, weights_KM[best], strict=True):
        context.notes[f"weight of {metric.name}"] = float(weight)
    return mixed_KU[best]


def _drawn(members: int) -> int:
    """How many mixtures are drawn."""
    return max(1, _TRIED - members - 1)


def _passes(layers: int, options: Options) -> float:
    """Those of all members; that inputs of pruned layers cost more is counted for the whole."""
    dense = replace(options, pruned_inputs=False)
    return sum(metric.forwards(layers, dense) for metric in members_of(options))


def _passes_and_tries(layers: int, options: Options) -> float:
    members = len(members_of(options))
    return _passes(layers, options) + (_drawn(members) + members + 1) / _EVERY


RANK_AVERAGE = Metric(
    "rank-average",
    f"mean rank by {', '.join(metric.name for metric in MEMBERS)}, or by initial.members",
    "folklore",
    _rank_average,
    kinds=PARTS,
    passes=_passes,
    reads=("members",),
    layerwise=True,
)
FUSED = Metric(
    "fused",
    "the same, with weights that a few masked forward passes choose",
    "after Liu et al., 2024",
    _learned,
    kinds=PARTS,
    passes=_passes_and_tries,
    reads=("sparsity", "members"),
    layerwise=True,
)
