"""Projections land on the budget, move nothing they need not, and are the nearest points in their metric."""

import math
from collections.abc import Callable

import pytest
import torch
from spaces import (
    BLOCKS,
    FLAT,
    LAYERED_BLOCKS,
    NESTED,
    SPACES,
    TINY_NESTED,
    alive_by_hand,
    all_masks,
    make_space,
    of_kind,
    random_numbers,
)
from tolerances import BUDGET, EXACT, assert_close

from bernprune.errors import BudgetError
from bernprune.names import Measure, Projection
from bernprune.policy.budget import Budget
from bernprune.units import UnitSpace

# Where a projection may start from: any real numbers, from uniform ones u.
STARTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ordinary": lambda u: 1.5 * u - 0.2,
    "ties": lambda u: (4 * u).round() / 4,
    "all_equal": lambda u: u[:1].expand_as(u).clone(),
    "huge": lambda u: 1e6 * (u - 0.5),
    "one_huge": lambda u: u.where(u < u.max(), torch.tensor(-1e5, dtype=u.dtype)),
    "settled": lambda u: u.round(),
    "above": lambda u: u + 3,
    "below": lambda u: u - 3,
}
BOUNDS = {"open": (0.0, 1.0), "inside": (0.01, 0.99), "narrow": (0.25, 0.9)}
UNNESTED = {"flat": FLAT, "blocks": BLOCKS}
SPARSITIES = (0.2, 0.5)

all_starts = pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
all_bounds = pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
all_spaces = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
unnested = pytest.mark.parametrize("space", UNNESTED.values(), ids=UNNESTED)


def projected(budget: Budget, z: torch.Tensor, how: Projection, bounds: tuple[float, float]) -> torch.Tensor:
    project = budget.project if how == "cost-weighted" else budget.project_published
    before = z.clone()
    result = project(z, floor=bounds[0], ceiling=bounds[1])
    assert torch.equal(z, before)  # the argument is not written on
    return result


def limit_of(budget: Budget, members: torch.Tensor | None = None) -> float:
    costs_U = budget.space.costs_U(budget.measure)
    return (1 - budget.sparsity) * costs_U[slice(None) if members is None else members].sum().item()


def cost_by_hand(space: UnitSpace, probs_U: torch.Tensor, measure: Measure = "parameters") -> float:
    """Expected cost alive by summing over every mask."""
    costs, total = space.costs_U(measure), 0.0
    for mask in all_masks(space.size):
        probability = torch.where(mask, probs_U, 1 - probs_U).prod().item()
        total += probability * costs[torch.tensor(alive_by_hand(space, mask.tolist()))].sum().item()
    return total


def multiplier_gap(z: torch.Tensor, s: torch.Tensor, weights: torch.Tensor, bounds: tuple[float, float]) -> float:
    """KKT residual of s = clip(z - v * weights): how far the v that each unit asks for are from agreeing on one."""
    wanted = (z - s) / weights
    at_most, at_least = wanted[s > bounds[0] + 1e-12], wanted[s < bounds[1] - 1e-12]
    return (at_least.max() - at_most.min()).item() if len(at_most) and len(at_least) else 0.0


def exchanges(s: torch.Tensor, costs: torch.Tensor, bounds: tuple[float, float], size: float) -> torch.Tensor:
    """All points near ``s`` that move cost from one unit to another and stay within the bounds, ``[P, U]``."""
    moves = torch.eye(len(s), dtype=s.dtype) * (size / costs)
    points = (s + moves[:, None] - moves[None]).flatten(0, 1)
    return points[((points >= bounds[0]) & (points <= bounds[1])).all(-1)]


# Cost-weighted


