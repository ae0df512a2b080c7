"""From priorities to what is kept: exact, deterministic, never over the budget, short of it only by what fits no more.

Units are taken in order of their priority until the budget is full; one that no longer fits, a layer with the minimums
of what lies in it, is passed over for a smaller one behind it. A unit counts as wanted only as much as the least wanted
thing it lies in, which is the order in which lowering one threshold over all levels would let units in. Where that
would break a cap of the budget on another cost, units are moved back by a price on what they have of it, and what no
longer fits under it is passed over, too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bernprune.errors import BudgetError
from bernprune.policy.budget import Budget, Cap
from bernprune.policy.prices import at_best_prices
from bernprune.units import KINDS, UnitGroup, UnitSpace

_BESIDES = " (a kv group of layer 0 always stays)"  # whatever the minimums are


@dataclass(frozen=True)
class Limits:
    """What every selection must honour.

    Attributes:
        min_kv_groups, min_channels: kept in each layer, unless a coarser unit removes the whole block, or is kept with
            nothing in the block because the budget ends there. The first layer keeps a kv group in any case: caches
            take their length from it.
        channel_multiple: the kept channels of each layer are a multiple of it.
    """

    min_kv_groups: int = 1
    min_channels: int = 1
    channel_multiple: int = 1

    def __post_init__(self) -> None:
        """Raises ``BudgetError``."""
        for name, least in (("min_kv_groups", 0), ("min_channels", 0), ("channel_multiple", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise BudgetError(f"{name} must be a whole number of {least} or more, but is {value!r}")

    def minimum(self, group: UnitGroup) -> int:
        """How many units of a group must be kept, in whole multiples. Raises ``BudgetError`` if it has fewer."""
        if group.kind == "kv_group":
            minimum, multiple = max(self.min_kv_groups, 1 if group.layer == 0 else 0), 1
        elif group.kind == "channel":
            minimum, multiple = self.min_channels, self.channel_multiple
        else:
            return 0
        minimum = math.ceil(minimum / multiple) * multiple
        if minimum > group.count:
            raise BudgetError(
                f"layer {group.layer} has {group.count} units of kind {group.kind!r}, fewer than the {minimum} that "
                f"the minimum per layer{f' in multiples of {multiple}' if multiple > 1 else ''} asks for"
            )
        return minimum


@dataclass(frozen=True)
class _Parts:
    """Units of one group that are kept or cut together, P such parts in the order of their turns.

    A group of 7 channels with a minimum of 2 and multiples of 2 has three parts, of its best two, the next two and the
    two after those; the seventh can never be kept.

    Attributes:
        ranked_U: all units, those of a group together and the most wanted first.
        together: by the turn of a layer's part, those of it and of the minimums that it is not kept without.
        first_P, size_P: where in ``ranked_U`` a part begins, and how many units it has.
        cost_P: cost of all its units.
        group_P, pool_P, parent_P: what its units belong to; parent -1 where they lie in nothing.
        forced_P: whether the limits ask for them.
    """

    ranked_U: np.ndarray
    together: dict[int, list[int]]
    first_P: np.ndarray
    size_P: np.ndarray
    cost_P: np.ndarray
    group_P: np.ndarray
    pool_P: np.ndarray
    parent_P: np.ndarray
    forced_P: np.ndarray

    def units(self, parts: np.ndarray | list[int]) -> np.ndarray:
        """The units of some parts, given by their turns."""
        sizes = self.size_P[parts]
        within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
        return self.ranked_U[np.repeat(self.first_P[parts], sizes) + within]

    @property
    def forced_U(self) -> torch.Tensor:
        """Units that the limits ask for, bool."""
        forced_U = torch.zeros(len(self.ranked_U), dtype=torch.bool)
        forced_U[self.units(np.flatnonzero(self.forced_P))] = True
        return forced_U


def select(
    priorities_U: torch.Tensor,
    budget: Budget,
    *,
    limits: Limits | None = None,
    tie_break_U: torch.Tensor | None = None,
    core_U: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mask, bool ``[U]``, that keeps the most wanted units within the budget.

    Args:
        priorities_U: larger is kept; keep probabilities, worths for their cost or scores.
        tie_break_U: decides between equal priorities (larger is kept), e.g. the initial scores; then the unit's index.
        core_U: a selection of some other budget, bool. What it keeps comes first, and the first that no longer fits
            ends the selection: then what is kept at any budget is part of what is kept at a larger one. Under caps
            that bind that holds between the core and each other selection only, as prices follow from the budget.

    Raises:
        BudgetError: what the limits force to be kept costs more than the budget allows, or does not exist.
    """
    size = budget.space.size
    for values_U in (priorities_U, tie_break_U):
        if values_U is not None and (values_U.shape != (size,) or not values_U.isfinite().all()):
            raise BudgetError(
                f"{size} finite priorities are needed, but got {tuple(values_U.shape)} or some not finite"
            )
    if core_U is not None:
        if core_U.shape != (size,):
            raise BudgetError(f"the core must be a selection of {size} units, but is {list(core_U.shape)}")
        core_U = core_U.bool()
    limits = limits or Limits()
    parts = _parts(priorities_U, budget, limits, tie_break_U, core_U)
    mask_U = _taken(parts, budget, (), nested=core_U is not None)
    if all(cap.allows(mask_U) for cap in budget.caps):
        return mask_U
    sure_U = parts.forced_U if core_U is None else parts.forced_U | core_U.cpu()
    parts = _parts(_charged(priorities_U, budget, sure_U), budget, limits, tie_break_U, core_U)
    return _taken(parts, budget, budget.caps, nested=core_U is not None)


