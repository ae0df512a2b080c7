"""Plain policy gradients find a known optimum, repeat themselves to the bit, and take steps of the stated size.

Letters: B windows of text, K masks a window, C chunks of a window, U units.
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from searches import FREE
from spaces import FLAT, NESTED, all_masks, make_space, of_kind, random_numbers
from tolerances import BUDGET, EXACT, assert_close

from bernprune.errors import BudgetError, ConfigError, RunError
from bernprune.names import BaselineName, Scaling
from bernprune.policy.baselines import BASELINES, make_baseline
from bernprune.policy.bernoulli import entropy
from bernprune.policy.budget import Budget
from bernprune.policy.estimators import kl_gradient, reinforce
from bernprune.policy.masks import Design
from bernprune.policy.posterior import PosteriorSearch
from bernprune.policy.reinforce import ReinforceSearch
from bernprune.policy.search import StepStats
from bernprune.policy.selection import select
from bernprune.units import KINDS, MaskRows, UnitSpace

EQUAL = make_space(["channel"], [(1, 5), (1, 8)])
UNEQUAL = make_space(["kv_group", "channel"], [(2, 5), (2, 5)])
DESIGNS = {"batch": Design(1, 8), "sequences": Design(3, 5), "chunks": Design(2, 3, 7)}


def make_search(
    space: UnitSpace,
    *,
    sparsity: float = 0.4,
    start_U: torch.Tensor | None = None,
    baseline: BaselineName = "leave-one-out",
    num_masks: int = 8,
    design: Design | None = None,
    **settings: Any,
) -> ReinforceSearch:
    """Plain policy gradients, by default under one mask for a whole batch."""
    start_U = torch.full((space.size,), 0.6, dtype=torch.float64) if start_U is None else start_U
    design = design or Design(1, num_masks)
    memory = make_baseline(baseline, window=5, num_masks=design.masks)
    return ReinforceSearch(Budget(space, sparsity), start_U, baseline=memory, seed=3, design=design, **settings)


def linear_loss(masks_KU: MaskRows, values_U: torch.Tensor) -> torch.Tensor:
    """What the units that were cut are worth."""
    return (1 - masks_KU[:].double()) @ values_U


def tell(search: ReinforceSearch, masks_KU: torch.Tensor, losses_K: torch.Tensor, learning_rate: float) -> StepStats:
    """As the search's, for masks of a whole batch."""
    return search.tell(masks_KU[None, :, None], losses_K[None, :, None], learning_rate=learning_rate)


def run(search: ReinforceSearch, steps: range, learning_rate: float = 0.05) -> list[StepStats]:
    """Steps on a loss with interactions and a level that changes from step to step and from window to window."""
    values_U, stats = random_numbers(search.budget.space.size, 5), []
    for step in steps:
        masks_BKCU = search.ask(step)
        level_BC = (step + torch.arange(len(masks_BKCU)))[:, None].sin().expand(-1, masks_BKCU.shape[2])
        losses_BKC = linear_loss(masks_BKCU, values_U).square() + level_BC[:, None]
        reference_BC = level_BC if search.needs_reference else None
        stats.append(search.tell(masks_BKCU, losses_BKC, learning_rate=learning_rate, reference_BC=reference_BC))
    return stats


def worth_of_the_best(values_U: torch.Tensor, budget: Budget) -> float:
    """Of all masks within the budget."""
    masks = all_masks(budget.space.size).double()
    affordable = masks @ budget.costs_U <= (1 - budget.sparsity) * budget.total * (1 + 1e-12)
    return (masks[affordable] @ values_U).max().item()


# The optimum

# Raw gradients are large where a unit is nearly settled.
LEARNING_RATES: dict[Scaling, float] = {"natural": 0.15, "sqrt-fisher": 0.06, "raw": 0.02}


def found_worth(search: ReinforceSearch, values_U: torch.Tensor, learning_rate: float, num_steps: int = 150) -> float:
    """Worth of the units that are selected after a search whose learning rate falls to zero."""
    for step in range(num_steps):
        masks_BKCU, decay = search.ask(step), 1 - step / num_steps
        losses_BKC, level_BC = linear_loss(masks_BKCU, values_U), (values_U.sum() / 2).expand(1, 1)
        search.tell(masks_BKCU, losses_BKC, learning_rate=decay * learning_rate, reference_BC=level_BC)
    return values_U[select(search.priorities_U, search.budget, limits=FREE)].sum().item()