@all_spaces
@all_starts
@all_bounds
def test_the_budget_is_met(
    space: UnitSpace, start: Callable[[torch.Tensor], torch.Tensor], bounds: tuple[float, float]
) -> None:
    """Expected cost alive is the limit and every probability lies between its bounds."""
    for seed in range(3):
        for sparsity in SPARSITIES if bounds[1] == 1.0 else SPARSITIES[1:]:
            budget = Budget(space, sparsity)
            s = projected(budget, start(random_numbers(space.size, seed)), "cost-weighted", bounds)
            assert_close(budget.alive_cost(s), limit_of(budget), BUDGET)
            assert_close(budget.removed_share(s), sparsity, BUDGET)
            assert s.min() >= bounds[0]
            assert s.max() <= bounds[1]


@all_spaces
@all_starts
@all_bounds
def test_one_shift_for_all(
    space: UnitSpace, start: Callable[[torch.Tensor], torch.Tensor], bounds: tuple[float, float]
) -> None:
    """Every unit between the bounds moves by the same amount, and one at a bound was pushed there: the KKT residual."""
    budget, z = Budget(space, 0.5), start(random_numbers(space.size, 11))
    s = projected(budget, z, "cost-weighted", bounds)
    scale = max(1.0, z.abs().max().item())
    assert multiplier_gap(z, s, torch.ones_like(z), bounds) <= EXACT * scale
    assert (s.unique().numel() > 2) or z.unique().numel() <= 2 or scale > 1e3  # something was to be checked


