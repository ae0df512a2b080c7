"""What must hold for every selection, checked from outside: by loops over groups, against costs counted here."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from spaces import alive_by_hand, of_kind

from bernprune.policy.budget import Budget
from bernprune.policy.selection import Limits
from bernprune.units import UnitGroup, UnitSpace


@dataclass(frozen=True)
class Selected:
    """One group after a selection: its units, what was kept of them, and of what they lie in."""

    group: UnitGroup
    units: range
    kept: list[int]
    has_parent: bool
    parent_is_block: bool
    parent_kept: bool


def selected(space: UnitSpace, mask_U: torch.Tensor) -> Iterator[Selected]:
    start = 0
    for group in space.groups:
        units = range(start, start + group.count)
        start += group.count
        parent = int(space.parents_U[units[0]])
        kept = [unit for unit in units if mask_U[unit]]
        in_block = parent >= 0 and not of_kind(space, "layer")[parent]
        yield Selected(group, units, kept, parent >= 0, bool(in_block), parent < 0 or bool(mask_U[parent]))


def minimum_of(group: UnitGroup, limits: Limits) -> int:
    if group.kind == "kv_group":
        return max(limits.min_kv_groups, int(group.layer == 0))
    if group.kind == "channel":
        return math.ceil(limits.min_channels / limits.channel_multiple) * limits.channel_multiple
    return 0


def step_of(group: UnitGroup, limits: Limits) -> int:
    return limits.channel_multiple if group.kind == "channel" else 1


def pool_limits(budget: Budget) -> Iterator[tuple[torch.Tensor, float]]:
    """Members and limit of each pool, computed here."""
    costs_U = budget.space.costs_U(budget.measure)
    separate = len(budget.pools) > 1
    everything = torch.ones(budget.space.size, dtype=torch.bool)
    members = [of_kind(budget.space, kind) for kind in budget.space.kinds] if separate else [everything]
    for members_U in members:
        yield members_U, (1 - budget.sparsity) * costs_U[members_U].sum().item()


def check(mask_U: torch.Tensor, budget: Budget, limits: Limits) -> None:
    """Everything that must hold for every selection."""
    space, costs_U = budget.space, budget.space.costs_U(budget.measure)
    assert mask_U.dtype == torch.bool
    assert mask_U.shape == (space.size,)
    assert alive_by_hand(space, mask_U.tolist()) == mask_U.tolist()  # nothing is kept in a block that is cut
    pools = list(pool_limits(budget))
    left_P = [limit - costs_U[members_U & mask_U].sum().item() for members_U, limit in pools]
    assert all(left >= -1e-12 * limit for left, (_, limit) in zip(left_P, pools, strict=True))
    for group in selected(space, mask_U):
        check_group(group, limits)
        if more := further(space, group, limits):
            costs_P = [costs_U[more][members_U[more]].sum().item() for members_U, _ in pools]
            assert any(cost > left * (1 - 1e-12) for cost, left in zip(costs_P, left_P, strict=True) if cost)


def check_group(found: Selected, limits: Limits) -> None:
    """The limits are kept. A block, but no layer, may be kept with nothing in it."""
    kept, minimum = len(found.kept), minimum_of(found.group, limits)
    assert kept % step_of(found.group, limits) == 0
    assert kept >= minimum or (kept == 0 and (not found.parent_kept or found.parent_is_block))


def further(space: UnitSpace, found: Selected, limits: Limits) -> list[int]:
    """What else might have been kept of a group: a part of it, a layer with the minimums in it; none if nothing can."""
    minimum, step = minimum_of(found.group, limits), step_of(found.group, limits)
    part = minimum if minimum and not found.kept else step
    more = [unit for unit in found.units if unit not in found.kept][:part]
    if not found.parent_kept or len(more) < part:
        return []
    if found.group.kind == "layer":
        for inner in selected(space, torch.zeros(space.size, dtype=torch.bool)):
            if space.parents_U[inner.units[0]] == more[0]:
                more += inner.units[: minimum_of(inner.group, limits)]
    return more


def wanted_by_hand(space: UnitSpace, probs_U: torch.Tensor) -> list[float]:
    """The least priority among each unit and all it lies in."""
    wanted, parents = probs_U.tolist(), space.parents_U.tolist()
    for unit, parent in enumerate(parents):  # a parent precedes its children
        wanted[unit] = min(wanted[unit], wanted[parent]) if parent >= 0 else wanted[unit]
    return wanted


def check_best(mask_U: torch.Tensor, space: UnitSpace, probs_U: torch.Tensor, second_U: torch.Tensor | None) -> None:
    """Within a group, no unit is kept before a more wanted one, nor before an equal one with a better tie-break."""
    own, wanted = probs_U.tolist(), wanted_by_hand(space, probs_U)
    second = [0.0] * space.size if second_U is None else second_U.tolist()
    for found in selected(space, mask_U):
        order = sorted(found.units, key=lambda u: (-wanted[u], -own[u], -second[u], u))
        assert set(found.kept) == set(order[: len(found.kept)])
