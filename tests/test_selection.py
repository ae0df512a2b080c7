"""The selection keeps the most wanted units, fills its budget to within one part of a group, and honours its limits."""

import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch
from searches import FREE
from selection_checks import check, check_best, minimum_of, pool_limits, selected
from spaces import (
    BLOCK_COSTS,
    COSTS,
    FLAT,
    FLAT_KINDS,
    NESTED,
    SPACES,
    TINY_NESTED,
    alive_by_hand,
    make_space,
    of_kind,
    random_numbers,
)

from bernprune.errors import BudgetError
from bernprune.names import Kind, Measure, Pools
from bernprune.policy.budget import Budget
from bernprune.policy.selection import Limits, select
from bernprune.units import KINDS, UnitSpace

ROUNDING = 1 + 1e-12

all_spaces = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)


# Everything combined


@dataclass(frozen=True)
class Case:
    space: UnitSpace
    sparsity: float
    measure: Measure
    pools: Pools
    limits: Limits
    probs_U: torch.Tensor
    second_U: torch.Tensor | None


def random_case(seed: int) -> Case:
    """Sizes, kinds, budget, limits and priorities by chance; a third of the priorities are tied."""
    rng = random.Random(seed)
    kinds = rng.sample(KINDS, rng.randint(1, 5)) if seed % 3 else list(FLAT_KINDS)
    if set(kinds) <= {"layer", "attention"}:
        kinds.append("ffn")  # the first layer alone has neither of them
    shapes = [(rng.randint(1, 4), rng.randint(1, 13)) for _ in range(rng.randint(1, 5))]
    costs = {kind: (rng.randint(kind in FLAT_KINDS, 20), float(rng.randint(1, 30))) for kind in KINDS}
    space = make_space(kinds, shapes, COSTS if set(kinds) & set(FLAT_KINDS) and seed % 7 else BLOCK_COSTS | costs)
    multiple = rng.choice([1, 1, 2, 3, 4])
    limits = Limits(rng.randint(0, 2), rng.randint(0, 3), multiple)
    probs_U = random_numbers(space.size, seed)
    if seed % 3 == 1:
        probs_U = (3 * probs_U).round() * 0.1 + 0.1  # 0.1 three times, summed and divided by 3, exceeds 0.1
    second_U = (2 * random_numbers(space.size, seed + 10_000)).round() if seed % 2 else None
    measure: Measure = "parameters" if seed % 5 else "flops"
    pools: Pools = "separate" if not space.nested and seed % 4 == 0 else "joint"
    return Case(space, rng.uniform(0.03, 0.9), measure, pools, limits, probs_U, second_U)


def too_much_is_forced(budget: Budget, limits: Limits) -> bool:
    """Whether the minimums of units that lie in nothing exceed a limit, or a minimum exceeds what there is."""
    groups = list(selected(budget.space, torch.ones(budget.space.size, dtype=torch.bool)))
    if any(minimum_of(found.group, limits) > found.group.count for found in groups):
        return True
    costs_U = budget.space.costs_U(budget.measure)
    for members_U, limit in pool_limits(budget):
        mine = [found for found in groups if members_U[found.units[0]] and not found.has_parent]
        if sum(minimum_of(found.group, limits) * costs_U[found.units[0]].item() for found in mine) > limit * ROUNDING:
            return True
    return False


@pytest.mark.parametrize("decade", range(20))
def test_everything_combined(decade: int) -> None:
    """Of 400 random cases each is selected within its budget and limits, or impossible and refused."""
    outcomes = set[bool]()
    for seed in range(20 * decade, 20 * decade + 20):
        case = random_case(seed)
        budget = Budget(case.space, case.sparsity, measure=case.measure, pools=case.pools)
        impossible = too_much_is_forced(budget, case.limits)
        outcomes.add(impossible)
        if impossible:
            with pytest.raises(BudgetError):
                select(case.probs_U, budget, limits=case.limits, tie_break_U=case.second_U)
            continue
        mask_U = select(case.probs_U, budget, limits=case.limits, tie_break_U=case.second_U)
        check(mask_U, budget, case.limits)
        check_best(mask_U, case.space, case.probs_U, case.second_U)
    assert False in outcomes


# The budget


