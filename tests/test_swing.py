"""Masks that keep more or fewer channels of a layer together, and what a search learns of layers by it.

Letters: T all that may be drawn, B windows, K masks, C chunks, U units, G groups.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from enumeration import Draws, pieces
from searches import CHUNKS, SPACE, assert_resumes, miss, read, reading_search, showing
from spaces import FLAT, make_space, normal_numbers, of_kind, random_numbers
from tolerances import EXACT, SAMPLED, assert_close

from bernprune.config import make_config
from bernprune.errors import ConfigError
from bernprune.names import Sampling
from bernprune.policy.activity import ActiveTokens
from bernprune.policy.baselines import make_baseline
from bernprune.policy.beliefs import Beliefs, GroupMean, Line
from bernprune.policy.budget import Budget
from bernprune.policy.contrast import contrast
from bernprune.policy.masks import Design, Masks, amplitude, orders, some_rows
from bernprune.policy.posterior import PosteriorSearch
from bernprune.policy.reinforce import ReinforceSearch
from bernprune.policy.rounds import Informativeness
from bernprune.policy.search import MaskSearch, Reading
from bernprune.policy.sums import MaskSums
from bernprune.run.searches import make_search as make_run_search
from bernprune.units import UnitSpace

SWING = 0.8
TWO_LAYERS = make_space(["kv_group", "channel"], [(2, 41), (3, 23)])

both_samplings = pytest.mark.parametrize("sampling", ["independent", "antithetic"])


def make_masks(probs_U: torch.Tensor, design: Design, *, space: UnitSpace = TWO_LAYERS, step: int = 7) -> Masks:
    return Masks(design.rows_BKC, probs_U, design, Budget(space, 0.4), 3, step)


def make_search(space: UnitSpace = TWO_LAYERS, *, design: Design, **given: Any) -> PosteriorSearch:
    scores_U = random_numbers(space.size, given.pop("scores", 1))
    settings = {"seed": 3, "design": design, "round_steps": 2} | given
    return PosteriorSearch(Budget(space, 0.4), torch.full_like(scores_U, 0.6), scores_U, **settings)


def linear(masks_BKCU: Any, step: int, *, noise: float = 0.0) -> torch.Tensor:
    """What is kept has a worth of its own; a step has a level."""
    lost_BKC = -(masks_BKCU[:].double() @ random_numbers(masks_BKCU.shape[-1], 8)) / masks_BKCU.shape[2]
    return lost_BKC + noise * normal_numbers(*lost_BKC.shape, seed=step) + math.sin(step)


# Masks


@pytest.mark.parametrize("num_masks", [2, 5, 8])
def test_half_of_the_masks_keep_more_and_half_keep_less(num_masks: int) -> None:
    """Of each group on each text by itself; whatever is asked for with them."""
    design = Design(40, num_masks, 3, "antithetic", SWING)
    masks = make_masks(random_numbers(TWO_LAYERS.size, 0), design)
    levels_BKCG = masks.levels()
    assert levels_BKCG.shape == (40, num_masks, 3, 4)
    for level, count in ((-1, num_masks // 2), (0, num_masks % 2), (1, num_masks // 2)):
        assert ((levels_BKCG == level).sum(1) == count).all()
    assert torch.equal(masks.levels(slice(3, 9)), levels_BKCG[3:9])
    assert torch.equal(masks.levels((torch.tensor([5, 2]), 1)), levels_BKCG[[5, 2], 1])
    columns = levels_BKCG.movedim(1, 0).flatten(0, 2).double().T
    assert torch.corrcoef(columns).fill_diagonal_(0).abs().max() < 5 / math.sqrt(columns.shape[1])


@both_samplings
def test_swing_moves_channels_together_and_leaves_the_policy_alone(sampling: Sampling) -> None:
    """Each is kept with s + a, s - a or s by its level, hence with s; kv groups are what they are without."""
    probs_U = random_numbers(TWO_LAYERS.size, 0)
    swinging, plain = Design(1500, 5, 2, sampling, SWING), Design(1500, 5, 2, sampling)
    masks, channels_U = make_masks(probs_U, swinging), of_kind(TWO_LAYERS, "channel")
    kept_BKCU = masks[:]
    levels_BKCU = masks.levels()[..., TWO_LAYERS.group_U]
    amplitude_U = amplitude(probs_U, swinging, TWO_LAYERS)
    assert_close(amplitude_U, SWING * probs_U * (1 - probs_U) * channels_U, EXACT)
    for level in (-1, 0, 1):
        at_level = levels_BKCU == level
        share_U = (kept_BKCU & at_level).sum((0, 1, 2)) / at_level.sum((0, 1, 2))
        assert_close(share_U, probs_U + level * amplitude_U, SAMPLED)
    assert_close(kept_BKCU.double().mean((0, 1, 2)), probs_U, SAMPLED)
    assert torch.equal(kept_BKCU[..., ~channels_U], make_masks(probs_U, plain)[:][..., ~channels_U])


def test_the_number_of_channels_varies_by_swing() -> None:
    """By the sum of amplitudes, beside what units vary by one by one at their levels."""
    probs_U, design = torch.full((TWO_LAYERS.size,), 0.5, dtype=torch.float64), Design(3000, 2, 1, swing=0.5)
    numbers_N = make_masks(probs_U, design)[:][..., 2:43].sum(-1).double().flatten()
    together, alone = (41 * 0.125) ** 2, 41 * (0.25 - 0.125**2)
    assert_close(numbers_N.var(), together + alone, 0.06)


@pytest.mark.parametrize("index", [slice(1, 3), (2, slice(1, 4)), torch.tensor([2, 0, 2])])
@both_samplings
def test_swinging_masks_do_not_depend_on_what_is_asked_for(sampling: Sampling, index: Any) -> None:
    masks = make_masks(random_numbers(TWO_LAYERS.size, 0), Design(3, 5, 2, sampling, SWING))
    assert torch.equal(masks[index], masks[:][index])
    assert torch.equal(masks.flatten(0, 2)[7:23], masks[:].flatten(0, 2)[7:23])
    some = some_rows(masks, index)
    assert isinstance(some, Masks)
    assert torch.equal(some[:], masks[:][index])
    assert torch.equal(some.levels(), masks.levels()[index])
    assert torch.equal(some_rows(masks[:], index)[:], masks[:][index])


# Estimates


def swung_draws(probs_U: torch.Tensor, swing: float, num_masks: int, sampling: Sampling) -> tuple[Draws, torch.Tensor]:
    """All that a window may draw, bool ``[T, K, 1, U]``, its probabilities, and the levels of it ``[T, K, 1, 1]``."""
    levels = sorted({*itertools.permutations([-1] * (num_masks // 2) + [0] * (num_masks % 2) + [1] * (num_masks // 2))})
    draws, weights, drawn = [], [], []
    for level_K in torch.tensor(levels, dtype=torch.float64):
        by_unit = []
        for unit, probability in enumerate(probs_U.tolist()):
            own_K = probability + level_K * swing * probability * (1 - probability)
            if sampling == "antithetic":
                by_unit.append(pieces(own_K, orders(num_masks)[unit]))
            else:
                kept_PK = torch.cartesian_prod(*[torch.tensor([False, True])] * num_masks)
                by_unit.append((kept_PK, torch.where(kept_PK, own_K, 1 - own_K).prod(1)))
        chosen = torch.cartesian_prod(*[torch.arange(len(lengths)) for _, lengths in by_unit])
        draws.append(torch.stack([kept[chosen[:, i]] for i, (kept, _) in enumerate(by_unit)], dim=-1))
        weights.append(torch.stack([lengths[chosen[:, i]] for i, (_, lengths) in enumerate(by_unit)]).prod(0))
        drawn.append(level_K.expand(len(chosen), -1))
    weights_T = torch.cat(weights) / len(levels)
    assert_close(weights_T.sum(), 1.0, EXACT)
    return (torch.cat(draws)[:, :, None], weights_T), torch.cat(drawn)[:, :, None, None]


@both_samplings
@pytest.mark.parametrize("num_masks", [2, 3, 4])
@pytest.mark.parametrize("swing", [0.5, 1.0])
def test_effects_of_swinging_channels_are_unbiased(sampling: Sampling, num_masks: int, swing: float) -> None:
    """Of a linear loss, over all that may be drawn; without their levels, channels answer for each other."""
    probs_U = torch.tensor([0.13, 0.5, 0.96], dtype=torch.float64)
    worth_U = torch.tensor([0.7, -1.3, 2.0], dtype=torch.float64)
    (draws_TKCU, weights_T), levels_TKCG = swung_draws(probs_U, swing, num_masks, sampling)
    losses_TKC = 3 - draws_TKCU.double() @ worth_U
    search = make_search(make_space(["channel"], [(1, 3)]), design=Design(1, num_masks, 1, sampling, swing))
    search.probs_U, search.beliefs.worth_U = probs_U, torch.tensor([0.2, 0.4, -0.1], dtype=torch.float64)
    seen = search.estimate(draws_TKCU, losses_TKC, levels_TKCG)
    effects_TU, advantages_TKC = seen.effects_BU, seen.advantages_BKC
    assert_close(weights_T @ effects_TU, -worth_U, EXACT)
    blind_TU = search.estimate(draws_TKCU, losses_TKC).effects_BU
    assert ((weights_T @ blind_TU + worth_U).abs() > 0.01).all()
    # And of all together, as ``tell`` sums it up.
    told_T = (advantages_TKC * levels_TKCG[..., 0]).sum((1, 2)) / num_masks
    strength = 2 * (num_masks // 2) / (num_masks - 1)
    amplitude_U = swing * probs_U * (1 - probs_U)
    assert_close(-(weights_T @ told_T) / strength, amplitude_U @ (worth_U - search.worth_U), EXACT)


@both_samplings
def test_contrasts_without_swing_are_those_of_a_policy_without_levels(sampling: Sampling) -> None:
    probs_U = random_numbers(60, 0)
    plain_U = contrast(probs_U, Design(1, 5, 1, sampling))
    assert_close(contrast(probs_U, Design(1, 5, 1, sampling, 1e-9), 0 * probs_U), plain_U, EXACT)
    settled_U = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert contrast(settled_U, Design(1, 5, 1, sampling, 0.5), 0 * settled_U).tolist() == [0.0, 0.0]


# In the search


@pytest.mark.parametrize("num_masks", [3, 4])
@both_samplings
def test_what_channels_are_worth_together_is_observed(sampling: Sampling, num_masks: int) -> None:
    """Within its own standard error, and no better than that; also once something is believed."""
    worth_U, misses = random_numbers(TWO_LAYERS.size, 8), []
    for seed in range(12):
        search = make_search(design=Design(16, num_masks, 2, sampling, SWING), round_steps=1e9, discount=0.0, seed=seed)
        search.beliefs.worth_U = 0.5 + 0 * worth_U
        for step in range(4):
            masks_BKCU = search.ask(step)
            search.tell(masks_BKCU, linear(masks_BKCU, step, noise=0.5), learning_rate=0.0)
        for group in search._group_means():
            weights_N = search.probs_U[group.members_N] * (1 - search.probs_U[group.members_N])
            assert_close(group.weights_N, weights_N / weights_N.sum(), EXACT)
            misses.append(((group.mean - group.weights_N @ worth_U[group.members_N]) / group.noise.sqrt()).item())
    assert len(misses) == 24
    assert 0.4 < torch.tensor(misses).square().mean() < 2.0


def test_layers_are_told_apart_by_swing() -> None:
    """With half of the error, squared, that channels drawn one by one leave."""
    space = make_space(["channel"], [(1, 151), (1, 97), (1, 120)])
    worth_U = torch.tensor([0.3, 0.6, 1.0], dtype=torch.float64)[space.layer_U]
    errors = {0.0: 0.0, 0.5: 0.0}
    for swing, seed in itertools.product(errors, range(6)):
        design = Design(8, 4, 2, "antithetic", swing)
        search = make_search(space, design=design, seed=seed, round_steps=4, scores=seed)
        for step in range(12):
            masks_BKCU = search.ask(step)
            losses_BKC = -(masks_BKCU[:].double() @ worth_U) + 8 * normal_numbers(8, 4, 2, seed=step + 100 * seed)
            search.tell(masks_BKCU, losses_BKC / 2, learning_rate=0.0)
        for members_N in space.by_layer("channel"):
            errors[swing] += (search.worth_U - worth_U)[members_N].mean().square().item()
    assert errors[0.5] < 0.5 * errors[0.0], errors


def test_swing_falls_with_the_rounds() -> None:
    """An r-th of it in round r; where the losses did not differ, no round has ended."""
    search, seen = make_search(design=Design(3, 4, 2, "antithetic", 0.6)), []
    for step in range(8):
        masks_BKCU = search.ask(step)
        assert isinstance(masks_BKCU, Masks)
        seen.append(masks_BKCU.design.swing)
        losses_BKC = torch.zeros(3, 4, 2) if step < 2 else linear(masks_BKCU, step, noise=0.1)
        search.tell(masks_BKCU, losses_BKC, learning_rate=0.0)
    assert seen == pytest.approx([0.6, 0.6, 0.6, 0.6, 0.3, 0.3, 0.2, 0.2])


def test_a_round_that_told_nothing_leaves_no_trace() -> None:
    search = make_search(design=Design(3, 4, 2, "antithetic", 0.6))
    for step in range(3):
        losses_BKC = torch.zeros(3, 4, 2) if step < 2 else linear(search.ask(step), step, noise=0.1)
        search.tell(search.ask(step), losses_BKC, learning_rate=0.0)
    assert search.state_dict()["swung"]["count"] == 3


@pytest.mark.parametrize("stop", [3, 4], ids=["within_a_round", "between_rounds"])
def test_a_search_that_swings_may_stop_and_go_on(stop: int, tmp_path: Path) -> None:
    def learn(search: MaskSearch, steps: range) -> None:
        for step in steps:
            masks_BKCU = search.ask(step)
            search.tell(masks_BKCU, linear(masks_BKCU, step, noise=0.1), learning_rate=0.0)

    assert_resumes(lambda: make_search(FLAT, design=Design(3, 4, 2, "antithetic", 0.5)), learn, stop, tmp_path)


def test_levels_tell_nothing_where_masks_are_missing() -> None:
    """Those that are left do not add up to zero. What single units did is learned all the same, at the round's end."""
    search = make_search(design=Design(1, 4, 1, "independent", 1.0), round_steps=3)
    for step, given in enumerate((4, 3, 2)):
        masks_BKCU = some_rows(search.ask(step), (slice(None), slice(given)))
        state = search.state_dict()
        assert (state["count"], state["swung"]["count"]) == (step, min(step, 1))
        search.tell(masks_BKCU, linear(masks_BKCU, step), learning_rate=1.0)
    assert search.rounds == 1 and search.worth_U.isfinite().all() and search.worth_U.any()


