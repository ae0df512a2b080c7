"""Policies at a price: one price a pool puts them on the budget, and a unit is charged for what it decides about."""

import itertools
from typing import Any

import pytest
import torch
from spaces import FLAT, NESTED, SPACES, make_space, of_kind, random_numbers
from tolerances import BUDGET, EXACT, assert_close

from bernprune.errors import BudgetError
from bernprune.names import Measure
from bernprune.policy.budget import Budget
from bernprune.units import UnitSpace

BOUNDS = {"open": (0.0, 1.0), "inside": (0.01, 0.99), "narrow": (0.25, 0.9)}
PRICED = {"flat": (FLAT, "joint"), "separate": (FLAT, "separate"), "nested": (NESTED, "joint")}
priced = pytest.mark.parametrize(("space", "pools"), PRICED.values(), ids=PRICED)


def beliefs(budget: Budget, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Worths, some of them negative, how sure they are, and what each unit is charged for."""
    size = budget.space.size
    costs_U = budget.marginal_cost(random_numbers(size, seed + 2))
    return (1.5 * random_numbers(size, seed) - 0.4) * costs_U, (0.1 + random_numbers(size, seed + 1)) * costs_U, costs_U


def at_price(budget: Budget, believed: tuple[torch.Tensor, ...], bounds: tuple[float, float]) -> torch.Tensor:
    before = [values_U.clone() for values_U in believed]
    s = budget.at_price(*believed, floor=bounds[0], ceiling=bounds[1])
    assert all(torch.equal(*pair) for pair in zip(believed, before, strict=True))
    return s


@priced
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_one_price_meets_the_budget(space: UnitSpace, pools: Any, bounds: tuple[float, float]) -> None:
    """Every unit of a pool between the bounds implies the same price, and one at a bound was pushed there by it."""
    for seed, scale in itertools.product(range(3), (1.0, 1e-6, 1e6)):
        budget = Budget(space, 0.5, pools=pools)
        worth_U, deviation_U, costs_U = beliefs(budget, seed)
        s = at_price(budget, (scale * worth_U, scale * deviation_U, costs_U), bounds)
        assert s.min() >= bounds[0]
        assert s.max() <= bounds[1]
        for pool in budget.pools:
            members = pool.members_U
            alive_U = budget.costs_U * space.inherit(s, torch.mul)
            assert_close(alive_U[members].sum(), (1 - budget.sparsity) * budget.costs_U[members].sum(), BUDGET)
            z, x = (worth_U / deviation_U)[members], torch.special.ndtri(s[members])
            between = (s[members] > bounds[0] + 1e-4) & (s[members] < bounds[1] - 1e-4)
            assert between.sum() > 1  # something to compare
            prices = (z - x)[between] * (deviation_U / costs_U)[members][between]
            assert_close(prices, prices.mean().expand_as(prices), BUDGET)
            wanted = torch.special.ndtr(z - prices.mean() * (costs_U / deviation_U)[members])
            assert_close(s[members], wanted.clamp(*bounds), BUDGET)


@priced
def test_worth_more_is_kept_more(space: UnitSpace, pools: Any) -> None:
    """All else equal, between units and of one unit."""
    budget = Budget(space, 0.5, pools=pools)
    worth_U, deviation_U, costs_U = beliefs(budget, 5)
    alike_U = at_price(budget, (worth_U, deviation_U.mean().expand_as(worth_U), torch.ones_like(costs_U)), (0.02, 0.98))
    for pool in budget.pools:
        assert alike_U[pool.members_U][worth_U[pool.members_U].argsort()].diff().min() >= 0
    before = at_price(budget, (worth_U, deviation_U, costs_U), (0.02, 0.98))
    for unit in range(0, space.size, 3):
        raised_U = worth_U.clone()
        raised_U[unit] += deviation_U[unit]
        s = at_price(budget, (raised_U, deviation_U, costs_U), (0.02, 0.98))
        assert s[unit] > before[unit] or before[unit] == 0.98


@priced
def test_what_is_sure_is_a_threshold(space: UnitSpace, pools: Any) -> None:
    """Without doubt, the greatest worths per cost are at the ceiling, the others at the floor, one a pool between."""
    budget = Budget(space, 0.5, pools=pools)
    worth_U, _, costs_U = beliefs(budget, 3)
    s = at_price(budget, (worth_U, 1e-5 * costs_U, costs_U), (0.02, 0.98))
    assert_close(budget.alive_cost(s), (1 - budget.sparsity) * budget.total, BUDGET)
    for pool in budget.pools:
        order = (worth_U / costs_U)[pool.members_U].argsort()
        ordered = s[pool.members_U][order]
        assert ordered.diff().min() >= 0
        assert ((ordered > 0.02) & (ordered < 0.98)).sum() <= 1


@priced
@pytest.mark.parametrize("sparsity", [0.0001, 0.9999])
def test_almost_any_budget_is_met(space: UnitSpace, pools: Any, sparsity: float) -> None:
    """Without bounds, also where all units are alike and so must be far on one side of the price."""
    budget = Budget(space, sparsity, pools=pools)
    for believed in (beliefs(budget, 1), tuple(torch.ones(3, space.size, dtype=torch.float64))):
        assert_close(budget.alive_cost(at_price(budget, believed, (0.0, 1.0))), (1 - sparsity) * budget.total, BUDGET)


def test_prices_of_separate_pools_do_not_know_of_each_other() -> None:
    """Each kind gets the policy that it would get alone."""
    budget = Budget(FLAT, 0.5, pools="separate")
    believed = beliefs(budget, 0)
    together = at_price(budget, believed, BOUNDS["inside"])
    for kind in FLAT.kinds:
        members, alone = of_kind(FLAT, kind), Budget(make_space([kind], [(3, 11), (2, 7), (1, 5)]), 0.5)
        expected = at_price(alone, tuple(values_U[members] for values_U in believed), BOUNDS["inside"])
        assert_close(together[members], expected, EXACT)


@pytest.mark.parametrize("pools", ["joint", "separate"])
def test_bounds_that_cannot_hold_the_budget_are_refused(pools: Any) -> None:
    """With the share to keep and the shares that can be kept; bounds a little wider are taken."""
    for sparsity, keep in ((0.95, r"0\.05"), (0.05, r"0\.95")):
        budget = Budget(FLAT, sparsity, pools=pools)
        believed = beliefs(budget, 0)
        with pytest.raises(BudgetError, match=rf"keep {keep} of .*keep 0\.1 to 0\.9$"):
            at_price(budget, believed, (0.1, 0.9))
        assert_close(budget.removed_share(at_price(budget, believed, (0.04, 0.96))), sparsity, BUDGET)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("measure", ["parameters", "flops"])
def test_marginal_cost_is_what_a_unit_decides_about(space: UnitSpace, measure: Measure) -> None:
    """How the expected cost alive changes: its own cost and that of all that lies in it, if its blocks are kept."""
    budget, probs_U = Budget(space, 0.3, measure=measure), 0.1 + 0.9 * random_numbers(space.size, 4)
    parents, costs = space.parents_U.tolist(), budget.costs_U.tolist()

    def hanging(unit: int) -> float:
        inner = [other for other in range(space.size) if parents[other] == unit]
        return costs[unit] + sum(probs_U[other].item() * hanging(other) for other in inner)

    found = budget.marginal_cost(probs_U)
    for unit in range(space.size):
        kept, cut, ancestors, block = probs_U.clone(), probs_U.clone(), 1.0, parents[unit]
        kept[unit], cut[unit] = 1.0, 0.0
        while block >= 0:
            ancestors, block = ancestors * probs_U[block].item(), parents[block]
        assert_close(budget.alive_cost(kept) - budget.alive_cost(cut), found[unit], BUDGET)
        assert_close(ancestors * hanging(unit), found[unit], EXACT)
    everything_U = budget.marginal_cost(torch.ones_like(probs_U))
    assert_close(everything_U, budget.metric_U * everything_U.mean(), EXACT)
