"""How much each layer keeps, where it is not left to the scores of its units.

Letters: L layers, G groups of units (a kind in a layer), K candidates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bernprune.errors import BudgetError
from bernprune.seeding import generator
from bernprune.units import UnitSpace

# CFSP divides the sum of distances over 128 windows of 1,024 tokens by 10,000; distances here are means over tokens.
STEEPNESS = 128 * 1024 / 1e4
_ROOM = 1.05  # as released: how far the largest share stays below 1


def shares_by_importance(importance_L: torch.Tensor, keep: float) -> torch.Tensor:
    """Share of its units that each layer keeps, float64 ``[L]``, with the mean ``keep``: more where it matters more.

    keep * t / mean(t), with t a sigmoid of ``STEEPNESS`` times the difference from the mean importance; where that
    would be 1 or more, all layers are drawn to the mean until it is less (Wang et al., 2024, CFSP, released code).

    Raises:
        BudgetError: importances that are not finite.
    """
    if not importance_L.isfinite().all():
        raise BudgetError(f"importances of layers must be finite, but are {importance_L.tolist()}")
    t_L = torch.sigmoid(STEEPNESS * (importance_L.double() - importance_L.double().mean()))
    mean = t_L.mean()
    if keep * t_L.max() / mean >= 1:
        t_L = mean + (t_L - mean) * mean * (1 / keep - 1) / (t_L.max() - mean) / _ROOM
    return keep * t_L / mean


def shares_of_groups(space: UnitSpace, shares_L: torch.Tensor) -> torch.Tensor:
    """The share of its layer for each group of units, ``[G]``."""
    return torch.stack([shares_L[group.layer] for group in space.groups]).double()


def shares_by_kind(space: UnitSpace, costs_U: torch.Tensor, keep: float, kv_keep: float) -> torch.Tensor:
    """Shares of groups, float64 ``[G]``: kv groups keep the given one, channels what the budget leaves.

    The manual modules (MM) of FLAP, which are told how many heads go (An et al., 2023, arXiv 2312.11983, released
    code); there the share of channels is told as well, here it follows.

    Raises:
        BudgetError: no share of the channels meets the budget.
    """
    heads = costs_U[space.of_kind("kv_group")].sum().item()
    channels = costs_U[space.of_kind("channel")].sum().item()
    kept = keep * (heads + channels)
    channel_keep = (kept - kv_keep * heads) / channels
    if not 0 < channel_keep < 1:
        least, most = max(0.0, (kept - channels) / heads), min(1.0, kept / heads)
        raise BudgetError(
            f"with {1 - kv_keep:g} of the kv groups gone, no share of the channels removes {1 - keep:g} of all cost; "
            f"of the kv groups more than {1 - most:.3g} and less than {1 - least:.3g} may go"
        )
    of_kind = {"kv_group": kv_keep, "channel": channel_keep}
    return torch.tensor([of_kind.get(group.kind, keep) for group in space.groups], dtype=torch.float64)


@dataclass(frozen=True)
class Evolution:
    """How long shares are searched for.

    Attributes:
        population: candidates of one generation.
        parents: the best ones, from which the next generation comes; they stay in it.
        generations: how many follow the first, which is random around equal shares.
        step: standard deviation of a change, in the log-odds of a share.
    """

    population: int = 24
    parents: int = 6
    generations: int = 8
    step: float = 0.5

    @property
    def tried(self) -> int:
        """Selections whose loss is asked for."""
        return self.population + self.generations * (self.population - self.parents)


def search_shares(
    num_groups: int,
    keep: float,
    losses_of: Callable[[torch.Tensor], torch.Tensor],
    *,
    seed: int,
    evolution: Evolution,
) -> torch.Tensor:
    """Shares of groups of units with the least loss that an evolution finds, float64 ``[G]``, in (0, 1).

    A child takes each group's share from one of two parents, and about two groups change (Shen et al., 2024, Search for
    Efficient Large Language Models: numbers of heads and channels of each layer as genes, by mutation and crossover).
    Equal shares, those of ``keep``, are always among the candidates, so that nothing worse comes out.

    Args:
        losses_of: takes shares ``[K, G]`` to the losses ``[K]`` of what would be selected by them.
    """
    source = generator(seed, "search-shares")
    even_G = torch.full((num_groups,), math.log(keep / (1 - keep)), dtype=torch.float64)

    def changed(odds_KG: torch.Tensor, share: float) -> torch.Tensor:
        noise_KG = torch.randn(odds_KG.shape, generator=source, dtype=torch.float64)
        touched_KG = torch.rand(odds_KG.shape, generator=source, dtype=torch.float64) < share
        return odds_KG + evolution.step * noise_KG * touched_KG

    odds_KG = torch.cat([even_G[None], changed(even_G.repeat(evolution.population - 1, 1), 1.0)])
    losses_K = losses_of(odds_KG.sigmoid())
    for _ in range(evolution.generations):
        best = losses_K.argsort(stable=True)[: evolution.parents]
        pairs_K2 = torch.randint(evolution.parents, (evolution.population - evolution.parents, 2), generator=source)
        one_KG, other_KG = odds_KG[best][pairs_K2].unbind(1)
        from_one_KG = torch.rand(one_KG.shape, generator=source) < 0.5
        children_KG = changed(torch.where(from_one_KG, one_KG, other_KG), min(1.0, 2 / num_groups))
        odds_KG = torch.cat([odds_KG[best], children_KG])
        losses_K = torch.cat([losses_K[best], losses_of(children_KG.sigmoid())])
    return odds_KG[losses_K.argmin()].sigmoid()
