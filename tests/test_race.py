"""Heats by successive halving, against a slow twin, and the challengers that run in them.

Letters: N masks, U units, W windows.
"""

import itertools
import math
import statistics
from typing import Any

import pytest
import torch
from searches import FREE
from selection_checks import check
from spaces import FLAT, LAYERED_BLOCKS, NESTED, SPACES, make_space, normal_numbers, random_numbers
from tolerances import EXACT, SAMPLED, assert_close

from bernprune.policy.baselines import make_baseline
from bernprune.policy.bernoulli import initial_probs
from bernprune.policy.budget import Budget
from bernprune.policy.masks import Design
from bernprune.policy.posterior import PosteriorSearch
from bernprune.policy.race import Heat, challengers, consistent_with_mask, heat_sequences, race, stages
from bernprune.policy.reinforce import ReinforceSearch
from bernprune.policy.search import MaskSearch
from bernprune.policy.selection import Limits, select
from bernprune.seeding import generator
from bernprune.units import UnitSpace

WINDOWS = (1, 2, 3, 7, 13, 128)
heats = pytest.mark.parametrize("num_masks", range(2, 18))


class Text:
    """Losses of numbered masks on windows that are read in order; notes who read which."""

    def __init__(self, losses_NW: torch.Tensor) -> None:
        self.losses_NW, self.read = losses_NW, 0
        self.masks_NU = torch.eye(len(losses_NW), dtype=torch.bool)
        self.seen: list[list[int]] = [[] for _ in losses_NW]

    def __call__(self, masks_NU: torch.Tensor, fresh: int) -> torch.Tensor:
        assert fresh > 0, "nothing to read"
        windows, numbers = range(self.read, self.read + fresh), masks_NU.int().argmax(1).tolist()
        self.read += fresh
        for number in numbers:
            self.seen[number] += windows
        return self.losses_NW[numbers][:, windows.start : windows.stop]


# Heats


@heats
def test_what_a_heat_reads(num_masks: int) -> None:
    """As much as announced; each window once for all still running, of whom at least half run on; mask 0 sees all."""
    for windows in WINDOWS:
        text = Text(normal_numbers(num_masks, windows, seed=num_masks + windows))
        race(text.masks_NU, windows, text)
        assert sum(len(seen) for seen in text.seen) == heat_sequences(num_masks, windows) <= num_masks * windows
        assert all(seen == list(range(len(seen))) for seen in text.seen)
        assert len(text.seen[0]) == windows == text.read
        assert sum(len(seen) == windows for seen in text.seen) == (2 if windows > 1 else num_masks)
        running = [masks for masks, _ in stages(num_masks, windows)]
        assert running == sorted(running, reverse=True)
        if windows == 128:
            assert running[0] == num_masks and running[-1] == 2
            assert all(more / 2 <= fewer < more for more, fewer in itertools.pairwise(running))
            lengths = [sum(fresh for _, fresh in list(stages(num_masks, windows))[: stage + 1]) for stage in range(9)]
            assert all(later <= 2 * earlier for earlier, later in itertools.pairwise(lengths)), (
                "each stage doubles at most"
            )


def race_by_hand(losses: list[list[float]], windows: int) -> tuple[int, float, float]:
    """The best challenger, what it gains on mask 0, and the standard error of that, by lists."""
    running, seen = list(range(len(losses))), 0
    for stage in range(1, math.ceil(math.log2(len(losses))) + 1):
        if stage > 1:
            order = sorted(running[1:], key=lambda number: sum(losses[number][:seen]))
            running = [0, *order[: max(2, math.ceil(len(running) / 2)) - 1]]
        seen = math.ceil(windows / 2 ** (math.ceil(math.log2(len(losses))) - stage))
    best = min(running[1:], key=lambda number: sum(losses[number][:windows]))
    gains = [mine - other for mine, other in zip(losses[best][:windows], losses[0], strict=True)]
    return best, statistics.mean(gains), statistics.stdev(gains) / math.sqrt(windows) if windows > 1 else 0.0


