"""GOA, greedy output approximation: channels by their second moment, heads by how alike they attend (Li, Dong and Lei,
2024, arXiv 2407.19126). Its repair of what is left is not done here.

A channel of f(x) = B act(A x) has 1/2 |B_:j|^2 E[(A_j x)^2]; of a gated FFN, the product over its two ways in. Heads
are listed for removal where another head that is not listed has nearly their attention, by the divergence of Jensen and
Shannon. The paper scans heads in order and cuts the list off at a threshold; here pairs are taken from the most alike
on, and the threshold at which a head would be listed is its score. The lists of the two may differ. Of a pair it is the
first that is listed, as in the paper, so the last of a layer never is: of two kv groups the first always goes.

Letters: H query heads, G kv groups, T tokens, F channels, R rows.
"""

import math
from typing import Any

import torch
from torch import nn

from bernprune.models.eager import eager_attention
from bernprune.models.hooks import hooked
from bernprune.scores.base import PARTS, Context, Metric
from bernprune.scores.stream import LayerPass, Scores, by_layer, of_columns


def channel_scores(down_moment_F: torch.Tensor, gate_F: torch.Tensor, up_F: torch.Tensor) -> torch.Tensor:
    """(1/2 |B_j|^2 E[gate_j^2]) (1/2 |B_j|^2 E[up_j^2]), ``[F]``.

    Args:
        down_moment_F: squared norms of the columns of the down projection.
        gate_F, up_F: second moments of what its two inputs were made of, before the activation.
    """
    return (0.5 * down_moment_F * gate_F) * (0.5 * down_moment_F * up_F)


def listed_at(distance_GG: torch.Tensor) -> torch.Tensor:
    """The distance at which each is listed for removal, ``[G]``; the last, which nothing stands in for, has the most.

    Pairs are gone through from the most alike: where neither of one is listed, its first then is.
    """
    count = len(distance_GG)
    at_G = torch.full((count,), math.log(2), dtype=torch.float64)  # the most that two distributions can differ
    listed: set[int] = set()
    pairs = [(float(distance_GG[i, j]), i, j) for i in range(count) for j in range(i + 1, count)]
    for distance, first, second in sorted(pairs):
        if not {first, second} & listed:
            listed.add(first)
            at_G[first] = distance
    return at_G


def group_distances(distance_HH: torch.Tensor, groups: int) -> torch.Tensor:
    """How far kv groups are apart, ``[G, G]``: on average over the query heads of both, to the nearest of the other."""
    per = len(distance_HH) // groups
    by_group = distance_HH.view(groups, per, groups, per)
    one_way_GG = by_group.min(3).values.mean(1)
    return (one_way_GG + one_way_GG.T) / 2


class _Divergences:
    """Running mean over rows and positions of the divergences between all heads."""

    def __init__(self) -> None:
        self.total_HH: torch.Tensor | None = None
        self.count = 0

    def add(self, probs_RHTT: torch.Tensor) -> None:
        probs_RHTT = probs_RHTT.to(torch.promote_types(probs_RHTT.dtype, torch.float32))
        heads, entropy_RHT = probs_RHTT.shape[1], torch.special.entr(probs_RHTT).sum(-1)
        found_HH = torch.zeros(heads, heads, dtype=torch.float64)
        for first in range(heads - 1):
            both = (probs_RHTT[:, first, None] + probs_RHTT[:, first + 1 :]) / 2
            apart = torch.special.entr(both).sum(-1) - (entropy_RHT[:, first, None] + entropy_RHT[:, first + 1 :]) / 2
            found_HH[first, first + 1 :] = apart.clamp(min=0).sum((0, 2)).double().cpu()
        self.total_HH = found_HH if self.total_HH is None else self.total_HH + found_HH
        self.count += entropy_RHT.shape[0] * entropy_RHT.shape[2]

    @property
    def mean_HH(self) -> torch.Tensor:
        assert self.total_HH is not None
        return (self.total_HH + self.total_HH.T) / self.count


def _with_similarity(at: LayerPass) -> Scores:
    divergences, groups = _Divergences(), at.layer.shape.kv_groups

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        divergences.add(output[1])

    with hooked((at.layer.attention, record)):
        by_moment = _by_moment(at)
    alike_G = listed_at(group_distances(divergences.mean_HH, groups))
    return {"kv_group": alike_G, "channel": by_moment["channel"]}


def _by_moment(at: LayerPass) -> Scores:
    seen = at.moments(("output", "down"), ("gate", "up"))
    squares = {name: at.weight(name).square().sum(0).cpu() for name in ("output", "down")}
    heads_E = 0.5 * squares["output"] * seen["output"].second_moment_E
    channels_F = channel_scores(squares["down"], seen["gate"].second_moment_E, seen["up"].second_moment_E)
    return of_columns(at.layer, heads_E, channels_F)


def _goa(context: Context) -> torch.Tensor:
    with eager_attention(context.view):
        return by_layer(_with_similarity)(context)


_SOURCE = "Li, Dong and Lei, 2024"

GOA = Metric(
    "goa",
    "channels by second moment, kv groups by how unlike the attention of others theirs is",
    _SOURCE,
    _goa,
    kinds=PARTS,
    layerwise=True,
)
GOA_MOMENT = Metric(
    "goa-moment",
    "second moment of what a unit hands on, times the squared weights that read it",
    _SOURCE,
    by_layer(_by_moment),
    kinds=PARTS,
    layerwise=True,
)