@all_spaces
@all_starts
def test_projecting_twice_is_projecting_once(space: UnitSpace, start: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """What is on the budget stays."""
    budget = Budget(space, 0.5)
    for bounds in BOUNDS.values():
        once = projected(budget, start(random_numbers(space.size, 3)), "cost-weighted", bounds)
        assert_close(projected(budget, once, "cost-weighted", bounds), once, BUDGET)


@unnested
@all_bounds
def test_no_exchange_comes_nearer(space: UnitSpace, bounds: tuple[float, float]) -> None:
    """In the cost-weighted metric, no move of cost between two units within the bounds lies nearer to the start."""
    budget, costs = Budget(space, 0.5), space.costs_U()
    for name in ("ordinary", "ties", "settled"):
        z = STARTS[name](random_numbers(space.size, 7))
        s = projected(budget, z, "cost-weighted", bounds)
        points = exchanges(s, costs, bounds, 1e-3)
        distance, others = (costs * (s - z).square()).sum(), (costs * (points - z).square()).sum(-1)
        assert len(others) > space.size
        assert (others >= distance - EXACT).all()


@all_bounds
def test_nested_budgets_count_what_is_alive(bounds: tuple[float, float]) -> None:
    """Summing over every mask of nested units gives the limit."""
    budget = Budget(TINY_NESTED, 0.6)
    s = projected(budget, 1.5 * random_numbers(TINY_NESTED.size, 2) - 0.2, "cost-weighted", bounds)
    assert_close(cost_by_hand(TINY_NESTED, s), limit_of(budget), BUDGET)


@pytest.mark.parametrize("measure", ["parameters", "flops"])
def test_alive_cost_is_an_expectation(measure: Measure) -> None:
    """Of probabilities the mean over all masks, of a mask its own cost; in either measure."""
    budget, probs_U = Budget(TINY_NESTED, 0.3, measure=measure), random_numbers(TINY_NESTED.size, 4)
    assert_close(budget.alive_cost(probs_U), cost_by_hand(TINY_NESTED, probs_U, measure), EXACT)
    assert_close(budget.removed_share(probs_U), 1 - budget.alive_cost(probs_U) / budget.total, EXACT)
    for mask in all_masks(TINY_NESTED.size)[::97]:
        alive = torch.tensor(alive_by_hand(TINY_NESTED, mask.tolist()))
        assert budget.alive_cost(mask) == TINY_NESTED.costs_U(measure)[alive].sum()


@all_spaces
@pytest.mark.parametrize("measure", ["parameters", "flops"])
def test_a_unit_weighs_what_its_removal_saves(space: UnitSpace, measure: Measure) -> None:
    """With everything else kept; relative to the mean, so that equal costs weigh one. Never zero."""
    budget = Budget(space, 0.3, measure=measure)
    without_one = ~torch.eye(space.size, dtype=torch.bool)
    saved = budget.total - torch.tensor([budget.alive_cost(mask_U) for mask_U in without_one], dtype=torch.float64)
    assert_close(budget.metric_U, saved / saved.mean(), EXACT)
    assert (budget.metric_U > 0).all()


@pytest.mark.parametrize("measure", ["parameters", "flops"])
def test_the_measure_decides(measure: Measure) -> None:
    """The limit is a share of the measured cost."""
    budget = Budget(NESTED, 0.4, measure=measure)
    s = projected(budget, random_numbers(NESTED.size, 1), "cost-weighted", BOUNDS["open"])
    costs = torch.tensor([getattr(group, measure) for group in NESTED.groups for _ in range(group.count)])
    assert_close(budget.alive_cost(s), 0.6 * costs.double().sum(), BUDGET)
    assert_close(budget.total, costs.double().sum(), EXACT)


# Published


@unnested
@all_starts
@all_bounds
def test_published_costs_at_most_the_limit(
    space: UnitSpace, start: Callable[[torch.Tensor], torch.Tensor], bounds: tuple[float, float]
) -> None:
    """Within the bounds, never above the limit, and exactly on it unless the clipped start lies below."""
    for seed in range(3):
        budget, z = Budget(space, 0.5), start(random_numbers(space.size, seed))
        s = projected(budget, z, "published", bounds)
        clipped = z.clamp(*bounds)
        assert s.min() >= bounds[0]
        assert s.max() <= bounds[1]
        assert_close(budget.alive_cost(s), min(limit_of(budget), budget.alive_cost(clipped)), BUDGET)
        if budget.alive_cost(clipped) <= limit_of(budget):
            assert torch.equal(s, clipped)


@unnested
@all_starts
@all_bounds
def test_published_has_one_multiplier(
    space: UnitSpace, start: Callable[[torch.Tensor], torch.Tensor], bounds: tuple[float, float]
) -> None:
    """KKT of the plain metric: s = clip(z - v c) with one v >= 0, and v = 0 below the limit."""
    budget, z, costs = Budget(space, 0.5), start(random_numbers(space.size, 11)), space.costs_U()
    s = projected(budget, z, "published", bounds)
    scale = max(1.0, z.abs().max().item())
    assert multiplier_gap(z, s, costs, bounds) <= EXACT * scale
    assert (s <= z.clamp(min=bounds[0])).all()  # v >= 0
    if budget.alive_cost(s) < limit_of(budget) * (1 - 1e-6):
        assert torch.equal(s, z.clamp(*bounds))


@unnested
@all_bounds
def test_no_exchange_comes_nearer_than_published(space: UnitSpace, bounds: tuple[float, float]) -> None:
    """In the plain metric, no move of cost between two units within the bounds lies nearer to the start."""
    budget, costs = Budget(space, 0.5), space.costs_U()
    for name in ("ordinary", "ties", "settled"):
        z = STARTS[name](random_numbers(space.size, 7))
        s = projected(budget, z, "published", bounds)
        points = exchanges(s, costs, bounds, 1e-3)
        distance, others = (s - z).square().sum(), (points - z).square().sum(-1)
        assert len(others) > space.size
        assert (others >= distance - EXACT).all()


@unnested
@all_starts
def test_published_twice_is_published_once(space: UnitSpace, start: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """What is within the budget stays."""
    budget = Budget(space, 0.5)
    for bounds in BOUNDS.values():
        once = projected(budget, start(random_numbers(space.size, 3)), "published", bounds)
        assert_close(projected(budget, once, "published", bounds), once, BUDGET)


# Pools


@pytest.mark.parametrize("how", ["cost-weighted", "published"])
def test_separate_pools_do_not_know_of_each_other(how: Projection) -> None:
    """Each kind gets the projection that it would get alone, hence its own limit."""
    for seed in range(5):
        z = 1.5 * random_numbers(FLAT.size, seed)
        together = projected(Budget(FLAT, 0.5, pools="separate"), z, how, BOUNDS["inside"])
        for kind in FLAT.kinds:
            members = of_kind(FLAT, kind)
            alone = make_space([kind], [(3, 11), (2, 7), (1, 5)])
            assert_close(together[members], projected(Budget(alone, 0.5), z[members], how, BOUNDS["inside"]), EXACT)


def test_pools_cover_every_unit_once() -> None:
    """Separate pools have the members, limits and names of the kinds; the joint pool has everything."""
    joint, separate = Budget(FLAT, 0.3), Budget(FLAT, 0.3, pools="separate")
    assert [pool.name for pool in separate.pools] == list(FLAT.kinds)
    for pool in separate.pools:
        assert torch.equal(pool.members_U, of_kind(FLAT, pool.name))  # type: ignore[arg-type]
        assert_close(pool.limit, limit_of(separate, pool.members_U), EXACT)
    assert len(joint.pools) == 1
    assert joint.pools[0].members_U.all()


# Refusals


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, math.nan, math.inf, -math.inf], ids=str)
def test_impossible_sparsities_are_refused(sparsity: float) -> None:
    """With the value in the message."""
    with pytest.raises(BudgetError, match=str(sparsity)):
        Budget(FLAT, sparsity)


