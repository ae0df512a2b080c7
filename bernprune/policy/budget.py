"""How much may stay alive, and the projection of a policy onto it.

A budget limits the *expected cost alive* of each of its pools, sum over units u of c_u * P(u alive), where c_u is the
cost that u owns and P(u alive) is the product of its keep probability and of those of all units it lies in. Without
nesting that is the plain weighted sum. Besides, there may be caps on other costs, which hold for a policy in
expectation and for what is selected exactly; they have prices of their own (Meng et al., 2024, FALCON, arXiv
2403.07094).
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bernprune.errors import BudgetError
from bernprune.names import CapName, Measure, Pools, check_name
from bernprune.units import UnitSpace

_SLACK = 1e-9  # share of a pool's cost by which a bound may miss the limit before that is an error
_RESOLUTION = 1e-15  # share of a pool's cost that counts as having met it
_CAP_RESOLUTION = 1e-6  # share of a capped cost by which a policy may miss what is allowed
_MOST_EVALUATIONS = 200
_FIRST_PRICE = 1e-9  # the first price of a cap that is tried; each one after it is four times as high
_MOST_STEPS = 32
_ROUNDING = 1e-12  # of a sum of costs
_SURE = 9.0  # standard deviations beyond which a normal probability is 0 or 1 in float64


@dataclass(frozen=True)
class _Limited:
    """A cost that has a limit, which what is kept must not exceed."""

    name: str
    total: float
    limit: float

    @property
    def most(self) -> float:
        """What a selection may cost: a limit met exactly must not fail by rounding."""
        return self.limit * (1 + _ROUNDING)


@dataclass(frozen=True)
class Pool(_Limited):
    """Units that share one limit on the cost that stays alive."""

    members_U: torch.Tensor

    @functools.cached_property
    def index(self) -> slice | torch.Tensor:
        """Of the members, as what takes them fastest."""
        return slice(None) if self.members_U.all() else self.members_U.nonzero()[:, 0]


@dataclass(frozen=True)
class Cap(_Limited):
    """A limit on another cost of all units."""

    costs_U: torch.Tensor

    @property
    def share(self) -> float:
        """The share that must go."""
        return 1 - self.limit / self.total

    def allows(self, mask_U: torch.Tensor) -> bool:
        return torch.dot(self.costs_U, mask_U.double()).item() <= self.most

    def removed_share(self, mask_U: torch.Tensor) -> float:
        return 1 - torch.dot(self.costs_U, mask_U.double()).item() / self.total


class Budget:
    """The share of the space's cost that must go.

    Args:
        space: the units.
        sparsity: share of the cost to remove, in (0, 1).
        measure: ``parameters``, or ``flops`` at the sequence length that the space was described for.
        pools: ``joint`` lets all units trade with each other; ``separate`` gives each kind the same sparsity, as the
            published method does (Gao et al., 2024, arXiv 2406.10576).
        also: for other costs, ``kv_cache`` among them, the share that must go at least.

    Raises:
        ConfigError: an unknown measure or kind of pools.
        BudgetError: nothing to prune; separate pools or caps over units that lie in one another, or both of them; or
            a cap on a cost that no unit has.
    """

    def __init__(
        self,
        space: UnitSpace,
        sparsity: float,
        *,
        measure: Measure = "parameters",
        pools: Pools = "joint",
        also: Mapping[CapName, float] | None = None,
    ) -> None:
        check_name("measure", measure, Measure)
        check_name("pools", pools, Pools)
        if not (math.isfinite(sparsity) and 0 < sparsity < 1):
            raise BudgetError(f"sparsity must lie strictly between 0 and 1, but is {sparsity}")
        if space.size == 0:
            raise BudgetError("this model has no unit of the chosen granularity, so there is nothing to prune")
        if pools == "separate" and space.nested:
            raise BudgetError(f"separate pools need units that do not lie in one another, but got {space.kinds}")
        self.space, self.sparsity, self.measure = space, sparsity, measure
        self.costs_U = space.costs_U(measure)
        self.total = self.costs_U.sum().item()
        everything = torch.ones(space.size, dtype=torch.bool)
        if pools == "joint":
            self.pools = [self._pool("all units", everything)]
        else:
            self.pools = [self._pool(kind, space.of_kind(kind)) for kind in space.kinds]
        if also and (pools == "separate" or space.nested):
            raise BudgetError(
                "caps on other costs need joint pools, and units that do not lie in one another, but got "
                f"{pools} pools of {', '.join(space.kinds)}"
            )
        self.caps = [self._cap(name, share) for name, share in (also or {}).items()]

    @property
    def most(self) -> float:
        """What a selection may cost, over all pools."""
        return sum(pool.most for pool in self.pools)

    def __str__(self) -> str:
        pools = f" of each of {', '.join(pool.name for pool in self.pools)}" if len(self.pools) > 1 else ""
        caps = "".join(f", {cap.share:.6g} of {cap.name}" for cap in self.caps)
        return f"{self.sparsity:.6g} of the prunable {self.measure}{pools}{caps}"

    def _pool(self, name: str, members_U: torch.Tensor) -> Pool:
        total = self.costs_U[members_U].sum().item()
        return Pool(name, total, (1 - self.sparsity) * total, members_U)

    def _cap(self, name: CapName, share: float) -> Cap:
        check_name("cost", name, CapName)
        if not (math.isfinite(share) and 0 < share < 1):
            raise BudgetError(f"the share of {name} to remove must lie strictly between 0 and 1, but is {share}")
        costs_U = self.space.costs_U(name)
        total = costs_U.sum().item()
        if not total:
            raise BudgetError(f"none of the units, {', '.join(self.space.kinds)}, has a part in {name}")
        return Cap(name, total, (1 - share) * total, costs_U)

    @functools.cached_property
    def metric_U(self) -> torch.Tensor:
        """What each unit costs with all that lies in it, relative to the mean: the metric of ``project``."""
        within_U = self.marginal_cost(torch.ones_like(self.costs_U))
        return within_U / within_U.mean()

    def marginal_cost(self, probs_U: torch.Tensor) -> torch.Tensor:
        """What keeping each unit, rather than cutting it, adds to the expected cost alive: its derivative, ``[U]``.

        That is what the unit owns, and what is kept of all that lies in it, if all that it lies in is kept.
        """
        return self.space.marginal(self.costs_U, probs_U)

    def alive_cost(self, values_U: torch.Tensor) -> float:
        """Expected cost alive of probabilities, or cost alive of a mask, over all pools."""
        return (self.costs_U * self.space.inherit(values_U.double(), torch.mul)).sum().item()

    def removed_share(self, values_U: torch.Tensor) -> float:
        """Share of the cost that is (expected to be) removed."""
        return 1 - self.alive_cost(values_U) / self.total

    def project(self, probs_U: torch.Tensor, *, floor: float = 0.0, ceiling: float = 1.0) -> torch.Tensor:
        """Nearest policy on the budget, in a metric in which a unit weighs as much as it costs.

        Solves, per pool: minimise sum c_u (s_u - z_u)^2 subject to sum c_u s_u = limit, floor <= s_u <= ceiling. The
        solution shifts every unit equally, s_u = clip(z_u - v), so that an expensive unit is not pushed further than
        the many cheap ones that cost as much. With nesting, the same equal shift is chosen such that the expected
        cost alive meets the limit. A cap shifts units further, by its price times what they have of it for their cost.

        Args:
            probs_U: float64 ``[U]``, any real numbers.

        Raises:
            BudgetError: the limit or a cap cannot be met between floor and ceiling.
        """
        return self._within_caps(lambda charge_U: self._nearest(probs_U - charge_U / self.metric_U, floor, ceiling))

    def _nearest(self, probs_U: torch.Tensor, floor: float, ceiling: float) -> torch.Tensor:
        """``project`` without caps."""
        shifted = probs_U.clone()
        for pool in self.pools:
            members, values = pool.index, probs_U[pool.index]
            low, high = values.min().item() - ceiling, values.max().item() - floor

            def clipped(shift: float, values: torch.Tensor = values) -> torch.Tensor:
                return (values - shift).clamp(floor, ceiling)

            shift = self._solve(clipped, shifted, pool, low, high)
            shifted[members] = clipped(shift)
        return shifted

    def at_price(
        self, worth_U: torch.Tensor, deviation_U: torch.Tensor, costs_U: torch.Tensor, *, floor: float, ceiling: float
    ) -> torch.Tensor:
        """The policy on the budget that keeps a unit with the probability that it is worth its price.

        s_u = clip(Phi((worth_u - price * cost_u) / deviation_u)), for normally distributed worths; each pool has the
        price at which its expected cost alive meets the limit, and each cap one more, which is 0 if it does not bind.

        Args:
            worth_U, deviation_U: mean and standard deviation of what is believed of each unit.
            costs_U: what each unit is charged for, positive.

        Raises:
            BudgetError: the limit or a cap cannot be met between floor and ceiling.
        """
        return self._within_caps(
            lambda charge_U: self._priced(worth_U - charge_U, deviation_U, costs_U, floor, ceiling)
        )

    def _priced(
        self, worth_U: torch.Tensor, deviation_U: torch.Tensor, costs_U: torch.Tensor, floor: float, ceiling: float
    ) -> torch.Tensor:
        """``at_price`` without caps."""
        probs_U = torch.full_like(worth_U, ceiling)
        for pool in self.pools:
            worth, deviation, costs = (values_U[pool.index] for values_U in (worth_U, deviation_U, costs_U))
            low = ((worth - _SURE * deviation) / costs).min().item()
            high = ((worth + _SURE * deviation) / costs).max().item()

            def kept(price: float, worth: Any = worth, deviation: Any = deviation, costs: Any = costs) -> torch.Tensor:
                probs: torch.Tensor = torch.special.ndtr((worth - price * costs) / deviation)
                return probs.clamp(floor, ceiling)

            probs_U[pool.index] = kept(self._solve(kept, probs_U, pool, low, high))
        return probs_U

    def project_published(self, probs_U: torch.Tensor, *, floor: float = 0.0, ceiling: float = 1.0) -> torch.Tensor:
        """The published projection: nearest point in the plain metric whose cost is *at most* the limit.

        Solves, per pool: minimise sum (s_u - z_u)^2 subject to sum c_u s_u <= limit, floor <= s_u <= ceiling, by
        s_u = clip(z_u - v c_u), v >= 0. For units of equal cost (separate pools) this is Gao et al., 2024.
        """
        if self.caps:
            raise BudgetError("the published projection knows no caps on other costs")
        if self.space.nested:
            raise BudgetError(f"the published projection needs units that do not nest, but got {self.space.kinds}")
        shifted = probs_U.clone()
        for pool in self.pools:
            members, values = pool.index, probs_U[pool.index]
            costs = self.costs_U[members] / self.costs_U[members].mean()
            high = max(0.0, ((values - floor) / costs).max().item())

            def clipped(shift: float, values: torch.Tensor = values, costs: torch.Tensor = costs) -> torch.Tensor:
                return (values - shift * costs).clamp(floor, ceiling)

            as_is = clipped(0.0)
            within = self._cost_of(pool, shifted)(as_is) <= pool.limit
            shifted[members] = as_is if within else clipped(self._solve(clipped, shifted, pool, 0.0, high))
        return shifted

    def _within_caps(self, policy: Callable[[torch.Tensor], torch.Tensor], number: int = 0) -> torch.Tensor:
        """The policy, on the budget, that follows when units are charged the lowest prices at which the caps hold.

        Args:
            policy: takes what units are charged, ``[U]``, to a policy on the budget.
            number: the cap whose price is found here. Those of later caps are found anew at each price that is tried,
                so that the cost is exponential in the number of caps, of which there are two at most.
        """
        if number == len(self.caps):
            return policy(torch.zeros_like(self.costs_U))
        cap = self.caps[number]
        shares_U = cap.costs_U * (self.total / cap.total)

        def at(price: float) -> torch.Tensor:
            return self._within_caps(lambda charge_U: policy(charge_U + price * shares_U), number + 1)

        def excess(probs_U: torch.Tensor) -> float:
            return (torch.dot(cap.costs_U, probs_U).item() - cap.limit) / cap.total

        free_U = at(0.0)
        low, high = 0.0, _FIRST_PRICE
        at_low = at_high = excess(free_U)
        if at_low <= _CAP_RESOLUTION:
            return free_U
        for _ in range(_MOST_STEPS):
            at_high = excess(at(high))
            if at_high <= 0:
                break
            low, at_low, high = high, at_high, 4 * high
        if at_high > _CAP_RESOLUTION:
            raise BudgetError(
                f"removing {self.sparsity:g} of the prunable {self.measure}, the policy's floor and ceiling leave at "
                f"least {1 - cap.share + at_high:.3g} of {cap.name}, but only {1 - cap.share:.3g} may stay; remove "
                f"more of {self.measure}, or less of {cap.name}"
            )
        price = _falling_root(lambda price: excess(at(price)), low, high, at_low, at_high, resolution=_CAP_RESOLUTION)
        return at(price)

    def _pool_cost(self, probs_U: torch.Tensor, pool: Pool) -> float:
        alive_U = self.space.inherit(probs_U, torch.mul)
        return torch.dot(self.costs_U * pool.members_U, alive_U).item()

    def _cost_of(self, pool: Pool, probs_U: torch.Tensor) -> Callable[[torch.Tensor], float]:
        """What a pool costs, as a function of the probabilities of its members alone."""
        if not self.space.nested:
            costs = self.costs_U[pool.index]
            return lambda values: torch.dot(costs, values).item()
        trial = probs_U.clone()

        def cost(values: torch.Tensor) -> float:
            trial[pool.index] = values
            return self._pool_cost(trial, pool)

        return cost

    def _solve(
        self, clipped: Callable[[float], torch.Tensor], probs_U: torch.Tensor, pool: Pool, low: float, high: float
    ) -> float:
        """The shift at which a pool's expected cost meets its limit; the cost falls as the shift grows."""
        cost = self._cost_of(pool, probs_U)

        def excess(shift: float) -> float:
            return (cost(clipped(shift)) - pool.limit) / pool.total

        above, below = excess(low), excess(high)
        if not (above >= -_SLACK and below <= _SLACK):  # so that NaN is refused too
            keep = 1 - self.sparsity
            raise BudgetError(
                f"no probabilities between the floor and the ceiling of the policy keep {keep:.3g} of the cost of "
                f"{pool.name}: they can keep {keep + below:.3g} to {keep + above:.3g}"
            )
        return _falling_root(excess, low, high, above, below)


def _falling_root(
    function: Callable[[float], float],
    low: float,
    high: float,
    above: float,
    below: float,
    *,
    resolution: float = _RESOLUTION,
) -> float:
    """Where a falling function is zero that has the values ``above`` at ``low`` and ``below`` at ``high``.

    Regula falsi in the Illinois form (Dowell and Jarratt, 1971), and a bisection at every third step, which bounds the
    work whatever the function. On what is piecewise linear it takes a dozen evaluations.
    """
    if above <= 0:
        return low
    if below >= 0:
        return high
    last_side = 0
    for step in range(_MOST_EVALUATIONS):
        middle = low + (high - low) * above / (above - below)
        if step % 3 == 2 or not low < middle < high:
            middle = (low + high) / 2
        if not low < middle < high:
            break  # the bracket is as narrow as float64 allows
        value = function(middle)
        if abs(value) <= resolution:
            return middle
        side = 1 if value > 0 else -1
        if side > 0:
            low, above, below = middle, value, below / 2 if side == last_side else below
        else:
            high, below, above = middle, value, above / 2 if side == last_side else above
        last_side = side
    return (low + high) / 2