@heats
def test_a_heat_is_successive_halving(num_masks: int) -> None:
    """Under noise that often misleads: the same winner as by lists, with the same lead and the same doubt."""
    for windows in WINDOWS:
        losses_NW = normal_numbers(num_masks, windows, seed=7 * num_masks + windows)
        losses_NW += 0.3 * normal_numbers(num_masks, 1, seed=num_masks) + normal_numbers(1, windows, seed=windows)
        best, difference, error = race_by_hand(losses_NW.tolist(), windows)
        text = Text(losses_NW)
        heat = race(text.masks_NU, windows, text)
        assert heat.winner == (best if difference < 0 else 0)
        assert_close(torch.tensor([heat.difference, heat.error]), torch.tensor([difference, error]), EXACT)


def test_some_heats_mislead() -> None:
    """Or else the test above would hold for a race that lets all of them run to the end."""
    wrong = 0
    for seed in range(20):
        losses_NW = normal_numbers(16, 8, seed=seed)
        wrong += race_by_hand(losses_NW.tolist(), 8)[0] != losses_NW[1:].mean(1).argmin().item() + 1
    assert 3 < wrong < 20


@heats
def test_without_noise_the_best_wins(num_masks: int) -> None:
    """Wherever it stands; mask 0 too, and whatever the level of a window."""
    for windows in WINDOWS:
        for best in range(num_masks):
            levels_N = 1 + torch.arange(num_masks).roll(best).double() / 64
            text = Text(levels_N[:, None] + torch.arange(windows).double())
            heat = race(text.masks_NU, windows, text, margin=3.0)
            assert heat.winner == best and heat.error == 0
            second = levels_N[1:].min().item() if best == 0 else levels_N[best].item()
            assert heat.difference == second - levels_N[0].item()


@heats
def test_of_equals_mask_0_stays(num_masks: int) -> None:
    """A challenger has to be better; between equal challengers the first runs on."""
    for windows in WINDOWS:
        losses_W = random_numbers(windows, 3)
        text = Text(losses_W.expand(num_masks, -1))
        heat = race(text.masks_NU, windows, text)
        assert (heat.winner, heat.difference, heat.error) == (0, 0.0, 0.0)
        text = Text(torch.cat([losses_W[None] + 1, losses_W.expand(num_masks - 1, -1)]))
        assert race(text.masks_NU, windows, text).winner == 1


@heats
def test_a_mask_with_a_loss_that_is_not_finite_loses(num_masks: int) -> None:
    """Outright, on however many windows, with any margin: to any mask that has none; of all that have one, 0 stays."""
    for windows in WINDOWS:
        losses_NW = torch.zeros(num_masks, windows, dtype=torch.float64)
        losses_NW[0, -1] = math.inf
        text = Text(losses_NW)
        assert race(text.masks_NU, windows, text, margin=9.0) == Heat(1, None, None)
        losses_NW[1:, 0] = math.inf
        text = Text(losses_NW)
        assert race(text.masks_NU, windows, text) == Heat(0, None, None)
        losses_NW[0] = 5.0
        text = Text(losses_NW)
        assert race(text.masks_NU, windows, text) == Heat(0, None, None)


@pytest.mark.parametrize("windows", [2, 3, 11])
def test_the_margin_is_in_standard_errors(windows: int) -> None:
    """Just below its lead in them the challenger wins, just above it does not; one that is worse never does."""
    losses_NW = normal_numbers(2, windows, seed=windows)
    losses_NW[1] += losses_NW[0].mean() - losses_NW[1].mean() - 0.5

    def winner(losses_NW: torch.Tensor, margin: float) -> int:
        text = Text(losses_NW)
        return race(text.masks_NU, windows, text, margin=margin).winner

    _, difference, error = race_by_hand(losses_NW.tolist(), windows)
    lead = -difference / error
    assert (winner(losses_NW, 0.99 * lead), winner(losses_NW, 1.01 * lead)) == (1, 0)
    assert winner(losses_NW.flip(0), 0.0) == winner(losses_NW.flip(0), 0.99 * lead) == 0


