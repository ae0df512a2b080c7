"""Looks at single changes to a selection: what is turned, what follows from it, and a final choice by them.

Letters: N changes, U units, W windows.
"""

import itertools
import math
import statistics

import pytest
import torch
from searches import FREE
from spaces import BLOCK_COSTS, BLOCKS, FLAT, FLAT_KINDS, SPACES, make_space, normal_numbers, random_numbers
from tolerances import EXACT, assert_close

from bernprune.policy.budget import Budget
from bernprune.policy.looks import Change, changed_masks, changes, most_changes, moves
from bernprune.policy.race import consistent_with_mask
from bernprune.policy.selection import Limits, select
from bernprune.units import UnitSpace

WIDE = make_space(FLAT_KINDS, [(3, 64), (2, 35), (1, 5)])
spaces = pytest.mark.parametrize("name", SPACES)


def looked_at(space: UnitSpace, seed: int, sparsity: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, Budget]:
    """A selection by random priorities."""
    budget, priorities_U = Budget(space, sparsity), random_numbers(space.size, seed)
    return select(priorities_U, budget, limits=FREE), priorities_U, budget


def computed(mask_U: torch.Tensor, space: UnitSpace) -> list[int]:
    """Units that nothing lies in, and all that they lie in is kept."""
    alive_U, parents = space.alive(mask_U), set(space.parents_U.tolist())
    return [unit for unit in range(space.size) if alive_U[unit] and unit not in parents]


# What is looked at


@spaces
@pytest.mark.parametrize("seed", range(5))
def test_one_thing_is_turned_at_a_time(name: str, seed: int) -> None:
    """Units of one group that were all kept or all not, whose cost is what the mask gains or loses by it."""
    space = SPACES[name]
    mask_U, priorities_U, budget = looked_at(space, seed)
    changed = changes(mask_U, priorities_U, budget, FREE)
    masks_NU = changed_masks(mask_U, changed)
    assert torch.equal(masks_NU[0], mask_U) and 0 < len(changed) <= most_changes(space)
    for change, changed_U in zip(changed, masks_NU[1:], strict=True):
        assert torch.equal((changed_U != mask_U).nonzero().flatten(), change.units.sort().values)
        assert set(space.group_U[change.units].tolist()) == {change.group}
        assert space.groups[change.group].kind == change.kind
        assert len(set(mask_U[change.units].tolist())) == 1 and (len(change.units) == 1 or change.kind == "channel")
        assert change.cost == pytest.approx(budget.alive_cost(changed_U) - budget.alive_cost(mask_U)) != 0
        assert (change.cost < 0) == bool(mask_U[change.units[0]])


@spaces
@pytest.mark.parametrize("seed", range(5))
def test_all_that_can_change_something_is_turned(name: str, seed: int) -> None:
    """Every unit but channels, unless what it lies in is removed, or nothing is left that lies in it, or the first
    layer would lose its last kv group."""
    space = SPACES[name]
    mask_U, priorities_U, budget = looked_at(space, seed)
    turned = {
        int(change.units[0]) for change in changes(mask_U, priorities_U, budget, FREE) if change.kind != "channel"
    }
    for unit in range(space.size):
        if space.groups[int(space.group_U[unit])].kind != "channel":
            other_U = mask_U.clone()
            other_U[unit] = not mask_U[unit]
            group = space.groups[int(space.group_U[unit])]
            last = (group.kind, group.layer) == ("kv_group", 0) and not other_U[space.span("kv_group", 0)].any()
            assert (unit in turned) == (computed(other_U, space) != computed(mask_U, space) and not last)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_channels_are_turned_at_the_border(sparsity: float) -> None:
    """A sixteenth of the layer's on either side, next to the border; and one always stays."""
    mask_U, priorities_U, budget = looked_at(WIDE, 3, sparsity)
    for group, members in enumerate(WIDE.by_layer("channel")):
        number = WIDE.groups.index([group_ for group_ in WIDE.groups if group_.kind == "channel"][group])
        here = [change.units for change in changes(mask_U, priorities_U, budget, FREE) if change.group == number]
        count = max(1, round(len(members) / 16))
        kept, gone = members[mask_U[members]], members[~mask_U[members]]
        wanted = [
            units
            for units in (
                kept[priorities_U[kept].argsort()][: min(count, len(kept) - 1)],
                gone[priorities_U[gone].argsort(descending=True)][:count],
            )
            if len(units)
        ]
        assert len(here) == len(wanted) and all(map(torch.equal, here, wanted))
    masks_NU = changed_masks(mask_U, changes(mask_U, priorities_U, budget, FREE))
    for members in WIDE.by_layer("channel"):
        assert masks_NU[:, members].any(1).all() or not mask_U[members].any()