@all_spaces
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7])
def test_the_gap_is_less_than_one_unit(space: UnitSpace, sparsity: float) -> None:
    """At least the target is removed, and less than one unit more: at every level the cheapest cut unit is dearer."""
    for seed in range(10):
        budget = Budget(space, sparsity)
        mask_U = select(random_numbers(space.size, seed), budget, limits=FREE)
        gap = budget.removed_share(mask_U) - sparsity
        dearest = space.costs_U().max().item() / budget.total
        assert -1e-12 <= gap < dearest
        check(mask_U, budget, FREE)


def test_a_budget_that_can_be_met_exactly_is() -> None:
    """A limit that is a whole number of units does not fail by rounding."""
    space = make_space(["channel"], [(1, 10)] * 3)
    for removed in range(1, 30):
        mask_U = select(random_numbers(30, removed), Budget(space, removed / 30), limits=FREE)
        assert int((~mask_U).sum()) == removed


def test_separate_pools_each_meet_their_limit() -> None:
    """Priorities that prefer one kind do not take from the other."""
    budget, channels = Budget(FLAT, 0.4, pools="separate"), of_kind(FLAT, "channel")
    for seed in range(10):
        mask_U = select(random_numbers(FLAT.size, seed) + channels, budget, limits=FREE)
        check(mask_U, budget, FREE)
        assert int(mask_U[channels].sum()) == math.floor(0.6 * 23)
        assert int(mask_U[~channels].sum()) == math.floor(0.6 * 6)


@pytest.mark.parametrize("measure", ["parameters", "flops"])
def test_the_measure_decides_what_fits(measure: Measure) -> None:
    """Against the measure's own costs."""
    budget = Budget(FLAT, 0.37, measure=measure)
    mask_U = select(random_numbers(FLAT.size, 1), budget, limits=FREE)
    costs = [getattr(group, measure) for group in FLAT.groups for _ in range(group.count)]
    kept = sum(itertools.compress(costs, mask_U.tolist()))
    assert 0.63 * sum(costs) - min(costs) < kept <= 0.63 * sum(costs)


# Order


def test_selection_is_a_function() -> None:
    """The same mask twice, and neither priorities nor tie-breaks are written on."""
    probs_U, second_U = random_numbers(NESTED.size, 0), random_numbers(NESTED.size, 1)
    copies = probs_U.clone(), second_U.clone()
    budget = Budget(NESTED, 0.4)
    masks = [select(probs_U, budget, tie_break_U=second_U) for _ in range(2)]
    assert torch.equal(*masks)
    assert torch.equal(probs_U, copies[0])
    assert torch.equal(second_U, copies[1])


def test_ties_go_to_the_tie_break_then_to_the_index() -> None:
    """Priority first, whatever the tie-break says."""
    space = make_space(["channel"], [(1, 4), (1, 4)])
    probs_U = torch.tensor([0.5, 0.5, 0.9, 0.5, 0.5, 0.1, 0.5, 0.5])
    second_U = torch.tensor([0.0, 3.0, -9.0, 0.0, 7.0, 99.0, 0.0, 0.0])
    expected = [2, 4, 1, 0, 3, 6, 7, 5]
    for num_kept in range(1, 8):
        budget = Budget(space, 1 - num_kept / 8)
        mask_U = select(probs_U, budget, limits=FREE, tie_break_U=second_U)
        assert mask_U.nonzero().flatten().tolist() == sorted(expected[:num_kept])
    without = select(probs_U, Budget(space, 0.5), limits=FREE)
    assert without.nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_ties_do_not_prefer_a_kind() -> None:
    """Units that lie side by side are taken in the order of the tie-break, whatever they are, until the cost is met."""
    budget = Budget(FLAT, 0.4)
    for seed in range(10):
        second_U = random_numbers(FLAT.size, seed)
        alike_U = select(torch.full_like(second_U, 0.5), budget, limits=FREE, tie_break_U=second_U)
        assert torch.equal(alike_U, select(second_U, budget, limits=FREE))