def test_some_windows_may_be_missing() -> None:
    """Those told are learned from as if the others had never been; a tensor has lost its levels."""
    few, many = (make_search(FLAT, design=Design(4, 4, 2, "antithetic", 0.5), round_steps=1) for _ in range(2))
    masks_BKCU, told = many.ask(0), torch.tensor([True, False, True, True])
    losses_BKC = linear(masks_BKCU, 0)
    many.tell(some_rows(masks_BKCU, told), losses_BKC[told], learning_rate=0.0)
    by_hand = some_rows(few.ask(0), torch.tensor([0, 2, 3]))
    few.tell(by_hand, losses_BKC[[0, 2, 3]], learning_rate=0.0)
    assert many.rounds == few.rounds == 1
    assert torch.equal(many.worth_U, few.worth_U)
    with pytest.raises(ConfigError, match="masks that swing are told as they were asked for, but got a tensor"):
        many.tell(masks_BKCU[:], losses_BKC, learning_rate=0.0)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"swing": 1.5}, "swing must lie between 0 and 1, but is 1.5"),
        ({"swing": -0.1}, "swing must lie between 0 and 1, but is -0.1"),
        ({"swing": math.nan}, "swing must lie between 0 and 1, but is nan"),
        ({"swing": 0.5, "masks": 1}, "swing needs 2 masks or more on the same text, .* got 1 with"),
        ({"swing": 0.5, "sampling": "exact"}, "swing needs 2 masks .* do not meet the budget one by one, .* 'exact'"),
    ],
)
def test_a_swing_without_what_it_needs_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Design(**{"groups": 2, "masks": 4} | given)