@pytest.mark.parametrize("limits", [Limits(1, 2, 2), Limits(1, 5)], ids=str)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_what_limits_ask_for_is_not_turned(limits: Limits, sparsity: float) -> None:
    """No change leaves a layer with less; what goes beyond may go, and what is gone may come back."""
    budget, priorities_U = Budget(WIDE, sparsity), random_numbers(WIDE.size, 2)
    mask_U = select(priorities_U, budget, limits=limits)
    masks_NU = changed_masks(mask_U, changes(mask_U, priorities_U, budget, limits))
    for group, span in zip(WIDE.groups, WIDE.spans, strict=True):
        kept, least = int(mask_U[span].sum()), limits.minimum(group)
        fewest, most = masks_NU[:, span].sum(1).aminmax()
        assert least <= fewest and (fewest < kept) == (kept > least) and (most > kept) == (kept < group.count)


# What follows


def losses_of(masks_NU: torch.Tensor, worth_U: torch.Tensor, space: UnitSpace) -> torch.Tensor:
    """Where every unit that is alive saves its worth, ``[N]``."""
    return -(space.inherit(masks_NU.double(), torch.mul) @ worth_U)


def moves_by_hand(
    priorities: list[float], changed: list[Change], losses: list[list[float]], space: UnitSpace
) -> list[float]:
    """The same by lists."""
    surprises, noises = [], []
    for change, of_change in zip(changed, losses[1:], strict=True):
        gains = [before - after for before, after in zip(losses[0], of_change, strict=True)]
        believed = statistics.mean(priorities[unit] for unit in change.units.tolist())
        surprises.append(statistics.mean(gains) / change.cost - believed)
        noises.append(statistics.variance(gains) / len(gains) / change.cost**2)
    found = [0.0] * len(priorities)
    for change, surprise in zip(changed, surprises, strict=True):
        alike = [number for number, other in enumerate(changed) if other.kind == change.kind]
        noise = statistics.mean(noises[number] for number in alike)
        middle = sorted(abs(surprises[number]) for number in alike)[(len(alike) - 1) // 2] / 0.6744897501960817
        typical = max(0.0, 1 - noise / middle**2) if middle else 0.0
        garrote = max(0.0, 1 - noise / surprise**2) if surprise else 0.0
        move = surprise * max(typical, garrote)
        if change.kind == "channel":
            looks = sum(other.group == change.group for other in changed)
            for unit in range(space.starts[change.group], space.starts[change.group + 1]):
                found[unit] += move / looks
        else:
            found[int(change.units[0])] += move
    return found


@spaces
@pytest.mark.parametrize("noise", [0.0, 0.1, 3.0])
def test_moves_against_a_slow_twin(name: str, noise: float) -> None:
    space = SPACES[name]
    mask_U, priorities_U, budget = looked_at(space, 1)
    changed = changes(mask_U, priorities_U, budget, FREE)
    losses_NW = losses_of(changed_masks(mask_U, changed), normal_numbers(space.size, seed=2), space)[:, None]
    losses_NW = losses_NW + noise * normal_numbers(len(changed) + 1, 7, seed=3)
    found_U = moves(priorities_U, changed, losses_NW, space)
    wanted = moves_by_hand(priorities_U.tolist(), changed, losses_NW.tolist(), space)
    assert found_U.any()
    assert_close(found_U, torch.tensor(wanted, dtype=torch.float64), EXACT)


@pytest.mark.parametrize("lost", [math.inf, math.nan])
def test_of_a_loss_that_is_not_finite_nothing_is_believed(lost: float) -> None:
    """What was seen of the other changes counts as if that one had not been looked at; of the mask's own, nothing."""
    mask_U, priorities_U, budget = looked_at(FLAT, 1)
    changed = changes(mask_U, priorities_U, budget, FREE)
    losses_NW = normal_numbers(len(changed) + 1, 7, seed=3)
    expected_U = moves(priorities_U, changed[1:], torch.cat([losses_NW[:1], losses_NW[2:]]), FLAT)
    losses_NW[1, 4] = lost
    assert torch.equal(moves(priorities_U, changed, losses_NW, FLAT), expected_U) and expected_U.any()
    losses_NW[0, 2] = lost
    assert not moves(priorities_U, changed, losses_NW, FLAT).any()


def test_without_noise_single_units_are_known() -> None:
    """The priority of a kv group becomes its worth for its cost, whatever was believed."""
    mask_U, priorities_U, budget = looked_at(FLAT, 4)
    worth_U, at = normal_numbers(FLAT.size, seed=5), FLAT.of_kind("kv_group")
    changed = changes(mask_U, priorities_U, budget, FREE)
    losses_NW = losses_of(changed_masks(mask_U, changed), worth_U, FLAT)[:, None].expand(-1, 2)
    known_U = priorities_U + moves(priorities_U, changed, losses_NW, FLAT)
    assert_close(known_U[at], (worth_U / budget.costs_U)[at], EXACT)


@spaces
def test_what_was_right_is_left_alone(name: str) -> None:
    """Priorities that say what is seen do not move, nor do any where the losses do not tell masks apart."""
    space = SPACES[name]
    mask_U, _, budget = looked_at(space, 6)
    priorities_U = torch.full((space.size,), 0.25, dtype=torch.float64)  # of all that is alive, for its cost
    changed = changes(mask_U, priorities_U, budget, FREE)
    masks_NU = changed_masks(mask_U, changed)
    losses_N = torch.tensor([-0.25 * budget.alive_cost(changed_U) for changed_U in masks_NU], dtype=torch.float64)
    moves_U = moves(priorities_U, changed, losses_N[:, None].expand(-1, 3), space)
    assert moves_U.abs().max() < 1e-9
    level_NW = torch.ones(len(masks_NU), 3, dtype=torch.float64)
    assert not moves(torch.zeros_like(priorities_U), changed, level_NW, space).any()


@pytest.mark.parametrize(("size", "most"), [(0.0, 0.6), (3.0, 1.1)], ids=["nothing", "clear"])
def test_noise_is_not_believed(size: float, most: float) -> None:
    """Of changes that do nothing, about half of the noise is taken out; of clear ones nothing is lost."""
    blocks = make_space(("attention", "ffn"), [(1, 1)] * 40, BLOCK_COSTS)
    mask_U, _, budget = looked_at(blocks, 7)
    nothing_U = torch.zeros(blocks.size, dtype=torch.float64)
    changed = changes(mask_U, nothing_U, budget, FREE)
    costs_N = torch.tensor([change.cost for change in changed], dtype=torch.float64)
    at = torch.cat([change.units for change in changed])
    errors, noises = [], []
    for seed in range(20):
        truth_N = size / 4 * normal_numbers(len(changed), seed=seed + 100)  # a mean over 16 windows is off by 1/4
        noise_NW = normal_numbers(len(changed), 16, seed=seed)
        losses_NW = torch.cat([torch.zeros(1, 16, dtype=torch.float64), noise_NW - truth_N[:, None]])
        errors.append(moves(nothing_U, changed, losses_NW, blocks)[at] * costs_N - truth_N)
        noises.append(noise_NW.mean(1))
    assert torch.cat(errors).square().mean() < most * torch.cat(noises).square().mean()


def test_a_step_ends_where_the_worths_say() -> None:
    """Of single units without noise: a full step from any selection selects the best for their cost."""
    mask_U, priorities_U, budget = looked_at(BLOCKS, 8)
    worth_U = random_numbers(BLOCKS.size, 9)
    changed = changes(mask_U, priorities_U, budget, FREE)
    losses_NW = losses_of(changed_masks(mask_U, changed), worth_U, BLOCKS)[:, None].expand(-1, 2)
    stepped_U = select(priorities_U + moves(priorities_U, changed, losses_NW, BLOCKS), budget, limits=FREE)
    assert torch.equal(stepped_U, select(worth_U / budget.costs_U, budget, limits=FREE))
    assert not torch.equal(stepped_U, mask_U)


# Priorities that agree with a selection


@spaces
@pytest.mark.parametrize("seed", range(5))
def test_priorities_made_to_agree(name: str, seed: int) -> None:
    """They select the mask, if what it keeps comes first among equals; those that did so anyway are not touched."""
    space = SPACES[name]
    mask_U, priorities_U, budget = looked_at(space, seed)
    others_U = random_numbers(space.size, seed + 100)
    for given_U in (priorities_U, others_U):
        agreed_U = consistent_with_mask(given_U, mask_U, budget, FREE)
        assert agreed_U[mask_U].min() >= agreed_U[~mask_U].max()
        assert all(
            agreed_U[one] <= agreed_U[other]
            for one, other in itertools.product(range(space.size), repeat=2)
            if given_U[one] <= given_U[other] and mask_U[one] == mask_U[other]
        )
