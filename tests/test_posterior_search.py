"""The posterior search: it finds what is worth its price, stays on its budget, and repeats itself to the bit."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from searches import FREE, assert_resumes, same_state
from spaces import FLAT, LAYERED_BLOCKS, NESTED, all_masks, make_space, normal_numbers, of_kind, random_numbers
from tolerances import BUDGET, EXACT, assert_close

from bernprune.errors import BudgetError, ConfigError, RunError
from bernprune.policy.baselines import make_baseline
from bernprune.policy.bernoulli import entropy, initial_probs
from bernprune.policy.budget import Budget
from bernprune.policy.masks import Design
from bernprune.policy.posterior import PosteriorSearch, PosteriorStats, expected_order
from bernprune.policy.reinforce import ReinforceSearch
from bernprune.policy.rounds import Informativeness
from bernprune.policy.selection import select
from bernprune.units import MaskRows, UnitSpace

CHANNELS = make_space(["channel"], [(1, 5), (1, 8)])
UNEQUAL = make_space(["kv_group", "channel"], [(2, 5), (1, 6)])
SMALL = Design(groups=3, masks=4, chunks=2)
Losses = Callable[[MaskRows, int], torch.Tensor]


def make_search(
    space: UnitSpace, *, sparsity: float = 0.4, pools: Any = "joint", scores_U: torch.Tensor | None = None, **given: Any
) -> PosteriorSearch:
    """A search that starts from its scores, random ones by default, as a run does."""
    scores_U = random_numbers(space.size, 1) if scores_U is None else scores_U
    start_U = initial_probs(space, scores_U, keep=1 - sparsity, map_name="const")
    settings = {"seed": 3, "design": SMALL, "round_steps": 2, "forgetting": 0.1, "discount": 0.4} | given
    settings = {"floor": 0.05, "ceiling": 0.95} | settings
    return PosteriorSearch(Budget(space, sparsity, pools=pools), start_U, scores_U, **settings)


def run(search: PosteriorSearch, steps: range, losses: Losses) -> list[PosteriorStats]:
    stats = []
    for step in steps:
        masks_BKCU = search.ask(step)
        stats.append(search.tell(masks_BKCU, losses(masks_BKCU, step), learning_rate=0.0))
    return stats


def curved(masks_BKCU: MaskRows, step: int) -> torch.Tensor:
    """A loss with interactions, chunks that reach later ones, and a level of its own in each step."""
    lost_BKC = (1 - masks_BKCU[:].double()) @ random_numbers(masks_BKCU.shape[-1], 5)
    return 0.1 * lost_BKC.square() + 0.05 * lost_BKC.cumsum(-1).square() + math.sin(step)


# What is found


def noisy(values_U: torch.Tensor, cost_of_loss: Callable[[torch.Tensor], torch.Tensor]) -> Losses:
    """Of what is lost, ``[..., U]``, with noise, and a level that no two steps share."""

    def losses(masks_BKCU: MaskRows, step: int) -> torch.Tensor:
        exact_BKC = cost_of_loss((1 - masks_BKCU[:].double()) * values_U) / masks_BKCU.shape[2]
        return exact_BKC + 0.3 * normal_numbers(*exact_BKC.shape, seed=step) + 5 * math.sin(step)

    return losses


def best_within(budget: Budget, cost_of_loss: Callable[[torch.Tensor], torch.Tensor], values_U: torch.Tensor) -> float:
    masks = all_masks(budget.space.size).double()
    affordable = masks @ budget.costs_U <= (1 - budget.sparsity) * budget.total * (1 + 1e-12)
    return cost_of_loss((1 - masks[affordable]) * values_U).min().item()


def by_layer(space: UnitSpace) -> Callable[[torch.Tensor], torch.Tensor]:
    """The more a layer has lost, the dearer is the rest."""
    layers = space.layer_U
    return lambda lost: sum(lost[..., layers == layer].sum(-1) ** 2 for layer in layers.unique().tolist())


@pytest.mark.parametrize("scores", ["random", "misleading"])
@pytest.mark.parametrize("shape", ["linear", "convex"])
@pytest.mark.parametrize("space", [CHANNELS, UNEQUAL], ids=["equal_costs", "unequal_costs"])
def test_the_best_units_are_found(space: UnitSpace, shape: str, scores: str) -> None:
    """Nearly all that the best mask within the budget gains over the start and over the scores, in spite of those."""
    values_U = 0.2 + random_numbers(space.size, 8)
    cost_of_loss = by_layer(space) if shape == "convex" else lambda lost: lost.sum(-1)
    scores_U = -values_U if scores == "misleading" else random_numbers(space.size, 1)
    search = make_search(space, scores_U=scores_U, design=Design(4, 4, 2), round_steps=10)
    wanted, excess = [search.probs_U, scores_U], []
    run(search, range(200), noisy(values_U, cost_of_loss))
    best = best_within(search.budget, cost_of_loss, values_U)
    for priorities_U in (search.priorities_U, *wanted):
        mask_U = select(priorities_U, search.budget, limits=FREE).double()
        excess.append(cost_of_loss((1 - mask_U) * values_U).item() - best)
    learned, *others = excess
    assert learned <= 0.1 * min(others)


def test_a_linear_loss_is_learned_exactly_enough() -> None:
    """The very best units of equal cost, which the policy then is nearly sure of."""
    values_U = 0.2 + random_numbers(CHANNELS.size, 8)
    search = make_search(CHANNELS, scores_U=-values_U, design=Design(4, 4, 2), round_steps=10)
    run(search, range(300), noisy(values_U, lambda lost: lost.sum(-1)))
    kept = select(search.priorities_U, search.budget, limits=FREE)
    assert_close(values_U[~kept].sum(), best_within(search.budget, lambda lost: lost.sum(-1), values_U), EXACT)
    assert search.probs_U[kept].min() > search.probs_U[~kept].max()
    assert_close(search.worth_U, values_U, 0.2)


def test_a_second_score_helps() -> None:
    """Of many units and much noise, what a telling score adds to one that tells nothing is learned at once."""
    space = make_space(["channel"], [(1, 61), (1, 40)])
    values_U, told = 0.2 + random_numbers(space.size, 8), {}
    for name, also in (("also-random", random_numbers(space.size, 2)), ("also-telling", values_U.exp())):
        scores_US = torch.stack([random_numbers(space.size, 1), also], dim=1)
        start_U = torch.full_like(values_U, 0.6)
        budget = Budget(space, 0.4)
        search = PosteriorSearch(budget, start_U, scores_US, seed=3, design=Design(4, 4, 2), round_steps=4)
        run(search, range(4), noisy(values_U, lambda lost: lost.sum(-1)))
        told[name] = torch.corrcoef(torch.stack([search.worth_U, values_U]))[0, 1].item()
    assert told["also-telling"] > told["also-random"] + 0.2, told


def test_priorities_are_worth_for_the_price() -> None:
    """Before anything is known the start itself; then what a unit adds to the expected cost is its price."""
    search = make_search(NESTED)
    assert torch.equal(search.priorities_U, search.probs_U)
    run(search, range(4), curved)
    costs_U = torch.zeros_like(search.probs_U)
    for unit in range(NESTED.size):
        kept, cut = search.probs_U.clone(), search.probs_U.clone()
        kept[unit], cut[unit] = 1.0, 0.0
        costs_U[unit] = search.budget.alive_cost(kept) - search.budget.alive_cost(cut)
    expected_U = expected_order(NESTED, search.worth_U / costs_U, search.deviation_U / costs_U)
    assert_close(search.priorities_U, expected_U, BUDGET)


def test_as_many_units_are_dearer_as_are_expected_to_be() -> None:
    """In each group at every price, within one; the best come first, and a unit alone has its mean."""
    space = make_space(["layer", "kv_group", "channel"], [(1, 61), (3, 40), (4, 23)])
    mean_U, deviation_U = normal_numbers(space.size, seed=1), 0.1 + 3 * random_numbers(space.size, 2)
    mean_U[:62] = 0.3  # of what is not told apart at all, too
    order_U = expected_order(space, mean_U, deviation_U)
    for group in range(len(space.groups)):
        members = space.group_U == group
        for price in torch.linspace(-12, 12, 101).tolist():
            expected = torch.special.ndtr((mean_U[members] - price) / deviation_U[members]).sum()
            assert abs((order_U[members] > price).sum() - expected) < 1
        assert order_U[members][mean_U[members].argsort(descending=True, stable=True)].diff().le(0).all()
        if members.sum() == 1:
            assert_close(order_U[members], mean_U[members], EXACT)
    assert 10 < (order_U[1:62] > 0.3).sum() < 50  # by means alone all or none would be
    sure_U = expected_order(space, mean_U, 1e-12 * deviation_U)
    assert_close(sure_U, mean_U, BUDGET)


def test_reliability_tells_signal_from_noise() -> None:
    """Nothing before the first round, little where there is nothing to learn, nearly all where there is."""
    space, found = make_space(["channel"], [(1, 61), (1, 40)]), {}
    values_U = 3 * normal_numbers(space.size, seed=0)
    for name, scale in (("noise", 0.0), ("signal", 1.0)):
        search = make_search(space, round_steps=30, scores_U=random_numbers(space.size, 1))
        stats = run(search, range(120), noisy(scale * values_U, lambda lost: lost.sum(-1)))
        assert {step.reliability for step in stats[:29]} == {0.0}
        found[name] = stats[-1].reliability
    assert 0 < found["noise"] < 0.2
    assert 0.9 < found["signal"] < 1


# Invariances


def after(losses: Losses, **given: Any) -> PosteriorSearch:
    search = make_search(FLAT, **given)
    run(search, range(11), losses)
    return search


def test_the_difficulty_of_the_text_changes_nothing() -> None:
    """What is added to all losses of a window."""
    levels_BC = 3 * normal_numbers(3, 1, 2, seed=1)
    easy, hard = after(curved), after(lambda masks_BKCU, step: curved(masks_BKCU, step) + step * levels_BC)
    assert_close(hard.worth_U, easy.worth_U, BUDGET)
    assert_close(hard.probs_U, easy.probs_U, BUDGET)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**12], ids=["small", "large"])
def test_the_scale_of_the_loss_changes_nothing(scale: float) -> None:
    """To the bit, for a power of two: worths grow with it, and the policy is the same."""
    plain, scaled = after(curved), after(lambda masks_BKCU, step: scale * curved(masks_BKCU, step))
    assert torch.equal(scaled.worth_U, scale * plain.worth_U)
    assert torch.equal(scaled.probs_U, plain.probs_U)


def test_scores_of_layers_need_not_compare() -> None:
    """The channels of each layer may have a scale of their own, the groups of all layers one; to the bit."""
    scores_U = random_numbers(FLAT.size, 1)
    start_U, changed_U = initial_probs(FLAT, scores_U, keep=0.6), (3 * scores_U).exp()
    for index, group in enumerate(FLAT.groups):
        if group.kind == "channel":
            members = FLAT.group_U == index
            changed_U[members] = (10.0**group.layer) * scores_U[members] - 7 * group.layer
    found = []
    for given_U in (scores_U, changed_U, -scores_U):
        search = PosteriorSearch(Budget(FLAT, 0.4), start_U, given_U, seed=3, design=SMALL, round_steps=2)
        run(search, range(8), curved)
        found.append(search.probs_U)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_order_of_windows_and_masks_changes_nothing() -> None:
    """All are alike, whichever comes first."""
    search, other = make_search(FLAT), make_search(FLAT)
    for step in range(4):
        masks_BKCU = search.ask(step)[:]
        losses_BKC = curved(masks_BKCU, step)
        search.tell(masks_BKCU, losses_BKC, learning_rate=0.0)
        turned = [values.roll((step, 1), (0, 1)) for values in (masks_BKCU, losses_BKC)]
        other.tell(*turned, learning_rate=0.0)
    assert_close(other.worth_U, search.worth_U, BUDGET)
    assert_close(other.probs_U, search.probs_U, BUDGET)


# Steps


@pytest.mark.parametrize("bounds", [(0.05, 0.95), (0.001, 0.99), (0.2, 0.9)], ids=str)
@pytest.mark.parametrize(
    ("space", "pools"),
    [(FLAT, "joint"), (FLAT, "separate"), (NESTED, "joint"), (LAYERED_BLOCKS, "joint")],
    ids=["flat", "separate", "nested", "blocks"],
)
def test_the_policy_stays_on_its_budget(space: UnitSpace, pools: str, bounds: tuple[float, float]) -> None:
    """From the start on, within its bounds, every number finite; it changes with a round and only then."""
    search, moved = make_search(space, sparsity=0.5, pools=pools, floor=bounds[0], ceiling=bounds[1]), 0
    for step in range(21):
        before = search.probs_U.clone()
        (stats,) = run(search, range(step, step + 1), curved)
        assert stats.rounds == search.rounds == (step + 1) // 2
        assert step % 2 == 1 or torch.equal(search.probs_U, before)
        moved += not torch.equal(search.probs_U, before)
        assert all(math.isfinite(value) for value in stats.to_dict().values())
        assert_close(search.budget.removed_share(search.probs_U), 0.5, BUDGET)
        assert ((search.probs_U >= bounds[0]) & (search.probs_U <= bounds[1])).all()
        for kind in space.kinds if pools == "separate" else ():
            assert_close(search.probs_U[of_kind(space, kind)].mean(), 0.5, BUDGET)
    assert moved > 5  # of ten rounds; few units may all be at their bounds


def test_a_round_that_ends_early_is_learned_from_like_any_other() -> None:
    """Once; without a round there is nothing to learn."""
    early, planned = (make_search(FLAT, round_steps=steps) for steps in (50, 3))
    assert not early.conclude()
    for search in (early, planned):
        run(search, range(3), curved)
    assert (early.rounds, planned.rounds) == (0, 1) and early.conclude()
    assert early.probs_U.equal(planned.probs_U) and early.priorities_U.equal(planned.priorities_U)
    assert not early.conclude() and early.rounds == 1


@pytest.mark.parametrize("level", [0.0, 2.5])
def test_a_round_that_tells_nothing_is_survived(level: float) -> None:
    """Masks that all do equally well leave the policy as it was, and make no round."""
    search = make_search(FLAT)
    run(search, range(4), lambda masks_BKCU, step: torch.full(masks_BKCU.shape[:3], level))
    assert search.rounds == 0 and torch.equal(search.probs_U, make_search(FLAT).probs_U)
    run(search, range(4, 8), curved)
    assert search.rounds == 2
    assert_close(search.budget.removed_share(search.probs_U), 0.4, BUDGET)


def test_a_round_has_two_estimates_at_least() -> None:
    """One has no variance, so a round of a single window waits for the next."""
    search = make_search(FLAT, design=Design(1, 4), round_steps=1)
    assert [stats.rounds for stats in run(search, range(5), curved)] == [0, 1, 1, 2, 2]
    assert search.probs_U.isfinite().all()


@pytest.mark.parametrize(("num_steps", "num_rounds"), [(37, 5), (29, 7), (18, 7)])
def test_rounds_fill_the_steps(num_steps: int, num_rounds: int) -> None:
    """Rounds of a broken number of steps end with the next whole one, the last with the last step, despite rounding."""
    search = make_search(CHANNELS, round_steps=num_steps / num_rounds)
    found = [stats.rounds for stats in run(search, range(num_steps), curved)]
    assert found == [step * num_rounds // num_steps for step in range(1, num_steps + 1)]


def test_what_is_dropped_is_only_missing() -> None:
    """Fewer windows make a round of fewer estimates; a mask that is left alone makes none."""
    search = make_search(FLAT, round_steps=3)
    for step, (windows, masks, count) in enumerate([(2, 4, 2), (3, 1, 2), (1, 3, 0), (2, 2, 2), (3, 4, 5)]):
        masks_BKCU = search.ask(step)[:windows, :masks]
        stats = search.tell(masks_BKCU, curved(masks_BKCU, step), learning_rate=0.0)
        assert search.state_dict()["count"] == count
        assert stats.rounds == (step + 1) // 3


def test_what_never_changed_is_not_known_best() -> None:
    """Of a unit that all masks of a round kept, or all cut, nothing was seen; others must not be less sure."""
    search = make_search(FLAT, design=Design(2, 4), round_steps=2, floor=0.02, ceiling=0.98)
    masks_NU = torch.cat([search.ask(step)[:].flatten(0, 2) for step in range(2)])
    unseen = (masks_NU == masks_NU[0]).all(0)
    assert 3 < unseen.sum() < FLAT.size - 3
    run(search, range(2), curved)
    precision_U = search.beliefs.state_dict()["precision_U"]
    assert precision_U[unseen].max() <= precision_U[~unseen].max()


def test_a_family_that_never_changed_is_not_known_by_its_rounding() -> None:
    """Its variance is what rounding leaves of zero; it counts as unseen."""
    search = make_search(FLAT, design=Design(2, 4), round_steps=50, floor=0.02, ceiling=0.98)
    run(search, range(2), curved)
    members_N = search.beliefs.groups[0]
    sums = search._sums
    sums.squares_U[members_N] = sums.sum_U[members_N].square() / sums.count * (1 + 1e-14)
    noise_U = search._noise_U() * search.contrasts_U
    assert noise_U[members_N].min() > 0.1 * noise_U.mean()


def advantages_by_hand(search: PosteriorSearch, masks_BKCU: MaskRows, losses_BKC: torch.Tensor) -> torch.Tensor:
    """What the worths do not explain, later chunks at a discount, less the other masks' mean; by loops."""
    num_windows, num_masks, num_chunks = losses_BKC.shape
    returns_BKC, advantages_BKC = torch.zeros_like(losses_BKC), torch.zeros_like(losses_BKC)
    for b, k, c in itertools.product(range(num_windows), range(num_masks), range(num_chunks)):
        for later in range(c, num_chunks):
            explained = -search.worth_U[masks_BKCU[b, k, later]].sum() / num_chunks
            returns_BKC[b, k, c] += search.discount ** (later - c) * (losses_BKC[b, k, later] - explained)
    for b, k in itertools.product(range(num_windows), range(num_masks)):
        others = [j for j in range(num_masks) if j != k]
        advantages_BKC[b, k] = returns_BKC[b, k] - returns_BKC[b, others].mean(0)
    return advantages_BKC


