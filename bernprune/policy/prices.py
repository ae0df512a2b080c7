"""Selection under several budgets at once, such as parameters, FLOPs and bytes of the key/value cache.

max sum_u w_u z_u subject to sum_u c_mu z_u <= limit_m for every budget m. In the linear relaxation a unit is kept if
its worth exceeds what it costs at one price a budget, w_u > sum_m price_m c_mu (Meng et al., 2024, FALCON, arXiv
2403.07094, with two budgets), and no more than M units are kept in part. They are cut, and what still fits comes back
(``bernprune.policy.selection``): the result is worse than the best one by the worth of M units at most.

Letters: U units, M budgets, D sizes.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass

import torch

_STEPS = 60  # of a bisection


def at_best_prices(worth_U: torch.Tensor, costs_MU: torch.Tensor, limits_M: torch.Tensor) -> torch.Tensor:
    """What each unit is worth beyond its price, ``[U]``, at the lowest prices that keep within all budgets.

    Each price is found by a bisection, within which those of the budgets before it are found anew. Units of a model
    come in few sizes, and one order of each size tells how many of it are worth more than any price.

    Args:
        worth_U: what keeping each unit is worth; one that is not above 0 is never kept.
        costs_MU, limits_M: not negative, and of the same size for all budgets, such as shares of what all units cost.
    """
    size_U = torch.zeros(len(worth_U), dtype=torch.int64)
    for costs_U in costs_MU:
        found, number_U = costs_U.unique(return_inverse=True)
        size_U = (size_U * len(found) + number_U).unique(return_inverse=True)[1]
    sizes = []
    for size in size_U.unique():
        members = (size_U == size).nonzero().flatten()
        sizes.append(_Size(costs_MU[:, members[0]].tolist(), worth_U[members].sort().values.tolist()))
    prices = [0.0] * len(limits_M)
    _keep(prices, len(prices) - 1, sizes, limits_M.tolist())
    asked_D = torch.tensor([size.asked(prices) for size in sizes], dtype=worth_U.dtype)
    return worth_U - asked_D[size_U]


@dataclass(frozen=True)
class _Size:
    """Units that cost the same: what of each budget, and what they are worth, the least first."""

    costs: list[float]
    worths: list[float]

    def asked(self, prices: list[float]) -> float:
        """What one of them is charged."""
        return sum(price * cost for price, cost in zip(prices, self.costs, strict=True))

    def kept(self, prices: list[float]) -> int:
        """How many are worth more than that."""
        return len(self.worths) - bisect_right(self.worths, self.asked(prices))


def _keep(prices: list[float], last: int, sizes: list[_Size], limits: list[float]) -> list[int]:
    """How many of each size are kept at the lowest prices of the budgets up to ``last``, which are set.

    The prices of later budgets are as they are given.
    """
    if last < 0:
        return [size.kept(prices) for size in sizes]

    def at(price: float) -> tuple[list[int], float]:
        """How many are kept then, and how much of the budget is left."""
        prices[last] = price
        kept = _keep(prices, last - 1, sizes, limits)
        return kept, limits[last] - math.fsum(
            size.costs[last] * number for size, number in zip(sizes, kept, strict=True)
        )

    wanted, left = at(0.0)
    if left >= 0:
        return wanted
    dearest = max(size.worths[-1] / size.costs[last] for size in sizes if size.costs[last] > 0)
    low, high = 0.0, dearest * (1 + 1e-12)
    kept, left = at(high)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        apart = sum(abs(more - fewer) for more, fewer in zip(wanted, kept, strict=True))
        if apart <= 1 or not low < middle < high:  # one unit hangs on what is between
            break
        found, room = at(middle)
        if room < 0:
            low, wanted = middle, found
        else:
            high, kept, left = middle, found, room
    at(high)
    if last == 0:  # of those that are worth just their price, as many as there is room for
        for number, size in enumerate(sizes):
            if wanted[number] > kept[number]:
                more = min(wanted[number] - kept[number], int(left / size.costs[0]))
                kept[number] += more
                left -= more * size.costs[0]
    return kept