def two_classes(space: UnitSpace, good: torch.Tensor, worth: float, worth_of_others: float) -> torch.Tensor:
    """Good units and others, no two worth the same."""
    return torch.where(good, worth, worth_of_others) + 0.1 * random_numbers(space.size, 8)


@pytest.mark.parametrize(
    ("baseline", "scaling", "projection"),
    [
        *itertools.product(["leave-one-out"], LEARNING_RATES, ["cost-weighted", "published"]),
        *itertools.product(["matched", "moving-average", "published"], ["natural"], ["cost-weighted"]),
    ],
    ids=lambda value: value,
)
def test_the_best_units_of_equal_cost_are_found(baseline: BaselineName, scaling: Scaling, projection: str) -> None:
    """On a linear loss they are the most valuable ones, and the policy becomes more certain of them."""
    values_U = two_classes(EQUAL, 5 * torch.arange(13) % 13 < 7, 1.0, 0.6)
    search = make_search(EQUAL, baseline=baseline, scaling=scaling, projection=projection, num_masks=32)
    start = entropy(search.probs_U)
    found = found_worth(search, values_U, LEARNING_RATES[scaling])
    assert_close(found, worth_of_the_best(values_U, search.budget), EXACT)
    assert entropy(search.probs_U) < 0.8 * start


@pytest.mark.parametrize("cheap_is_better", [True, False], ids=["cheap_is_better", "dear_is_better"])
@pytest.mark.parametrize("projection", ["cost-weighted", "published"])
def test_the_best_units_of_unequal_cost_are_found(projection: str, cheap_is_better: bool) -> None:
    """What counts is the worth per cost: a group costs as much as 11/3 channels."""
    channels = of_kind(UNEQUAL, "channel")
    values_U = two_classes(UNEQUAL, channels, *((0.5, 0.7) if cheap_is_better else (0.1, 1.5)))
    values_U[0] += 0.3  # of the groups, the best to fill up with
    search = make_search(UNEQUAL, projection=projection, num_masks=32)
    found = found_worth(search, values_U, 0.15)
    assert_close(found, worth_of_the_best(values_U, search.budget), EXACT)


def test_a_worthless_layer_is_removed_whole() -> None:
    """Units of every level trade with each other: the layer goes, and everything in the others stays."""
    space = make_space(KINDS, [(1, 3), (2, 3), (2, 4), (2, 3)])
    worthless = torch.tensor([group.layer == 2 for group in space.groups])[space.group_U]
    costs_U, own = space.costs_U(), of_kind(space, "kv_group") | of_kind(space, "channel")
    values_U = torch.where(own, costs_U * torch.where(worthless, 0.01, 0.2), 0.0)
    sparsity = (costs_U[worthless].sum() / costs_U.sum()).item()
    search = make_search(space, sparsity=sparsity, start_U=torch.full_like(values_U, 0.9), num_masks=32)
    for step in range(200):
        masks_BKCU = search.ask(step)
        losses_BKC = linear_loss(space.alive(masks_BKCU[:]), values_U)
        search.tell(masks_BKCU, losses_BKC, learning_rate=0.1 * (1 - step / 200))
    plan = space.plan(select(search.priorities_U, search.budget))
    everything = space.plan(torch.ones(space.size))
    assert plan.layers[2].is_empty
    assert plan.layers[:2] + plan.layers[3:] == everything.layers[:2] + everything.layers[3:]


# Steps


def answered_for(losses_BKC: torch.Tensor, discount: float) -> torch.Tensor:
    """Each chunk's own loss, and that of each later one at the discount to the power of its distance."""
    later = torch.arange(losses_BKC.shape[-1])
    powers_CC = torch.where(later >= later[:, None], discount ** (later - later[:, None]).clamp(min=0).double(), 0)
    return losses_BKC @ powers_CC.T


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
@pytest.mark.parametrize("scaling", LEARNING_RATES)
def test_a_step_is_the_projected_estimate(scaling: Scaling, design: Design) -> None:
    """Steepest descent in the metric of the projection: the estimate per cost, in units of the mean cost.

    The estimate is a mean over the masks of all windows, each against the others of its window, summed over chunks.
    """
    settings: dict[str, Any] = {"scaling": scaling, "epsilon": 1e-7}
    search = make_search(
        NESTED, sparsity=0.5, start_U=random_numbers(NESTED.size, 0), design=design, discount=0.7, **settings
    )
    before, masks_BKCU = search.probs_U.clone(), search.ask(0)[:]
    losses_BKC = random_numbers(masks_BKCU[..., 0].numel(), 1).view(masks_BKCU.shape[:3])
    search.tell(masks_BKCU, losses_BKC, learning_rate=0.3)
    returns_BKC, masks = answered_for(losses_BKC, 0.7), design.masks
    advantages_BKC = (returns_BKC - returns_BKC.mean(1, keepdim=True)) * masks / (masks - 1)
    chunks = [
        reinforce(before, masks_BKU.flatten(0, 1), advantages_BK.flatten(), **settings)
        for masks_BKU, advantages_BK in zip(masks_BKCU.unbind(2), advantages_BKC.unbind(2), strict=True)
    ]
    estimate_U = torch.stack(chunks).sum(0)
    moved_U = before - 0.3 * estimate_U / search.budget.metric_U
    assert_close(search.probs_U, search.budget.project(moved_U, floor=0.01, ceiling=0.99), EXACT)