@pytest.mark.parametrize(("num_masks", "windows"), [(1, 5), (3, 0)])
def test_there_is_no_race_of_nobody_or_over_nothing(num_masks: int, windows: int) -> None:
    with pytest.raises(AssertionError, match="nobody"):
        race(torch.ones(num_masks, 4, dtype=torch.bool), windows, lambda masks_NU, fresh: torch.empty(0))


# Challengers


def curved(masks_BKCU: torch.Tensor) -> torch.Tensor:
    """A loss with interactions."""
    lost_BKC = (1 - masks_BKCU.double()) @ random_numbers(masks_BKCU.shape[-1], 5)
    return 0.1 * lost_BKC.square() / masks_BKCU.shape[-1]


def make_search(method: str, space: UnitSpace, *, steps: int = 6, pools: Any = "joint") -> MaskSearch:
    """A search that has learned for a while."""
    budget, scores_U = Budget(space, 0.4, pools=pools), random_numbers(space.size, 1)
    probs_U = initial_probs(space, scores_U, keep=0.6, map_name="const" if method == "posterior" else "sigmap")
    search: MaskSearch
    if method == "posterior":
        search = PosteriorSearch(budget, probs_U, scores_U, seed=3, design=Design(3, 4, 2), round_steps=2)
    else:
        baseline = make_baseline("leave-one-out", window=5, num_masks=4)
        # Some probabilities end at 0 and at 1.
        search = ReinforceSearch(
            budget, probs_U, baseline=baseline, seed=3, design=Design(1, 4), floor=0.0, ceiling=1.0
        )
    for step in range(steps):
        masks_BKCU = search.ask(step)[:]
        search.tell(masks_BKCU, curved(masks_BKCU), learning_rate=2.0)
    return search


SEARCHED = {**{name: (space, "joint") for name, space in SPACES.items()}, "separate": (FLAT, "separate")}
LIMITS = {"free": FREE, "usual": Limits(), "tight": Limits(min_kv_groups=1, min_channels=2, channel_multiple=2)}
methods = pytest.mark.parametrize("method", ["posterior", "reinforce"])


@methods
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize(("space", "pools"), SEARCHED.values(), ids=SEARCHED)
def test_challengers(space: UnitSpace, pools: Any, limits: Limits, method: str) -> None:
    """On the budget and within the limits; none is another or the mask they challenge, learned or not; repeatable."""
    search = make_search(method, space, pools=pools)
    learned_U = select(search.priorities_U, search.budget, limits=limits)
    other_U = select(random_numbers(space.size, 9), search.budget, limits=limits)
    for mask_U in (learned_U, other_U):
        found_NU = challengers(search, mask_U, limits, generator(7, "heat"), 21)
        assert 0 < len(found_NU) <= 21
        for found_U in found_NU:
            check(found_U, search.budget, limits)
        assert len({tuple(found_U.tolist()) for found_U in (mask_U, *found_NU)}) == 1 + len(found_NU)
        assert torch.equal(found_NU, challengers(search, mask_U, limits, generator(7, "heat"), 21))
        fewer_NU = challengers(search, mask_U, limits, generator(7, "heat"), 3)
        assert torch.equal(fewer_NU, found_NU[: len(fewer_NU)])
    others_NU = challengers(search, other_U, limits, generator(1, "heat"), 21)
    assert found_NU.shape != others_NU.shape or not torch.equal(found_NU, others_NU)


@methods
def test_challengers_leave_what_is_known_alone(method: str) -> None:
    """The search is not moved, nor are the masks, and what may be asked next is what it was."""
    search = make_search(method, NESTED)
    mask_U = select(search.priorities_U, search.budget)
    before = (search.ask(9)[:], search.priorities_U.clone(), mask_U.clone())
    challengers(search, mask_U, Limits(), generator(0, "heat"), 14)
    assert all(torch.equal(*pair) for pair in zip(before, (search.ask(9)[:], search.priorities_U, mask_U), strict=True))