def test_no_units_are_refused() -> None:
    """A one-layer model has no removable attention block."""
    with pytest.raises(BudgetError, match="nothing to prune"):
        Budget(make_space(["attention"], [(2, 5)]), 0.5)


@pytest.mark.parametrize("space", [NESTED, LAYERED_BLOCKS], ids=["nested", "layered_blocks"])
def test_nested_units_are_refused_where_they_have_no_meaning(space: UnitSpace) -> None:
    """No separate pools, no published projection."""
    with pytest.raises(BudgetError, match="separate pools"):
        Budget(space, 0.5, pools="separate")
    with pytest.raises(BudgetError, match="published"):
        Budget(space, 0.5).project_published(torch.full((space.size,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("pools", ["joint", "separate"])
def test_bounds_that_cannot_hold_the_budget_are_refused(pools: str) -> None:
    """The message has the share to keep and the shares of the same pool that can be kept."""
    z = random_numbers(FLAT.size, 0)
    high, low = Budget(FLAT, 0.95, pools=pools), Budget(FLAT, 0.05, pools=pools)  # type: ignore[arg-type]
    for project in (high.project, high.project_published):
        with pytest.raises(BudgetError, match=r"keep 0\.05 of .*keep 0\.1 to"):
            project(z, floor=0.1, ceiling=0.9)
    with pytest.raises(BudgetError, match=r"keep 0\.95 of .*keep 0\.1 to 0\.9$"):
        low.project(z, floor=0.1, ceiling=0.9)
    assert low.project_published(z + 1, floor=0.1, ceiling=0.9).eq(0.9).all()  # at most the limit is possible


def test_nested_bounds_multiply() -> None:
    """A ceiling that flat units could meet is too low where three of them must hold together."""
    budget = Budget(NESTED, 0.12)
    z = torch.full((NESTED.size,), 0.9, dtype=torch.float64)
    with pytest.raises(BudgetError, match="ceiling"):
        budget.project(z, ceiling=0.9)
    assert_close(budget.alive_cost(budget.project(z)), limit_of(budget), BUDGET)


def test_a_ceiling_just_at_the_limit_is_possible() -> None:
    """The only policy there is, is found."""
    for space in UNNESTED.values():
        s = Budget(space, 0.1).project(random_numbers(space.size, 0), floor=0.0, ceiling=0.9)
        assert_close(s, torch.full_like(s, 0.9), BUDGET)