@pytest.mark.parametrize("projection", ["cost-weighted", "published"])
@pytest.mark.parametrize("bounds", [(0.01, 0.99), (0.0, 1.0), (0.2, 0.8)], ids=str)
def test_the_policy_stays_on_its_budget(projection: str, bounds: tuple[float, float]) -> None:
    """From the start on, in every step, however large."""
    search = make_search(FLAT, projection=projection, floor=bounds[0], ceiling=bounds[1])
    limit = 0.6 * search.budget.total
    for step in range(15):
        alive = search.budget.alive_cost(search.probs_U)
        if projection == "cost-weighted":
            assert_close(alive, limit, BUDGET)
        assert alive <= limit * (1 + BUDGET)
        assert ((search.probs_U >= bounds[0]) & (search.probs_U <= bounds[1])).all()
        run(search, range(step, step + 1), learning_rate=10.0 ** (step % 4 - 2))


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
@pytest.mark.parametrize(("baseline", "blind"), [("leave-one-out", True), ("matched", True), ("none", False)])
def test_what_the_text_adds_moves_nothing(baseline: BaselineName, blind: bool, design: Design) -> None:
    """Each chunk of each window may be as difficult as it likes, if all masks and the reference meet it."""
    moved = []
    for difficulty in (0.0, 3.0):
        search = make_search(FLAT, baseline=baseline, design=design, discount=0.7)
        for step in range(3):
            masks_BKCU = search.ask(step)
            losses_BKC = linear_loss(masks_BKCU, random_numbers(FLAT.size, 5))
            added_BC = difficulty * random_numbers(losses_BKC[:, 0].numel(), step).view_as(losses_BKC[:, 0])
            search.tell(masks_BKCU, losses_BKC + added_BC[:, None], learning_rate=0.02, reference_BC=1 + added_BC)
        moved.append(search.probs_U)
    found = (moved[0] - moved[1]).norm() <= EXACT * moved[0].norm()
    assert found == blind


DROPPED = {"batch": (slice(None), slice(1, 6)), "sequences": (slice(1, 3),), "chunks": (slice(1),)}


@pytest.mark.parametrize("layout", DESIGNS)
def test_statistics_say_what_happened(layout: str) -> None:
    """Every one against its definition, in a step with dropped masks; the spread is that of masks on the same text."""
    search, left = make_search(FLAT, design=DESIGNS[layout], discount=0.7), DROPPED[layout]
    before, masks_BKCU = search.probs_U.clone(), search.ask(0)[left]
    losses_BKC = random_numbers(masks_BKCU[..., 0].numel(), 1).view(masks_BKCU.shape[:3]).float()
    stats = search.tell(masks_BKCU, losses_BKC, learning_rate=0.1)
    losses_BK, returns_BKC = losses_BKC.double().sum(-1), answered_for(losses_BKC.double(), 0.7)
    masks = masks_BKCU.shape[1]
    advantages_BKC = (returns_BKC - returns_BKC.mean(1, keepdim=True)) * masks / (masks - 1)
    expected = {
        "loss": losses_BK.mean(),
        "loss_spread": (losses_BK - losses_BK.mean(1, keepdim=True)).square().mean(1).sqrt().mean(),
        "advantage_spread": advantages_BKC.square().mean().sqrt(),
        "largest_move": (search.probs_U - before).abs().max(),
        "expected_sparsity": 0.4,
        "entropy": entropy(search.probs_U),
    }
    assert stats.to_dict().keys() == expected.keys()
    for name, value in stats.to_dict().items():
        assert_close(value, expected[name], BUDGET)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("bounds", [(0.01, 0.99), (0.0, 1.0)], ids=str)