def _taken(parts: _Parts, budget: Budget, caps: Sequence[Cap], *, nested: bool) -> torch.Tensor:
    """Part after part, what fits; where it is ``nested``, up to the first that does not."""
    costs_PL = _costs(parts, budget, caps)
    left_L = np.array([limited.most for limited in (*budget.pools, *caps)])
    sure_P = _sure(parts, costs_PL, left_L)
    left_L -= costs_PL[sure_P].sum(0)
    kept_U = np.zeros(budget.space.size, dtype=bool)
    kept_U[parts.units(np.flatnonzero(sure_P))] = True
    least, pools = parts.cost_P.min(initial=math.inf), len(budget.pools)
    closed = set[int]()  # groups of which a part did not fit
    ended = set[int]()  # pools that end there
    taken = set[int]()  # parts that came with their layer
    for part in np.flatnonzero(~sure_P).tolist():
        group, pool, parent = int(parts.group_P[part]), int(parts.pool_P[part]), int(parts.parent_P[part])
        if group in closed or pool in ended or part in taken or (parent >= 0 and not kept_U[parent]):
            continue
        together = parts.together.get(part, [part])
        cost_L = costs_PL[together].sum(0)
        fits_L = cost_L <= left_L
        if fits_L.all():
            left_L -= cost_L
            taken.update(together)
            kept_U[parts.units(together)] = True
            continue
        within = bool(fits_L[pools:].all())
        if parts.forced_P[part]:
            forced_L = costs_PL[parts.forced_P].sum(0)
            raise _impossible(budget, pool, forced_L[pool]) if within else _over_a_cap(caps, forced_L[pools:])
        closed.add(group)  # what follows in the group costs as much, or stands on the minimum just refused
        if nested and within:
            ended.add(pool)
        if left_L[:pools].max() < least:
            break
    return torch.from_numpy(kept_U)