@pytest.mark.parametrize("step", [0, 4, 5], ids=["first", "within_a_round", "last_of_a_round"])
def test_statistics_say_what_happened(step: int) -> None:
    """Every one against its definition, for losses in single precision."""
    search = make_search(FLAT, discount=0.7)
    run(search, range(step), curved)
    before, masks_BKCU = search.probs_U.clone(), search.ask(step)
    losses_BKC = curved(masks_BKCU, step).float()
    advantages_BKC = advantages_by_hand(search, masks_BKCU, losses_BKC.double())
    stats = search.tell(masks_BKCU, losses_BKC, learning_rate=0.0)
    losses_BK = losses_BKC.double().sum(-1)
    expected = {
        "loss": losses_BK.mean(),
        "loss_spread": (losses_BK - losses_BK.mean(1, keepdim=True)).square().mean(1).sqrt().mean(),
        "advantage_spread": advantages_BKC.square().mean().sqrt(),
        "largest_move": (search.probs_U - before).abs().max(),
        "expected_sparsity": 0.4,
        "entropy": entropy(search.probs_U),
        "rounds": (step + 1) // 2,
        "reliability": search.beliefs.reliability,
        "softness": 1.0,
        "unread": 0,
    }
    assert stats.to_dict().keys() == expected.keys()
    for name, value in stats.to_dict().items():
        assert_close(value, expected[name], BUDGET)
    assert (stats.largest_move > 0) is (step == 5)