MANY = make_space(["channel"], [(1, 311), (1, 207), (1, 523)])


@methods
@pytest.mark.parametrize("incumbent", ["learned", "another"])
def test_few_units_change_at_a_time(incumbent: str, method: str) -> None:
    """Of equal cost: for each decided again one other at most; of a group that is leant on, all in one direction."""
    search = make_search(method, MANY)
    priorities_U = search.priorities_U if incumbent == "learned" else random_numbers(MANY.size, 4)
    mask_U = select(priorities_U, search.budget)
    changed, most = {8: 0, 32: 0, 128: 0}, {0: 8, 2: 32, 4: 128}
    for seed in range(6):
        found_NU = challengers(search, mask_U, Limits(), generator(seed, "heat"), 7)
        if len(found_NU) < 7:
            continue  # a move that changed nothing shifts the others
        for index, again in most.items():
            differ_U = found_NU[index] != mask_U
            assert differ_U.sum() <= 2 * again
            changed[again] = max(changed[again], int(differ_U.sum()))
        for index in (1, 3, 5):
            assert one_group_against_the_rest(found_NU[index], mask_U)
    assert 0 < changed[8] < changed[32] < changed[128]
    if incumbent == "another":  # of which little is right
        assert changed[32] > 2 * 8 and changed[128] > 2 * 32


@pytest.mark.parametrize("space", [FLAT, LAYERED_BLOCKS], ids=["flat", "layered_blocks"])
def test_what_agrees_with_a_mask_selects_it(space: UnitSpace) -> None:
    """Whatever the priorities were, of units of every kind."""
    budget = Budget(space, 0.4)
    for seed in range(20):
        mask_U = select(random_numbers(space.size, seed + 100), budget, limits=Limits())
        agreeing_U = consistent_with_mask(random_numbers(space.size, seed), mask_U, budget, Limits())
        assert torch.equal(select(agreeing_U, budget, limits=Limits(), tie_break_U=mask_U.double()), mask_U)


@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("given", [{}, {"pools": "separate"}, {"also": {"kv_cache": 0.5}}], ids=str)
def test_what_agrees_with_a_mask_is_left_alone(given: dict[str, Any], factor: float) -> None:
    """But for a few units, which filled the budget up; whatever kv groups are worth beside channels."""
    space = make_space(["kv_group", "channel"], [(8, 200)] * 6, {"kv_group": (110, 290.0), "channel": (3, 6.0)})
    budget, priorities_U = Budget(space, 0.4, **given), random_numbers(space.size, 0)
    priorities_U[space.of_kind("kv_group")] *= factor
    mask_U = select(priorities_U, budget, limits=FREE)
    agreeing_U = consistent_with_mask(priorities_U, mask_U, budget, FREE)
    assert torch.equal(select(agreeing_U, budget, limits=FREE, tie_break_U=mask_U.double()), mask_U)
    assert (agreeing_U != priorities_U).sum() < 0.03 * space.size
    if "pools" in given:  # in each of which units cost the same, so that none fills up
        assert agreeing_U.equal(priorities_U)


def one_group_against_the_rest(found_U: torch.Tensor, mask_U: torch.Tensor) -> bool:
    """Whether the units of some group all came, or all went, and all others that changed went the other way."""
    moved_U = found_U.int() - mask_U.int()
    for start, end in itertools.pairwise(MANY.starts):
        inside, outside = moved_U[start:end], torch.cat([moved_U[:start], moved_U[end:]])
        for way in (1, -1):
            if (way * inside >= 0).all() and (way * outside <= 0).all() and inside.any():
                return True
    return False


