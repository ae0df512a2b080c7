"""From priorities to what is kept: exact, deterministic, never over the budget, and short of it by what fits no more.

Units are taken in order of their priority until the budget is full; one that no longer fits is passed over for a
smaller one behind it. A unit counts as wanted only as much as the least wanted thing it lies in, which is the order in
which lowering one threshold over all levels would let units in.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bernprune.errors import BudgetError
from bernprune.names import Kind
from bernprune.policy.budget import Budget
from bernprune.units import KINDS


@dataclass(frozen=True)
class Limits:
    """What every selection must honour.

    Attributes:
        min_kv_groups, min_channels: kept in each layer, unless a coarser unit removes the whole block. The first
            layer keeps a kv group in any case: caches take their length from it.
        channel_multiple: the kept channels of each layer are a multiple of it.
    """

    min_kv_groups: int = 1
    min_channels: int = 1
    channel_multiple: int = 1


@dataclass(frozen=True)
class _Item:
    """Units of one group that are kept or cut together, with all that decides when their turn comes."""

    order: tuple[float, ...]
    units: tuple[int, ...]
    cost: float
    pool: int
    group: int
    parent: int
    forced: bool


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
            ends the selection: then what is kept at any budget is part of what is kept at a larger one.

    Raises:
        BudgetError: what the limits force to be kept costs more than the budget allows, or does not exist.
    """
    size = budget.space.size
    for values_U in (priorities_U, tie_break_U):
        if values_U is not None and (values_U.shape != (size,) or not values_U.isfinite().all()):
            raise BudgetError(
                f"{size} finite priorities are needed, but got {tuple(values_U.shape)} or some not finite"
            )
    items = sorted(_items(priorities_U, budget, limits or Limits(), tie_break_U, core_U), key=lambda item: item.order)
    left = [pool.most for pool in budget.pools]
    kept, closed = bytearray(size), set[int]()
    for item in items:
        orphan = item.parent >= 0 and not kept[item.parent]
        if orphan or item.group in closed:
            continue
        if item.cost > left[item.pool]:
            if item.forced:
                raise _impossible(items, budget, item.pool)
            closed.add(item.group)  # what follows in the group costs as much, or stands on the minimum just refused
            if core_U is not None:
                left[item.pool] = -math.inf
            continue
        left[item.pool] -= item.cost
        for unit in item.units:
            kept[unit] = 1
    return torch.tensor(list(kept), dtype=torch.bool)


def _impossible(items: list[_Item], budget: Budget, index: int) -> BudgetError:
    pool = budget.pools[index]
    forced = sum(item.cost for item in items if item.forced and item.pool == index)
    return BudgetError(
        f"the minimums per layer keep {forced / pool.total:.1%} of the {budget.measure} of {pool.name}, more than the "
        f"{1 - budget.sparsity:.1%} that sparsity {budget.sparsity:g} leaves; lower the minimums or the sparsity"
    )


def _items(
    priorities_U: torch.Tensor,
    budget: Budget,
    limits: Limits,
    tie_break_U: torch.Tensor | None,
    core_U: torch.Tensor | None,
) -> Iterator[_Item]:
    space, priorities_U = budget.space, priorities_U.double().cpu()
    wanted = space.inherit(priorities_U, torch.minimum).tolist()
    second_U = torch.zeros_like(priorities_U) if tie_break_U is None else tie_break_U.double().cpu()
    core = [False] * space.size if core_U is None else core_U.tolist()
    own, second, parents = priorities_U.tolist(), second_U.tolist(), space.parents_U.tolist()
    pools = torch.stack([pool.members_U for pool in budget.pools]).int().argmax(0).tolist()
    costs = budget.costs_U.tolist()
    for index, (group, start) in enumerate(zip(space.groups, space.starts, strict=False)):
        depth, parent = KINDS.index(group.kind), parents[start]
        order = {u: (not core[u], -wanted[u], -own[u], -second[u], u) for u in range(start, start + group.count)}
        units = sorted(order, key=order.__getitem__)
        minimum = _minimum(group.kind, group.layer, group.count, limits)
        for part in _parts(units, minimum, limits.channel_multiple if group.kind == "channel" else 1):
            required = minimum > 0 and part[0] == units[0]
            best, forced = part[0], required and parent < 0
            # A mean must not exceed its largest value by rounding, or children would come before their parent.
            mean = min(wanted[best], sum(wanted[u] for u in part) / len(part))
            turn = wanted[parent] if required and parent >= 0 else mean
            yield _Item(
                order=(not forced, not all(core[u] for u in part), -turn, depth, -own[best], -second[best], best),
                units=tuple(part),
                cost=costs[start] * len(part),
                pool=pools[start],
                group=index,
                parent=parent,
                forced=forced,
            )


def _minimum(kind: Kind, layer: int, count: int, limits: Limits) -> int:
    """How many units of this group a layer must keep, in whole multiples."""
    if kind == "kv_group":
        minimum, multiple = max(limits.min_kv_groups, 1 if layer == 0 else 0), 1
    elif kind == "channel":
        minimum, multiple = limits.min_channels, limits.channel_multiple
    else:
        return 0
    minimum = math.ceil(minimum / multiple) * multiple
    if minimum > count:
        raise BudgetError(
            f"layer {layer} has {count} units of kind {kind!r}, fewer than the {minimum} that the minimum per layer"
            f"{f' in multiples of {multiple}' if multiple > 1 else ''} asks for"
        )
    return minimum


def _parts(units: list[int], minimum: int, multiple: int) -> Iterator[list[int]]:
    """Best units first: the minimum in one part, then a multiple each; a remainder can never be kept."""
    if minimum:
        yield units[:minimum]
    for start in range(minimum, len(units) - multiple + 1, multiple):
        yield units[start : start + multiple]