@all_spaces
def test_units_of_a_group_are_interchangeable(space: UnitSpace) -> None:
    """Permuting units within their groups permutes the mask."""
    budget, limits = Budget(space, 0.4), Limits(channel_multiple=2)
    for seed in range(10):
        probs_U, keys_U = random_numbers(space.size, seed), random_numbers(space.size, seed + 100)
        moved = (space.group_U + keys_U).argsort()
        expected = select(probs_U, budget, limits=limits)[moved]
        assert torch.equal(select(probs_U[moved], budget, limits=limits), expected)
    assert space.kinds[-1] == "ffn" or not torch.equal(moved, torch.arange(space.size))


@all_spaces
def test_only_the_order_of_priorities_matters(space: UnitSpace) -> None:
    """Without multiples, any increasing function of the priorities selects the same."""
    budget = Budget(space, 0.4)
    for seed in range(10):
        probs_U = random_numbers(space.size, seed)
        expected = select(probs_U, budget)
        for function in (torch.logit, torch.exp, lambda values: 5 * values - 100):
            assert torch.equal(select(function(probs_U), budget), expected)


# One threshold over all levels


def alive_above_the_lowest_threshold(budget: Budget, probs_U: torch.Tensor) -> torch.Tensor:
    """What lies above the lowest threshold, common to all levels, under which what is alive fits the budget."""
    space, costs_U = budget.space, budget.space.costs_U(budget.measure)
    fitting = torch.zeros(space.size, dtype=torch.bool)
    for threshold in probs_U.sort(descending=True).values:
        alive = torch.tensor(alive_by_hand(space, (probs_U >= threshold).tolist()))
        if costs_U[alive].sum() > (1 - budget.sparsity) * costs_U.sum() * ROUNDING:
            break
        fitting = alive
    return fitting


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("space", [TINY_NESTED, NESTED, FLAT], ids=["tiny_nested", "nested", "flat"])
def test_one_threshold_over_all_levels(space: UnitSpace, sparsity: float) -> None:
    """All that is alive under the lowest threshold that fits is kept; what is then left goes to smaller units."""
    budget, num_checked, num_filled = Budget(space, sparsity), 0, 0
    for seed in range(30):
        probs_U = random_numbers(space.size, seed)
        probs_U[of_kind(space, "kv_group").nonzero()[0]] = 1.0  # kept in any case
        mask_U, expected = select(probs_U, budget, limits=FREE), alive_above_the_lowest_threshold(budget, probs_U)
        assert mask_U[expected].all()
        check(mask_U, budget, FREE)
        num_checked += int(expected.sum())
        num_filled += int(mask_U.sum() - expected.sum())
    assert num_checked > num_filled > 0


def test_a_cut_parent_costs_nothing() -> None:
    """Children of a cut block are neither kept nor paid for, however wanted they are."""
    space = make_space(["ffn", "channel"], [(1, 4), (1, 4)], {"ffn": (20, 0.0), "channel": (3, 6.0)})
    probs_U = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.5, 0.1, 1.0, 1.0, 1.0, 1.0])
    for sparsity in (0.5, 0.3):  # then 12.8 are left, not enough for the second block but for its channels
        mask_U = select(probs_U, Budget(space, sparsity))
        assert mask_U.tolist() == [True] * 5 + [False] * 5
        assert Budget(space, sparsity).removed_share(mask_U) == 0.5


def test_a_block_brings_its_minimum_or_nothing() -> None:
    """A block whose minimum no longer fits keeps no unit at all, and its share goes to others."""
    space = make_space(["ffn", "channel"], [(1, 6), (1, 6)])  # 19 each
    probs_U = torch.tensor([0.9, *[0.8] * 6, 0.7, *[0.6] * 6])
    limits = Limits(min_channels=4)
    for num_left, expected in ((10, 0), (13, 4), (16, 5)):  # of which 1 is the second block itself
        mask_U = select(probs_U, Budget(space, 1 - (19 + num_left) / 38), limits=limits)
        assert mask_U[:7].all()
        assert mask_U[7]
        assert int(mask_U[8:].sum()) == expected


def test_what_came_with_a_layer_is_paid_once() -> None:
    """Also behind what did not fit: of 9 that are left, a second kv group costs 11, a layer's three channels 3 each."""
    space = make_space(["layer", "kv_group", "channel"], [(1, 1), (2, 1), (1, 3)])
    probs_U = torch.tensor([1.0, 1.0, 0.9, 0.85, 0.8, 0.9, 0.7, 0.1, 0.6, 0.5, 0.4])
    mask_U = select(probs_U, Budget(space, 1 - 37 / 59), limits=Limits(min_kv_groups=0))
    assert (~mask_U).nonzero().flatten().tolist() == [4, 7]