# A policy that is too soft


def soft_search() -> PosteriorSearch:
    return make_search(FLAT, design=Design(8, 8), round_steps=5, floor=0.02, ceiling=0.98)


CORE_U = soft_search().probs_U > 0.5  # what the first policy keeps nearly always


def breaking(masks_BKCU: MaskRows, step: int) -> torch.Tensor:
    """Of a model that works without some units of the core, and without more gives anything."""
    lost_BKC = (~masks_BKCU[:] & CORE_U).sum(-1) / CORE_U.sum()
    noise_BKC = 300 * normal_numbers(*lost_BKC.shape, seed=step)
    return curved(masks_BKCU, step) + torch.where(lost_BKC > 0.34, noise_BKC, 0.0)


def test_a_policy_that_tells_less_than_the_first_is_drawn_in() -> None:
    """After two steps of 8 windows, as often as it takes; what was seen of it is no longer counted."""
    search, told = soft_search(), list[PosteriorStats]()
    for step in range(30):
        told += run(search, range(step, step + 1), breaking)
        assert search.drew_in == (step > 0 and told[-1].softness < told[-2].softness)
        if search.drew_in:
            assert told[-1].softness == told[-2].softness / 2
            assert told[-1].rounds == told[-2].rounds + (step % 5 == 4)  # what a whole round has seen is learned
            assert told[-1].entropy < told[-2].entropy and search.state_dict()["count"] == 0
    softness = [stats.softness for stats in told]
    assert softness[:7] == [1.0] * 6 + [0.5] and told[-1].rounds > 2
    assert told[7].loss_spread < 0.5 * told[6].loss_spread