def _sure(parts: _Parts, costs_PL: np.ndarray, most_L: np.ndarray) -> np.ndarray:
    """Parts that are kept whatever becomes of others, as all up to their turn fit in each limit that they count in.

    To take them first changes nothing: one that is not sure runs out of a limit in which none behind it is.
    """
    turn_P = np.arange(len(costs_PL))
    for turn, together in parts.together.items():
        turn_P[together] = turn
    at_turn_PL = np.zeros_like(costs_PL)
    np.add.at(at_turn_PL, turn_P, costs_PL)
    sure_P: np.ndarray = ((at_turn_PL.cumsum(0) <= most_L) | (at_turn_PL == 0)).all(1)[turn_P]
    part_of_U = np.zeros(len(parts.ranked_U), dtype=np.int64)
    part_of_U[parts.ranked_U[parts.first_P]] = np.arange(len(costs_PL))  # what holds others is a part of its own
    lies_P, within_P = parts.parent_P >= 0, part_of_U[parts.parent_P]
    for _ in KINDS:  # as deep as units may lie in one another
        sure_P &= ~lies_P | sure_P[within_P]
    return sure_P


def _costs(parts: _Parts, budget: Budget, caps: Sequence[Cap]) -> np.ndarray:
    """What each part takes of each limit, those of the pools and then those of the caps, ``[P, L]``."""
    best_P = parts.ranked_U[parts.first_P]
    of_pools = [np.where(parts.pool_P == pool, parts.cost_P, 0.0) for pool in range(len(budget.pools))]
    of_caps = [cap.costs_U.numpy()[best_P] * parts.size_P for cap in caps]
    return np.stack([*of_pools, *of_caps], axis=1)


def _impossible(budget: Budget, index: int, forced: float) -> BudgetError:
    pool = budget.pools[index]
    besides = _BESIDES if (pool.members_U & budget.space.of_kind("kv_group")).any() else ""
    return BudgetError(
        f"the minimums per layer keep {forced / pool.total:.1%} of the {budget.measure} of {pool.name}, more than the "
        f"{1 - budget.sparsity:.1%} that sparsity {budget.sparsity:g} leaves; lower the minimums or the sparsity"
        f"{besides}"
    )


def _over_a_cap(caps: Sequence[Cap], forced_M: np.ndarray) -> BudgetError:
    cap, forced = next(pair for pair in zip(caps, forced_M, strict=True) if pair[1] > pair[0].most)
    besides = _BESIDES if cap.name == "kv_cache" else ""
    return BudgetError(
        f"the minimums per layer keep {forced / cap.total:.1%} of {cap.name}, more than the "
        f"{1 - cap.share:.1%} that may stay of it; lower the minimums, or how much of it must go{besides}"
    )


def _charged(priorities_U: torch.Tensor, budget: Budget, sure_U: torch.Tensor) -> torch.Tensor:
    """Priorities less the prices of the caps, each times what a unit has of that cost for its own.

    Units that are kept for sure have no part in what the prices follow from, and stay before the others.
    """
    values_U, open_U = priorities_U.double().cpu(), ~sure_U
    values_U = values_U - values_U.min()
    span = max(float(values_U.max()), 1e-9)
    worth_U = (values_U + span) * budget.costs_U  # all worth something: the budget is to be filled
    costs_MU = torch.stack([budget.costs_U / budget.total, *(cap.costs_U / cap.total for cap in budget.caps)])
    limits_M = torch.tensor(
        [budget.most / budget.total, *(cap.most / cap.total for cap in budget.caps)], dtype=torch.float64
    )
    left_M = (limits_M - costs_MU[:, sure_U].sum(1)).clamp(min=0)
    charged_O = at_best_prices(worth_U[open_U], costs_MU[:, open_U], left_M) / budget.costs_U[open_U]
    charged_U = values_U + (charged_O.max() + span if len(charged_O) else 0.0)
    charged_U[open_U] = charged_O
    return charged_U