def test_statistics_are_finite(baseline: BaselineName, bounds: tuple[float, float]) -> None:
    """Also where steps are huge and units settle for good."""
    search = make_search(FLAT, baseline=baseline, scaling="raw", floor=bounds[0], ceiling=bounds[1])
    stats = run(search, range(25), learning_rate=1.0)
    assert all(math.isfinite(value) for step in stats for value in step.to_dict().values())
    assert search.probs_U.isfinite().all()


@pytest.mark.parametrize("scaling", LEARNING_RATES)
def test_a_pull_is_part_of_the_step(scaling: Scaling) -> None:
    """Where all masks do equally well, it is all of the step: its gradient, in the metric of the projection."""
    settings: dict[str, Any] = {"scaling": scaling, "epsilon": 1e-7}
    search = make_search(NESTED, sparsity=0.5, start_U=random_numbers(NESTED.size, 0), pull=0.3, **settings)
    start_U, masks_BKCU = search.probs_U, search.ask(0)
    search.probs_U = before = search.budget.project(random_numbers(NESTED.size, 4), floor=0.01, ceiling=0.99)
    search.tell(masks_BKCU, torch.full(masks_BKCU.shape[:3], 2.5), learning_rate=0.02)
    moved_U = before - 0.02 * 0.3 * kl_gradient(before, start_U, **settings) / search.budget.metric_U
    assert_close(search.probs_U, search.budget.project(moved_U, floor=0.01, ceiling=0.99), EXACT)
    assert (search.probs_U - before).abs().max() > 1e-4


@pytest.mark.parametrize("scaling", LEARNING_RATES)
def test_a_strong_pull_keeps_the_policy_at_its_start(scaling: Scaling) -> None:
    """The stronger, the nearer; at any strength, it leads back in one step and not beyond."""
    moved = []
    for pull in (0.0, 1.0, 10.0, 1e9):
        search = make_search(FLAT, pull=pull, scaling=scaling, start_U=0.2 + 0.7 * random_numbers(FLAT.size, 7))
        start_U = search.probs_U
        run(search, range(40), learning_rate=0.02)
        moved.append((search.probs_U - start_U).norm().item())
    assert moved == sorted(moved, reverse=True) and moved[-1] < 0.5 * moved[0]
    search.probs_U = search.budget.project(random_numbers(FLAT.size, 4), floor=0.01, ceiling=0.99)
    search.tell(search.ask(0), torch.ones(1, 8, 1), learning_rate=0.02)
    assert_close(search.probs_U, start_U, BUDGET)


def test_a_pull_needs_room_on_both_sides() -> None:
    """Its gradient is infinite where a probability is 0 or 1."""
    make_search(FLAT, pull=0.0, floor=0.0, ceiling=1.0)
    for bounds in ({"floor": 0.0}, {"ceiling": 1.0}):
        with pytest.raises(ConfigError, match="a pull needs 0 < floor < ceiling < 1, but got"):
            make_search(FLAT, pull=0.1, **bounds)


# State


@pytest.mark.parametrize("space", [FLAT, NESTED], ids=["flat", "nested"])
@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_twenty_steps_are_ten_and_ten(space: UnitSpace, design: Design, baseline: BaselineName) -> None:
    """Bit for bit, through the state of a search that started elsewhere."""
    whole, first = (make_search(space, baseline=baseline, design=design, pull=0.2) for _ in range(2))
    second = make_search(space, baseline=baseline, design=design, pull=0.2, start_U=random_numbers(space.size, 9))
    expected = run(whole, range(20))
    found = run(first, range(10))
    state = first.state_dict()
    second.load_state_dict({**state, "probs_U": state["probs_U"].clone()})
    run(first, range(10, 13))  # what the first does later does not reach the second
    found += run(second, range(10, 20))
    assert found == expected
    assert torch.equal(second.probs_U, whole.probs_U)
    assert second.state_dict()["baseline"] == whole.state_dict()["baseline"]