def test_drawing_in_moves_nothing_between_layers() -> None:
    """Each group goes on to keep about as much as in the soft policy, and chance has less to do with which."""
    space = make_space(["channel"], [(1, 40), (1, 60), (1, 25)])
    search = make_search(space, floor=0.001, ceiling=0.999)
    level_L = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    search.beliefs.worth_U = level_L[space.group_U] + 0.5 * normal_numbers(space.size, seed=0)
    search.beliefs.deviation_U = torch.full_like(search.worth_U, 2.0)
    costs_U = space.costs_U()
    search.rounds = 1
    search._follow(costs_U)

    def kept(probs_U: torch.Tensor) -> Any:
        return pytest.approx([probs_U[units].mean().item() for units in space.spans], abs=0.03)

    soft_U = search.probs_U
    for _ in range(6):
        search.softness /= 2
        search._begin_again()
        assert kept(search.probs_U) == kept(soft_U).expected
    assert entropy(search.probs_U) < 0.1 * entropy(soft_U)
    by_means_U = search.budget.at_price(search.worth_U, search.deviation_U / 64, costs_U, floor=0.001, ceiling=0.999)
    assert kept(by_means_U) != kept(soft_U).expected


def test_a_policy_that_was_drawn_in_grows_soft_again() -> None:
    """Once masks of it tell twice as much as those of the first, as where what was wrong has gone."""

    def passing(masks_BKCU: MaskRows, step: int) -> torch.Tensor:
        return (breaking if step < 8 else curved)(masks_BKCU, step)

    told = run(soft_search(), range(40), passing)
    assert min(stats.softness for stats in told) < 1 and told[-1].softness == 1
    for earlier, later in itertools.pairwise(told):
        if later.softness > earlier.softness:
            assert later.softness == 2 * earlier.softness and later.rounds == earlier.rounds + 1