@methods
def test_what_is_decided_again_is_decided_by_the_price(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn as they are believed to be, units are kept where a selection by belief alone would keep them."""
    search = make_search(method, MANY)
    monkeypatch.setattr(search, "draw", lambda _: search.priorities_U)
    believed_U = select(search.priorities_U, search.budget)
    mask_U = select(random_numbers(MANY.size, 4), search.budget)
    found = 0
    for seed in range(30):
        chosen = torch.randperm(MANY.size, generator=generator(seed, "heat"))[:8]
        for found_U in challengers(search, mask_U, Limits(), generator(seed, "heat"), 1):
            assert torch.equal(found_U[chosen], believed_U[chosen])
            found += 1
    assert found > 20


@pytest.mark.parametrize("space", [FLAT, LAYERED_BLOCKS], ids=["flat", "blocks"])
def test_a_group_goes_or_comes_back(space: UnitSpace) -> None:
    """Of a search sure of everything no other move finds a mask: a whole group is kept, or gone, that was not."""
    search = make_search("posterior", space, steps=0)
    mask_U = select(search.priorities_U, search.budget, limits=FREE)
    found_NU = torch.cat([challengers(search, mask_U, FREE, generator(seed, "heat"), 7) for seed in range(20)])
    assert 5 < len(found_NU) <= 20
    ways = set()
    for found_U in found_NU:
        turned = set()
        for group, start in zip(space.groups, space.starts, strict=False):
            before, after = (int(values_U[start : start + group.count].sum()) for values_U in (mask_U, found_U))
            if after != before and after in (group.count, int(group.kind == "kv_group" and group.layer == 0)):
                turned.add(after == group.count)
        assert turned
        ways |= turned
    assert ways == {False, True}


def test_nobody_challenges_where_nothing_can_change() -> None:
    """One way to keep a model: no rows, of as many units."""
    space = make_space(["kv_group"], [(1, 1), (1, 1)])
    search = make_search("posterior", space, steps=0)
    mask_U = select(search.priorities_U, search.budget, limits=FREE)
    assert challengers(search, mask_U, FREE, generator(0, "heat"), 7).shape == (0, 2)


# What is drawn for them


def test_draws_of_the_posterior() -> None:
    """Normal about the priorities, with the deviation of a worth over its price; none before a round."""
    search = make_search("posterior", FLAT)
    draws_NU = torch.stack([search.draw(generator(0, number)) for number in range(3_000)])
    costs_U = search.budget.marginal_cost(search.probs_U)
    z_NU = (draws_NU - search.priorities_U) * costs_U / search.deviation_U  # type: ignore[attr-defined]
    assert z_NU.mean().abs() < SAMPLED
    assert_close(z_NU.square().mean(), 1.0, SAMPLED)
    assert_close((z_NU < -1).double().mean(), statistics.NormalDist().cdf(-1), SAMPLED)
    untold = make_search("posterior", FLAT, steps=0)
    assert torch.equal(untold.draw(generator(0)), untold.priorities_U)


def test_draws_of_a_policy() -> None:
    """More than a half as often as the unit is kept; always within 0 and 1, also where the policy is certain."""
    search = make_search("reinforce", FLAT)
    assert isinstance(search, ReinforceSearch)
    search.probs_U = torch.linspace(0, 1, FLAT.size, dtype=torch.float64)
    draws_NU = torch.stack([search.draw(generator(0, number)) for number in range(10_000)])
    assert draws_NU.isfinite().all() and draws_NU.min() >= 0 and draws_NU.max() <= 1
    assert_close((draws_NU > 0.5).double().mean(0), search.probs_U, SAMPLED)
    assert (draws_NU[:, 0] == 0).all() and (draws_NU[:, -1] == 1).all()


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
def test_the_least_and_greatest_random_number(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even those, which nobody ever sees, give a priority."""
    search = make_search("reinforce", FLAT)
    search.probs_U = torch.linspace(0, 1, FLAT.size, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, number, dtype=torch.float64))
    assert search.draw(generator(0)).isfinite().all()
