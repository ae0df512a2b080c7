"""Selection under several budgets at once, such as parameters, FLOPs and bytes of the key/value cache.

max sum_u w_u z_u subject to sum_u c_mu z_u <= limit_m for every budget m. In the linear relaxation a unit is kept if
its worth exceeds what it costs at one price a budget, w_u > sum_m price_m c_mu (Meng et al., 2024, FALCON, arXiv
2403.07094, with two budgets), and no more than M units are kept in part. They are cut, and what still fits comes back
(``bernprune.policy.selection``): the result is worse than the best one by the worth of M units at most.

Letters: U units, M budgets.
"""

import math

import torch

_STEPS = 60  # of a bisection


def at_best_prices(
    worth_U: torch.Tensor, costs_MU: torch.Tensor, limits_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept at the lowest prices that keep within all budgets, and what of each unit's worth they leave.

    The first budget's price is found from one order of all units, each other one by a bisection around that.

    Args:
        worth_U: what keeping each unit is worth; one that is not above 0 is never kept.
        costs_MU, limits_M: not negative, and of the same size for all budgets, such as shares of what all units cost.
    """
    costs_U, limit = costs_MU[-1], float(limits_M[-1])
    if len(limits_M) == 1:
        return _at_best_price(worth_U, costs_U, limit)

    def at(price: float) -> tuple[torch.Tensor, torch.Tensor]:
        return at_best_prices(worth_U - price * costs_U, costs_MU[:-1], limits_M[:-1])

    kept_U, reduced_U = at(0.0)
    if float(costs_U[kept_U].sum()) <= limit:
        return kept_U, reduced_U
    low, high = 0.0, float((worth_U / costs_U)[costs_U > 0].max()) * (1 + 1e-12)
    kept_U, reduced_U = at(high)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        found_U, left_U = at(middle)
        if float(costs_U[found_U].sum()) > limit:
            low = middle
            continue
        high, kept_U, reduced_U = middle, found_U, left_U
    return kept_U, reduced_U


def _at_best_price(worth_U: torch.Tensor, costs_U: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with one budget: units of most worth for their cost, up to the first that does not fit."""
    ratio_U = torch.where(costs_U > 0, worth_U / costs_U, torch.where(worth_U > 0, math.inf, -math.inf))
    order = ratio_U.argsort(descending=True, stable=True)
    fits = (costs_U[order].cumsum(0) <= limit) & (worth_U[order] > 0)
    count = len(fits) if fits.all() else int((~fits).int().argmax())
    kept_U = torch.zeros(len(worth_U), dtype=torch.bool)
    kept_U[order[:count]] = True
    price = 0.0 if count == len(order) else max(0.0, float(ratio_U[order[count]]))
    return kept_U, worth_U - price * costs_U