def test_a_policy_is_not_drawn_in_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its masks tell, it keeps a little softness, and rounds go on."""
    monkeypatch.setattr(Informativeness, "too_soft", property(lambda self: self._first_contrast < 1))
    monkeypatch.setattr(Informativeness, "ample", False)
    search = soft_search()
    told = run(search, range(40), curved)
    assert told[-1].softness == 1 / 64 and told[-1].rounds > 4 and search.probs_U.isfinite().all()


def test_a_policy_that_tells_as_much_is_seldom_drawn_in() -> None:
    """Of rounds of 128 windows that differ by a factor of e and more, in one of twenty at the most; and nearly always
    if it tells a fourth as much."""
    too_soft = {1.0: 0, 4.0: 0}
    contrasts = [torch.tensor([0.1]), torch.tensor([0.2])]  # of the first policy, and of one that is softer
    for times, trial in itertools.product(too_soft, range(200)):
        telling = Informativeness()
        levels_PW = normal_numbers(2, 128, seed=trial).exp()
        for policy, contrast_U in enumerate(contrasts):
            for at in range(0, 128, 8):
                scale_B = (levels_PW[policy, at : at + 8] * contrast_U * (times if policy else 1.0)).sqrt()
                telling.add(scale_B[:, None, None] * torch.tensor([[1.0], [-1.0]]).double() / 2**0.5, contrast_U)
                if telling.too_soft:
                    too_soft[times] += 1
                    break
            telling.renew(first=not policy)
    assert too_soft[1.0] <= 10 and too_soft[4.0] >= 190, too_soft


def test_a_policy_that_tells_more_stays_as_soft_as_it_is() -> None:
    told = run(soft_search(), range(25), curved)
    assert told[-1].rounds == 5 and {stats.softness for stats in told} == {1.0}


# State


@pytest.mark.parametrize("stop", [6, 7], ids=["tried_for_a_step", "drawn_in"])
def test_a_policy_that_is_too_soft_may_stop_and_go_on(stop: int, tmp_path: Path) -> None:
    assert_resumes(soft_search, lambda search, steps: run(search, steps, breaking), stop, tmp_path)


@pytest.mark.parametrize("stop", [1, 4, 7], ids=["in_the_first_round", "between_rounds", "within_a_round"])
@pytest.mark.parametrize("space", [FLAT, NESTED], ids=["flat", "nested"])
def test_a_run_may_stop_and_go_on(space: UnitSpace, stop: int, tmp_path: Path) -> None:
    assert_resumes(lambda: make_search(space), lambda search, steps: run(search, steps, curved), stop, tmp_path)


def test_a_state_is_a_snapshot() -> None:
    """Later steps do not change it."""
    search = after(curved)
    state = search.state_dict()
    before = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    run(search, range(11, 14), curved)
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_a_search_repeats_itself() -> None:
    """To the bit; another seed is another search."""
    first, second, other = (after(curved, seed=seed) for seed in (3, 3, 4))
    assert same_state(first, second)
    assert not torch.equal(first.probs_U, other.probs_U)


def test_asking_changes_nothing() -> None:
    """The same masks whenever asked, others in another step."""
    search, silent = make_search(FLAT), make_search(FLAT)
    masks = [search.ask(step)[:] for step in (4, 5, 4)]
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])
    assert masks[0].shape == (3, 4, 2, FLAT.size)
    assert same_state(search, silent)


@pytest.mark.parametrize("other", ["units", "budget", "scores", "method"])
def test_a_state_of_something_else_is_refused(other: str) -> None:
    """Even of as many units, or of the same; and nothing is taken over from it."""
    search, untouched = after(curved), after(curved)
    if other == "units":
        space = make_space(FLAT.kinds, [(1, 5), (2, 7), (3, 11)])
        assert space.size == FLAT.size
        state, message = make_search(space).state_dict(), "another model or another granularity"
    elif other == "budget":
        scores_U = torch.full((FLAT.size,), 0.5, dtype=torch.float64)
        richer = PosteriorSearch(Budget(FLAT, 0.25), scores_U, scores_U, seed=3, design=SMALL, round_steps=1)
        state, message = richer.state_dict(), r"a budget of 0\.25 of the prunable parameters, not 0\.4 of the prunable"
    elif other == "scores":
        scores_US = random_numbers(2 * FLAT.size, 0).view(-1, 2)
        state = PosteriorSearch(
            search.budget, scores_US[:, 0], scores_US, seed=3, design=SMALL, round_steps=1
        ).state_dict()
        message = "another number of initial scores"
    else:
        baseline = make_baseline("leave-one-out", window=5, num_masks=4)
        start_U = torch.full((FLAT.size,), 0.6, dtype=torch.float64)
        state = ReinforceSearch(Budget(FLAT, 0.4), start_U, baseline=baseline, seed=3, design=SMALL).state_dict()
        message = "not written by a PosteriorSearch"
    with pytest.raises(RunError, match=message):
        search.load_state_dict(state)
    assert same_state(search, untouched)


def test_settings_without_a_chance_are_refused() -> None:
    """A mask without another to compare with, a unit that never changes; their nearest neighbours are taken."""
    make_search(FLAT, design=Design(1, 2), floor=0.01, ceiling=0.99)
    with pytest.raises(ConfigError, match=r"at least 2 masks .* got 1"):
        make_search(FLAT, design=Design(3, 1, 2))
    for floor, ceiling in ((0.0, 0.95), (0.05, 1.0), (0.95, 0.95), (-0.1, 1.1)):
        with pytest.raises(ConfigError, match=f"0 < floor < ceiling < 1, but got {floor:g} and {ceiling:g}"):
            make_search(FLAT, floor=floor, ceiling=ceiling)


def test_impossible_budgets_and_sizes_are_refused() -> None:
    """When the search is made, not when it runs."""
    make_search(FLAT, sparsity=0.94)
    with pytest.raises(BudgetError, match="between the floor and the ceiling"):
        make_search(FLAT, sparsity=0.96)
    with pytest.raises(BudgetError, match=rf"{FLAT.size} probabilities .*\(13,\)"):
        PosteriorSearch(Budget(FLAT, 0.4), torch.ones(13), torch.ones(FLAT.size), seed=3, design=SMALL, round_steps=2)
    start_U, several_US = torch.full((FLAT.size,), 0.6), torch.ones(13, FLAT.size)
    with pytest.raises(ConfigError, match=rf"scores must be \[{FLAT.size}\] .*\[13, {FLAT.size}\]"):
        PosteriorSearch(Budget(FLAT, 0.4), start_U, several_US, seed=3, design=SMALL, round_steps=2)