def test_a_wanted_block_keeps_unwanted_children_up_to_the_minimum() -> None:
    """The minimum enters with its block, before units elsewhere that are more wanted than its channels."""
    space = make_space(["ffn", "channel"], [(1, 4), (1, 4)])
    probs_U = torch.tensor([0.9, 0.01, 0.02, 0.03, 0.01, 0.5, 0.5, 0.5, 0.5, 0.5])
    for limit, expected in ((7, [0, 2, 3]), (17, [0, 2, 3, 5, 6, 7, 8]), (20, [0, 2, 3, 5, 6, 7, 8, 9])):
        budget = Budget(space, 1 - limit / 26)
        mask_U = select(probs_U, budget, limits=Limits(min_channels=2))
        assert mask_U.nonzero().flatten().tolist() == expected


# Limits


def test_minimums_are_kept_in_each_layer() -> None:
    """However unwanted, and the best of the layer fill them."""
    limits, probs_U = Limits(min_kv_groups=1, min_channels=3), random_numbers(FLAT.size, 2)
    probs_U[of_kind(FLAT, "kv_group") | (FLAT.group_U == 1)] += 1  # only the later layers' channels are unwanted
    mask_U = select(probs_U, Budget(FLAT, 0.4), limits=limits)
    check(mask_U, Budget(FLAT, 0.4), limits)
    plan = FLAT.plan(mask_U)
    assert all(len(layer.kv_groups) >= 1 and len(layer.channels) >= 3 for layer in plan.layers)
    assert [len(layer.channels) for layer in plan.layers[1:]] == [3, 3]


def test_the_first_layer_keeps_a_kv_group() -> None:
    """Even without minimums, as caches take their length from it; no other layer needs to."""
    for space in (FLAT, NESTED):
        probs_U = ~of_kind(space, "kv_group") + 0.1 * random_numbers(space.size, 0)
        plan = space.plan(select(probs_U, Budget(space, 0.6), limits=FREE))
        assert [len(layer.kv_groups) for layer in plan.layers] == [1, 0, 0]


@pytest.mark.parametrize("multiple", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("space", [FLAT, NESTED], ids=["flat", "nested"])
def test_multiples_hold_in_every_layer(space: UnitSpace, multiple: int) -> None:
    """Also where the width is none; the gap is then less than one multiple, or all that can be kept is."""
    limits = Limits(min_kv_groups=0, min_channels=0, channel_multiple=multiple)  # only the multiple binds
    for sparsity, seed in itertools.product((0.05, 0.3, 0.6), range(5)):
        mask_U = select(random_numbers(space.size, seed), Budget(space, sparsity), limits=limits)
        check(mask_U, Budget(space, sparsity), limits)
        assert all(len(layer.channels) % multiple == 0 for layer in space.plan(mask_U).layers)


def test_a_multiple_is_as_wanted_as_its_mean() -> None:
    """A pair with one very good channel and a bad one loses against a good pair."""
    space = make_space(["channel"], [(1, 4), (1, 4)])
    probs_U = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.6, 0.6, 0.0, 0.0])
    mask_U = select(probs_U, Budget(space, 0.75), limits=Limits(min_channels=0, channel_multiple=2))
    assert mask_U.nonzero().flatten().tolist() == [4, 5]


def test_minimums_round_up_to_multiples() -> None:
    """Three channels in pairs are four."""
    space = make_space(["channel"], [(1, 7), (1, 7)])
    probs_U = torch.tensor([1.0] * 7 + [0.0] * 7)
    mask_U = select(probs_U, Budget(space, 0.25), limits=Limits(min_channels=3, channel_multiple=2))
    assert [len(layer.channels) for layer in space.plan(mask_U).layers] == [6, 4]