def test_a_state_is_a_snapshot() -> None:
    """Later steps do not change it."""
    search = make_search(FLAT, baseline="moving-average")
    run(search, range(3))
    state = search.state_dict()
    probs_U, memory = state["probs_U"].clone(), dict(state["baseline"])
    run(search, range(3, 6))
    assert torch.equal(state["probs_U"], probs_U)
    assert state["baseline"] == memory
    assert search.state_dict()["baseline"] != memory


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_asking_changes_nothing(design: Design) -> None:
    """The same masks whenever asked, others in another step, and no two of them alike."""
    search = make_search(FLAT, design=design)
    masks = [search.ask(step)[:] for step in (4, 5, 4)]
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])
    assert masks[0].shape == (design.groups, design.masks, design.chunks, FLAT.size) and masks[0].dtype == torch.bool
    assert len(masks[0].flatten(0, 2).unique(dim=0)) == design.groups * design.masks * design.chunks


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 4, 1), (1, 8), (1, 8, 2)])
def test_losses_that_are_not_one_for_each_mask_are_refused(shape: tuple[int, ...]) -> None:
    """They would be taken for those of other masks, or of none; nothing is learned from them."""
    budget, start_U = Budget(FLAT, 0.4), torch.full((FLAT.size,), 0.6, dtype=torch.float64)
    posterior = PosteriorSearch(budget, start_U, start_U, seed=3, design=Design(1, 8), round_steps=2)
    for search in (make_search(FLAT), posterior):
        masks_BKCU, before_U = search.ask(0), search.probs_U
        with pytest.raises(ConfigError, match=r"\[B, K, C\], here \[1, 8, 1\], but got"):
            search.tell(masks_BKCU, torch.zeros(shape, dtype=torch.float64), learning_rate=0.1)
        assert search.probs_U is before_U


def test_masks_of_a_policy_share_what_they_are_made_of() -> None:
    """Over its steps; those of the next policy, or made without sharing, are made of their own."""
    search = make_search(FLAT, design=Design(2, 4, 1, "antithetic"))
    first, second = search.ask(0), search.ask(1)
    alone = [replace(masks, _of_policy={})[:] for masks in (first, second)]
    assert torch.equal(first[:], alone[0]) and torch.equal(second[:], alone[1])
    assert first.drawn().thresholds_3U is second.drawn().thresholds_3U
    elsewhere = first.to(torch.device("meta"))
    assert elsewhere.drawn().thresholds_3U.is_meta and not first.drawn().thresholds_3U.is_meta
    search.tell(first, torch.rand(2, 4, 1, dtype=torch.float64), learning_rate=1.0)
    third = search.ask(1)
    assert torch.equal(third[:], replace(third, _of_policy={})[:]) and not torch.equal(third[:], second[:])


def test_a_state_of_other_units_is_refused() -> None:
    """Even if it has as many, and nothing is taken over from it."""
    other = make_space(FLAT.kinds, [(1, 5), (2, 7), (3, 11)])
    assert other.size == FLAT.size
    search = make_search(FLAT)
    before = search.probs_U.clone()
    with pytest.raises(RunError, match="another model or another granularity"):
        search.load_state_dict(make_search(other, start_U=random_numbers(other.size, 0)).state_dict())
    assert torch.equal(search.probs_U, before)


def test_a_state_of_another_budget_is_refused() -> None:
    """Of another sparsity, or of pools that do not trade."""
    start_U = torch.full((FLAT.size,), 0.6, dtype=torch.float64)
    baseline = make_baseline("leave-one-out", window=5, num_masks=4)
    for budget in (Budget(FLAT, 0.5), Budget(FLAT, 0.4, pools="separate")):
        other = ReinforceSearch(budget, start_U, baseline=baseline, seed=3, design=Design(1, 4))
        with pytest.raises(RunError, match=f"a budget of {budget}, not 0.4 of the prunable parameters"):
            make_search(FLAT).load_state_dict(other.state_dict())


def test_a_state_of_the_other_method_is_refused() -> None:
    """By the name of the method that it was not written by."""
    start_U = torch.full((FLAT.size,), 0.6, dtype=torch.float64)
    other = PosteriorSearch(Budget(FLAT, 0.4), start_U, start_U, seed=3, design=Design(2, 4), round_steps=1)
    with pytest.raises(RunError, match="not written by a ReinforceSearch"):
        make_search(FLAT).load_state_dict(other.state_dict())


def test_probabilities_of_other_units_are_refused() -> None:
    """With both sizes."""
    with pytest.raises(BudgetError, match=rf"{FLAT.size} probabilities .*\(13,\)"):
        make_search(FLAT, start_U=torch.full((13,), 0.5))