def test_policy_gradients_do_not_know_swing() -> None:
    baseline, probs_U = make_baseline("leave-one-out", window=5, num_masks=4), random_numbers(FLAT.size, 0)
    with pytest.raises(ConfigError, match=r"policy gradients need masks without swing, but got 0\.5"):
        ReinforceSearch(Budget(FLAT, 0.4), probs_U, baseline=baseline, seed=3, design=Design(2, 4, swing=0.5))


# Together with what active tokens tell


@pytest.mark.parametrize("told", [False, True], ids=["untold", "told"])
def test_layers_are_told_once(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What swing tells scales what active tokens tell; without them, it goes to the beliefs."""
    scaled, believed = [], []
    conclude, learn = ActiveTokens.conclude_round, Beliefs.learn

    def conclude_round(self: Any, *given: Any, means: Any, **named: Any) -> bool:
        scaled.append(len(means))
        return conclude(self, *given, means=means, **named)

    def learn_too(self: Any, observed_U: torch.Tensor, noise_U: torch.Tensor, means: Any) -> None:
        believed.append(len(means))
        learn(self, observed_U, noise_U, means)

    monkeypatch.setattr(ActiveTokens, "conclude_round", conclude_round)
    monkeypatch.setattr(Beliefs, "learn", learn_too)
    search = reading_search(design=Design(16, 4, CHUNKS, "antithetic", SWING), discount=0.0)
    read(search, range(4), told=told)
    layers = len(SPACE.by_layer("channel"))
    assert scaled == [layers] * 2
    assert believed == [0 if told else layers] * 2


def test_worths_are_learned_from_active_tokens_in_spite_of_swing() -> None:
    """A token's losses under masks that swing are not laid to single channels."""
    told = {}
    for swing in (0.0, 1.0):
        design = Design(16, 4, CHUNKS, "antithetic", swing)
        search = reading_search(design=design, discount=0.0)
        read(search, range(12))
        told[swing] = miss(search)
    assert told[1.0] < 1.2 * told[0.0], told


def test_what_was_seen_of_a_policy_that_is_drawn_in_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, and there are no figures of the round before to show; where a round ends, it is learned."""
    search = reading_search(design=Design(16, 4, CHUNKS, "antithetic", 1.0), round_steps=3)
    read(search, range(4))
    assert search.diagnose(search.probs_U).keys() > {"regret", "agreement"}
    before, policy_U = search.state_dict(), search.probs_U
    assert before["count"] and before["swung"]["count"] and before["active"]["sums"]["count"]
    monkeypatch.setattr(Informativeness, "too_soft", True)
    read(search, range(4, 5))
    after = search.state_dict()
    assert search.drew_in and not search.probs_U.equal(policy_U)
    assert after["count"] == after["swung"]["count"] == after["active"]["sums"]["count"] == 0
    assert not search.diagnose(search.probs_U).keys() & {"regret", "agreement", "signal_to_noise"}
    assert search.beliefs.worth_U.equal(before["beliefs"]["worth_U"]) and search.softness == 0.5
    read(search, range(5, 6))
    assert (search.rounds, search.softness) == (2, 0.25) and search.diagnose(search.probs_U).keys() > {"regret"}
    assert not search.beliefs.worth_U.equal(before["beliefs"]["worth_U"])


def test_the_scale_of_active_tokens_follows_a_sure_layer() -> None:
    """The mean worth of a layer's channels is the one that was observed, if that is all but certain."""
    space, random = TWO_LAYERS, random_numbers(TWO_LAYERS.size, 4)
    active, channels_U = ActiveTokens(space), of_kind(TWO_LAYERS, "channel")
    kept_BKCU = (normal_numbers(32, 4, 1, space.size, seed=1) > 0).double()
    activities_BTN = normal_numbers(32, 6, int(channels_U.sum()), seed=2).abs().float()
    losses_BKT = -torch.einsum("bku,btu->bkt", kept_BKCU[:, :, 0][..., channels_U], activities_BTN.double())
    activities_BTU = torch.zeros(32, 6, space.size)
    activities_BTU[..., channels_U] = activities_BTN
    nothing_BKC, reading = torch.zeros(32, 4, 1).double(), Reading(losses_BKT, showing(activities_BTU, space))
    active.add(MaskSums(kept_BKCU.bool()), reading, nothing_BKC, levels_BKCG=None, amplitude_U=torch.zeros(space.size))
    means = [
        GroupMean(
            members_N, torch.full((len(members_N),), 1 / len(members_N)).double(), mean, 1e-12 * torch.ones_like(mean)
        )
        for members_N, mean in zip(space.by_layer("channel"), torch.tensor([3.0, 5.0]).double(), strict=True)
    ]
    observed_U, noise_U, zeros_U = random.clone(), torch.ones_like(random), torch.zeros_like(random)
    halves = (random.clone(), random.clone())
    given = {"contrast_U": torch.full_like(random, 0.25), "worth_U": zeros_U, "means": means}
    assert active.conclude_round(observed_U, noise_U, halves, **given)
    for group in means:
        assert_close(observed_U[group.members_N].mean(), group.mean, 1e-3)


# In the beliefs


def test_a_line_through_means_is_that_of_least_squares() -> None:
    """Units by themselves and a weighted mean of them, each by its variance and what sets units apart."""
    members_N, scores_NS = torch.arange(23), random_numbers(23, 0)[:, None]
    line, spread = Line(members_N, scores_NS, 0.0), 0.3
    line.spread = spread
    observed_N, noise_N = random_numbers(23, 1), 0.1 + random_numbers(23, 2)
    weights_N, mean, noise = random_numbers(23, 3) / random_numbers(23, 3).sum(), torch.tensor(2.5), torch.tensor(0.01)
    line.observe(observed_N, noise_N)
    line.observe_mean(weights_N, mean.double(), noise.double())
    features_MF = torch.cat([line.features_NF, weights_N[None] @ line.features_NF])
    values_M = torch.cat([observed_N, mean.double()[None]])
    variances_M = torch.cat([noise_N + spread, (noise + spread * weights_N.square().sum()).double()[None]])
    root_M = variances_M.rsqrt()
    expected_F = torch.linalg.lstsq(root_M[:, None] * features_MF, (root_M * values_M)[:, None]).solution[:, 0]
    assert_close(torch.linalg.solve(line.information_FF, line.response_F), expected_F, 1e-9)


def test_what_sets_units_apart_is_no_part_of_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    space, told = TWO_LAYERS, []
    monkeypatch.setattr(Line, "observe_mean", lambda self, weights_N, mean, noise: told.append(mean))
    beliefs = Beliefs(space, random_numbers(space.size, 0)[:, None], 0.1)
    observed_U, noise_U = random_numbers(space.size, 1), torch.full((space.size,), 1e-3, dtype=torch.float64)
    beliefs.learn(observed_U, noise_U)
    apart_U = beliefs.state_dict()["apart_U"]
    assert apart_U.abs().max() > 0.1
    means = [
        GroupMean(members_N, random_numbers(len(members_N), 2), torch.tensor(1.5), torch.tensor(0.1))
        for members_N in space.by_layer("channel")
    ]
    beliefs.learn(observed_U, noise_U, means)
    expected = [group.mean.double() - group.weights_N @ apart_U[group.members_N] for group in means]
    assert_close(torch.stack(told), torch.stack(expected), EXACT)


def test_a_state_of_swing_is_a_snapshot() -> None:
    search = make_search(FLAT, design=Design(3, 4, 2, "antithetic", 0.5), round_steps=9)
    state = []
    for step in range(2):
        masks_BKCU = search.ask(step)
        search.tell(masks_BKCU, linear(masks_BKCU, step, noise=0.1), learning_rate=0.0)
        state.append(search.state_dict()["swung"])
    assert (state[0]["count"], state[1]["count"]) == (3, 6)
    assert not torch.equal(state[0]["sum_U"], state[1]["sum_U"])


# As configured


@pytest.mark.parametrize(
    ("given", "swing"),
    [
        ({}, 1.0),
        ({"search": {"swing": 0.25}}, 0.25),
        ({"search": {"masks_per": "batch"}}, 1.0),
        ({"search": {"sampling": "exact"}}, 0.0),
        ({"granularity": ["kv_group"]}, 0.0),
        ({"preset": "reinforce"}, 0.0),
    ],
)
def test_what_swings_in_a_run(given: dict[str, Any], swing: float) -> None:
    config, space = make_config(given), TWO_LAYERS
    probs_U, scores_US = torch.full((space.size,), 0.7).double(), random_numbers(space.size, 0)[:, None]
    assert make_run_search(config, Budget(space, 0.3), probs_U, scores_US).design.swing == swing