def test_rounding_does_not_put_children_before_their_block() -> None:
    """Three channels capped at 0.1 have a mean that a float64 puts above 0.1."""
    assert (0.1 + 0.1 + 0.1) / 3 > 0.1
    space = make_space(["ffn", "channel"], [(1, 6), (1, 6)])
    probs_U = torch.tensor([0.1, *[0.9] * 6, 0.1, *[0.9] * 6], dtype=torch.float64)
    mask_U = select(probs_U, Budget(space, 0.2), limits=Limits(min_channels=0, channel_multiple=3))
    assert mask_U.nonzero().flatten().tolist() == list(range(11))  # both blocks and three of the four triples


# Refusals


def test_minimums_above_the_budget_are_refused_with_their_share() -> None:
    """3 of 10 channels a layer are forced where one may stay."""
    space = make_space(["channel"], [(1, 10), (1, 10)])
    with pytest.raises(BudgetError, match=r"30\.0% .* 10\.0% .*sparsity 0\.9"):
        select(random_numbers(20, 0), Budget(space, 0.9), limits=Limits(min_channels=3))


def test_a_separate_pool_is_refused_with_its_own_share() -> None:
    """With one kv group a layer, all of them are forced, whatever share of everything they are."""
    space = make_space(FLAT_KINDS, [(1, 20)] * 3)
    assert select(random_numbers(space.size, 0), Budget(space, 0.3)).any()
    with pytest.raises(BudgetError, match=r"100\.0% .*kv_group.* 70\.0%"):
        select(random_numbers(space.size, 0), Budget(space, 0.3, pools="separate"))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(min_kv_groups=2), r"layer 2 has 1 units of kind 'kv_group', fewer than the 2"),
        (Limits(min_channels=6), r"layer 2 has 5 units of kind 'channel', fewer than the 6"),
        (Limits(min_channels=1, channel_multiple=8), r"layer 1 has 7 .* fewer than the 8 .*multiples of 8"),
    ],
    ids=["kv_groups", "channels", "multiple"],
)
def test_minimums_that_do_not_exist_are_refused(limits: Limits, words: str) -> None:
    """With the layer and the numbers."""
    with pytest.raises(BudgetError, match=words):
        select(random_numbers(FLAT.size, 0), Budget(FLAT, 0.3), limits=limits)


def test_minimums_just_at_the_budget_are_possible() -> None:
    """Then nothing else is kept."""
    kinds: list[Kind] = ["channel"]
    space = make_space(kinds, [(1, 10), (1, 10)])
    mask_U = select(random_numbers(20, 0), Budget(space, 0.7), limits=Limits(min_channels=3))
    assert [len(layer.channels) for layer in space.plan(mask_U).layers] == [3, 3]


@pytest.mark.parametrize("spoil", ["short", "long", "nan"])
def test_priorities_that_are_none_are_refused(spoil: str) -> None:
    """Of another length, or not numbers."""
    good = random_numbers(FLAT.size, 0)
    not_a_number = torch.where(good == good.max(), math.nan, good)
    bad = {"short": good[1:], "long": torch.cat([good, good[:1]]), "nan": not_a_number}
    select(good, Budget(FLAT, 0.3))
    with pytest.raises(BudgetError, match=f"{FLAT.size} finite priorities"):
        select(bad[spoil], Budget(FLAT, 0.3))


def test_a_core_is_a_selection() -> None:
    """In whatever numbers it comes; one of other units is refused."""
    space, scores_U = FLAT, random_numbers(FLAT.size, 0)
    core_U = select(scores_U, Budget(space, 0.6))
    expected_U = select(scores_U.flip(0), Budget(space, 0.3), core_U=core_U)
    assert not (core_U & ~expected_U).any()
    for same_U in (core_U.int(), core_U.double()):
        assert torch.equal(select(scores_U.flip(0), Budget(space, 0.3), core_U=same_U), expected_U)
    with pytest.raises(BudgetError, match="the core must be a selection of"):
        select(scores_U, Budget(space, 0.3), core_U=core_U[1:])


@pytest.mark.parametrize(("name", "value"), [("channel_multiple", 0), ("channel_multiple", 2.5), ("min_channels", -3)])
def test_limits_that_cannot_be_are_refused(name: str, value: float) -> None:
    with pytest.raises(BudgetError, match=f"{name} must be a whole number of"):
        Limits(**{name: value})  # type: ignore[arg-type]