def _parts(
    priorities_U: torch.Tensor,
    budget: Budget,
    limits: Limits,
    tie_break_U: torch.Tensor | None,
    core_U: torch.Tensor | None,
) -> _Parts:
    """Each group's minimum in one part, then a multiple a part, best units first; a remainder can never be kept."""
    space, priorities_U = budget.space, priorities_U.double().cpu()
    own_U, wanted_U = priorities_U.numpy(), space.inherit(priorities_U, torch.minimum).numpy()
    second_U = np.zeros(space.size) if tie_break_U is None else tie_break_U.double().cpu().numpy()
    later_U = np.ones(space.size, dtype=bool) if core_U is None else ~core_U.cpu().numpy()
    ranked_U = np.lexsort((-second_U, -own_U, -wanted_U, later_U, space.group_U.numpy()))  # equals as they come
    minimum_G = np.array([limits.minimum(group) for group in space.groups])
    multiple_G = np.array([limits.channel_multiple if group.kind == "channel" else 1 for group in space.groups])
    starts_G, counts_G = np.array(space.starts[:-1]), np.array([group.count for group in space.groups])
    parts_G = (minimum_G > 0) + (counts_G - minimum_G) // multiple_G
    group_P = np.repeat(np.arange(len(parts_G)), parts_G)
    number_P = np.arange(len(group_P)) - np.repeat(parts_G.cumsum() - parts_G, parts_G)
    required_P = (number_P == 0) & (minimum_G > 0)[group_P]
    earlier_P = number_P - (minimum_G > 0)[group_P]  # parts of a multiple
    first_P = starts_G[group_P] + np.where(required_P, 0, minimum_G[group_P] + earlier_P * multiple_G[group_P])
    size_P = np.where(required_P, minimum_G[group_P], multiple_G[group_P])
    best_P = ranked_U[first_P]
    parent_P = space.parents_U.numpy()[best_P]
    cost_P = budget.costs_U.numpy()[best_P] * size_P
    pool_P = torch.stack([pool.members_U for pool in budget.pools]).int().argmax(0).numpy()[best_P]
    # A mean must not exceed its largest value by rounding, or children would come before their parent.
    mean_P = np.minimum(wanted_U[best_P], _sums(wanted_U[ranked_U], first_P, size_P) / size_P)
    turn_P = np.where(required_P & (parent_P >= 0), wanted_U[parent_P], mean_P)
    forced_P, later_P = required_P & (parent_P < 0), _sums(later_U[ranked_U], first_P, size_P) > 0
    # Of equals, what contains others comes before them; of kinds that lie side by side, none comes before another.
    depth_P = np.array([KINDS.index(group.kind) if space.nested else 0 for group in space.groups])[group_P]
    order_P = np.lexsort((best_P, -second_U[best_P], -own_U[best_P], depth_P, -turn_P, later_P, ~forced_P))
    columns = (first_P, size_P, cost_P, group_P, pool_P, parent_P, forced_P)
    together = _layers_with_minimums(space, best_P, required_P, later_P, order_P)
    return _Parts(ranked_U, together, *(column[order_P] for column in columns))


def _layers_with_minimums(
    space: UnitSpace, best_P: np.ndarray, asked_P: np.ndarray, later_P: np.ndarray, order_P: np.ndarray
) -> dict[int, list[int]]:
    """Turns of a layer's part and of those in it that the limits ask for, unless a core has kept it without them."""
    layer_U = space.of_kind("layer").numpy()
    parents_U = space.parents_U.numpy()
    turn_P = order_P.argsort()
    part_of = {int(best_P[part]): part for part in np.flatnonzero(layer_U[best_P])}
    together: dict[int, list[int]] = {}
    for part in np.flatnonzero(asked_P):
        layer = part_of.get(int(parents_U[best_P[part]]))
        if layer is not None and later_P[part] == later_P[layer]:
            turn = int(turn_P[layer])
            together.setdefault(turn, [turn]).append(int(turn_P[part]))
    return together


def _sums(values_U: np.ndarray, first_P: np.ndarray, size_P: np.ndarray) -> np.ndarray:
    """Sums of the values of each part."""
    sums_P: np.ndarray = values_U[first_P].astype(np.float64)
    for part in np.flatnonzero(size_P > 1):
        sums_P[part] = math.fsum(values_U[first_P[part] : first_P[part] + size_P[part]])
    return sums_P
