"""What active tokens tell of channels: right on average, surer than what all tokens tell, and in its own scale.

Letters: B windows, K masks, C chunks, T tokens, U units, N channels, L layers.
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from searches import (
    CHUNKS,
    SPACE,
    WINDOW,
    activities,
    assert_resumes,
    heavy_tailed,
    miss,
    read,
    reading_of,
    reading_search,
)
from spaces import LAYERED_BLOCKS, all_masks, make_space, normal_numbers, random_numbers
from tiny_models import VARIANTS, Variant, random_tokens
from tolerances import EXACT, LOGITS, assert_close

from bernprune.models.view import describe
from bernprune.objective import masked_objective
from bernprune.policy.activity import ActiveTokens, ActivitySums, Calibration
from bernprune.policy.baselines import less_the_others
from bernprune.policy.budget import Budget
from bernprune.policy.masks import Design
from bernprune.policy.posterior import PosteriorSearch
from bernprune.policy.search import Reading, Seen


def others(losses_BKT: torch.Tensor) -> torch.Tensor:
    """Less the mean of the other masks' losses, by loops over masks."""
    num_masks = losses_BKT.shape[1]
    rest = [losses_BKT[:, [k for k in range(num_masks) if k != mask]].mean(1) for mask in range(num_masks)]
    return losses_BKT - torch.stack(rest, dim=1)


def uniform(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# One round's sums


def add(sums: ActivitySums, masks_BKCN: torch.Tensor, advantages_BKT: torch.Tensor, active_BTN: torch.Tensor) -> None:
    """Some windows, token by token."""
    by_token_BKTN = masks_BKCN.repeat_interleave(advantages_BKT.shape[2] // masks_BKCN.shape[2], dim=2)
    products_BN = (advantages_BKT[..., None] * by_token_BKTN * active_BTN[:, None]).sum((1, 2)) / masks_BKCN.shape[1]
    sums.add(products_BN, active_BTN.square().sum(1), active_BTN.sum(1), tokens=active_BTN.shape[1])


def test_slopes_are_right_on_average() -> None:
    """Over all masks, whatever the losses: the regression of what a channel does to single tokens on its activity."""
    channels, masks, chunks, tokens = 2, 2, 2, 6
    draws_DKCN = all_masks(channels * masks * chunks).view(-1, masks, chunks, channels)
    codes_DKC = (draws_DKCN.long() * torch.tensor([1, 2])).sum(-1)
    tables_TM = normal_numbers(tokens, 4, seed=1)  # a token's loss under each mask of its chunk, interactions and all
    losses_DKT = torch.stack([tables_TM[t][codes_DKC[..., t // (tokens // chunks)]] for t in range(tokens)], dim=-1)
    activities_TN = heavy_tailed(tokens, channels, seed=2).double()
    sums = ActivitySums(channels)
    add(sums, draws_DKCN, others(losses_DKT), activities_TN.expand(len(draws_DKCN), -1, -1))
    done_TN = torch.stack(
        [tables_TM[:, [1, 3]] - tables_TM[:, [0, 2]], tables_TM[:, [2, 3]] - tables_TM[:, [0, 1]]], -1
    )
    slopes_N = (activities_TN * done_TN.mean(1)).sum(0) / activities_TN.square().sum(0)
    assert_close(sums.effects(torch.full((channels,), 0.25)), slopes_N * activities_TN.sum(0), EXACT)


def random_round(seed: int, num_windows: int = 97) -> tuple[ActivitySums, ActivitySums, torch.Tensor, torch.Tensor]:
    """What active tokens, and what all alike, tell of a round in which channels act in proportion to their activity;
    with their contrast and the truth."""
    worth_N = random_numbers(40, 1)
    probs_N = 0.2 + 0.7 * random_numbers(40, 2)
    activities_BTN = heavy_tailed(num_windows, WINDOW, 40, seed=seed)
    masks_BKCN = uniform(num_windows, 3, CHUNKS, 40, seed=seed + 1) < probs_N
    by_token_BKTN = masks_BKCN.repeat_interleave(WINDOW // CHUNKS, dim=2)
    losses_BKT = -(by_token_BKTN * activities_BTN[:, None]).double() @ worth_N
    losses_BKT += 20 * normal_numbers(*losses_BKT.shape, seed=seed + 1)
    active, plain = ActivitySums(40), ActivitySums(40)
    add(active, masks_BKCN, others(losses_BKT), activities_BTN.double())
    add(plain, masks_BKCN, others(losses_BKT), torch.ones_like(activities_BTN).double())
    return active, plain, probs_N * (1 - probs_N), worth_N * activities_BTN.double().sum(1).mean(0)


def test_active_tokens_tell_more_and_how_much() -> None:
    """Half the error and less; and errors are no larger than is said, nor much smaller."""
    squares: dict[str, list[torch.Tensor]] = {"active": [], "plain": [], "stated": []}
    for seed in range(0, 40, 2):
        active, plain, contrast_N, truth_N = random_round(seed)
        errors_N = active.effects(contrast_N) + truth_N
        squares["active"].append(errors_N.square())
        squares["plain"].append((plain.effects(contrast_N) + truth_N).square())
        squares["stated"].append(active.variance(contrast_N))
    error, plain_error, stated = (torch.stack(squares[name]).mean().item() for name in ("active", "plain", "stated"))
    assert error < 0.25 * plain_error
    assert 0.9 < stated / error < 1.5


@pytest.mark.parametrize("cuts", [[1] * 97, [5, 91, 1], [0, 96, 0, 1]], ids=["single", "uneven", "empty"])
def test_sums_are_those_of_all_windows(cuts: list[int]) -> None:
    """Effects, halves and variance, however the windows come."""
    masks_BKCN = uniform(97, 2, CHUNKS, 5, seed=1) < 0.6
    losses_BKT, activities_BTN = normal_numbers(97, 2, WINDOW, seed=2), heavy_tailed(97, WINDOW, 5, seed=3).double()
    whole, parts = ActivitySums(5), ActivitySums(5)
    add(whole, masks_BKCN, losses_BKT, activities_BTN)
    for part in zip(*(values.split(cuts) for values in (masks_BKCN, losses_BKT, activities_BTN)), strict=True):
        add(parts, *part)
    contrast_N = torch.full((5,), 0.24, dtype=torch.float64)
    even, odd = ActivitySums(5), ActivitySums(5)
    add(even, masks_BKCN[::2], losses_BKT[::2], activities_BTN[::2])
    add(odd, masks_BKCN[1::2], losses_BKT[1::2], activities_BTN[1::2])
    assert parts.count == whole.count == 97
    for name in ("effects", "variance", "halves"):
        assert_close(getattr(parts, name)(contrast_N), getattr(whole, name)(contrast_N), EXACT)
    for half_N, sums in zip(whole.halves(contrast_N), (even, odd), strict=True):
        ratio_N = (whole._active_N / 97) / (sums._active_N / sums.count)  # a window's activity is that of both
        assert_close(half_N, ratio_N * sums.effects(contrast_N), EXACT)


def test_the_scale_of_activity_changes_nothing() -> None:
    masks_BKCN, losses_BKT = uniform(9, 2, CHUNKS, 5, seed=1) < 0.6, normal_numbers(9, 2, WINDOW, seed=2)
    activities_BTN, scales_N = heavy_tailed(9, WINDOW, 5, seed=3).double(), 10.0 ** torch.arange(-5, 5, 2).double()
    one, other = ActivitySums(5), ActivitySums(5)
    add(one, masks_BKCN, losses_BKT, activities_BTN)
    add(other, masks_BKCN, losses_BKT, activities_BTN * scales_N)
    contrast_N = torch.full((5,), 0.24, dtype=torch.float64)
    for name in ("effects", "variance"):
        assert_close(getattr(one, name)(contrast_N), getattr(other, name)(contrast_N), EXACT)
    assert_close(one.evenness_N, other.evenness_N, EXACT)


# The factors of layers


def calibrated(plain_LN: torch.Tensor, active_LN: torch.Tensor, noise: float) -> torch.Tensor:
    calibration = Calibration(len(plain_LN))
    for layer, (plain_N, active_N) in enumerate(zip(plain_LN, active_LN, strict=True)):
        calibration.learn(layer, plain_N, torch.full_like(plain_N, noise), active_N)
    return calibration.factors()


def test_layers_that_clearly_differ_have_factors_of_their_own() -> None:
    factors_L, active_LN = torch.tensor([0.3, 0.5, 0.9, 2.0]).double(), 1 + uniform(4, 200, seed=1)
    assert_close(calibrated(factors_L[:, None] * active_LN, active_LN, 1e-6), factors_L, 1e-3)


def test_layers_that_may_be_alike_share_a_factor() -> None:
    """Their own ratios miss it by more than half; together they do not."""
    active_LN, errors = 0.1 + 0.1 * uniform(16, 50, seed=1), {"own": 0.0, "shared": 0.0}
    for seed in range(10):
        plain_LN = 0.5 * active_LN + normal_numbers(16, 50, seed=seed + 2)
        errors["shared"] += (calibrated(plain_LN, active_LN, 1.0) - 0.5).square().mean().item() / 10
        errors["own"] += (plain_LN.sum(1) / active_LN.sum(1) - 0.5).square().mean().item() / 10
    assert errors["shared"] < 0.3 * errors["own"]


def test_factors_are_sensible_whatever_is_told() -> None:
    """1 before anything is known; of one layer its own; never far from 1, nor other than a number."""
    assert_close(Calibration(3).factors(), [1.0] * 3, EXACT)
    ones_LN = torch.ones(1, 7, dtype=torch.float64)
    assert_close(calibrated(0.4 * ones_LN, ones_LN, 1.0), [0.4], EXACT)
    assert_close(calibrated(-ones_LN, ones_LN, 1.0), [0.1], EXACT)
    assert_close(calibrated(1e9 * ones_LN, ones_LN, 1.0), [10.0], EXACT)
    assert_close(calibrated(ones_LN, 0 * ones_LN, 1.0), [1.0], EXACT)
    for seed in range(8):  # whatever rounding leaves
        large_LN = 1e9 * uniform(1, 7, seed=seed)
        assert_close(calibrated(0.7 * large_LN, large_LN, 1e-12), [0.7], EXACT)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_layer_without_active_channels_tells_nothing(layers: int) -> None:
    """Whatever all tokens tell of it; it has the factor that the others have in common."""
    active_LN = uniform(layers, 7, seed=1)
    plain_LN = 0.4 * active_LN + 0.3 * normal_numbers(layers, 7, seed=2)
    expected_L = calibrated(plain_LN, active_LN, 0.1)
    dead_1N = torch.zeros(1, 7, dtype=torch.float64)
    found_L = calibrated(torch.cat([plain_LN, 9 * normal_numbers(1, 7, seed=3)]), torch.cat([active_LN, dead_1N]), 0.1)
    assert_close(found_L[:-1], expected_L, EXACT)
    assert expected_L.min() <= found_L[-1] <= expected_L.max()


# In the search


def test_worths_are_learned_from_active_tokens() -> None:
    """In the scale of the loss, and nearer to the truth than without."""
    told, untold = reading_search(discount=0.0), reading_search(discount=0.0)
    read(told, range(12))
    read(untold, range(12), told=False)
    assert told.rounds == untold.rounds == 6
    assert miss(told) < 0.7 * miss(untold)
    assert told.beliefs.reliability > untold.beliefs.reliability


@pytest.mark.parametrize("design", [Design(16, 4, CHUNKS), Design(16, 3, 1, "antithetic"), Design(5, 2, 2, "exact")])
def test_even_activity_tells_what_all_tokens_tell(design: Design, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what was taken out of the losses before, and in halves of the text."""
    search, seen = reading_search(design=design, discount=0.0), []
    conclude = ActiveTokens.conclude_round

    def watched(self: Any, observed_U: torch.Tensor, noise_U: torch.Tensor, halves: Any, **given: Any) -> bool:
        plain = [values_U.clone() for values_U in (observed_U, *halves)]
        told = conclude(self, observed_U, noise_U, halves, **given)
        seen.append((plain, [observed_U, *halves]))
        return told

    monkeypatch.setattr(ActiveTokens, "conclude_round", watched)
    read(search, range(6), even=True)
    assert len(seen) == 3
    assert search.worth_U.abs().max() > 0.1
    for plain, active in seen:
        for one_U, other_U in zip(plain, active, strict=True):
            assert_close(other_U, one_U, 1e-5)  # activities are in float32


def scaled(reading: Reading, scale: float) -> Reading:
    """With another activity of the first three channels of the first layer."""

    def look(see: Seen) -> None:
        def see_scaled(layer: int, windows: slice, active_RTF: torch.Tensor) -> None:
            scales_F = torch.where((torch.arange(active_RTF.shape[-1]) < 3) & (layer == 0), scale, 1.0)
            see(layer, windows, active_RTF * scales_F)

        reading.look(see_scaled)

    return Reading(reading.losses_BKT, look)


def test_a_channel_that_is_never_active_is_survived() -> None:
    """Whatever its probability; and the others of its layer are still learned of from where they are active."""
    for keep in (0.2, 0.4, 0.6):
        sums = ActivitySums(3)
        masks_BKCN = (random_numbers(4 * 6 * 3, 1) < keep).float().view(4, 6, 1, 3)
        activities_BTN = random_numbers(4 * 8 * 3, 2).float().view(4, 8, 3)
        activities_BTN[..., 1] = 0
        add(sums, masks_BKCN, less_the_others(normal_numbers(4, 6, 8, seed=3)), activities_BTN)
        for found in (sums.effects(torch.full((3,), keep * (1 - keep))), sums.variance(torch.full((3,), keep))):
            assert found.isfinite().all() and (found != 0).tolist() == [True, False, True]
    told, dead = reading_search(), reading_search()
    for step in range(4):
        for search, scale in ((told, 1.0), (dead, 0.0)):
            masks_BKCU = search.ask(step)
            reading = scaled(reading_of(search, masks_BKCU, step), scale)
            losses_BKC = reading.losses_BKT.unflatten(2, (CHUNKS, -1)).sum(-1)
            search.tell(masks_BKCU, losses_BKC, learning_rate=0, reading=reading)
    assert dead.rounds == 2
    assert dead.worth_U.isfinite().all()
    assert (dead.deviation_U > 0).all()
    assert dead.deviation_U.isfinite().all()
    plain = reading_search(by_activity=False)
    read(plain, range(4), told=False)
    others_N = SPACE.by_layer("channel")[0][3:]
    near, far = ((other.worth_U - told.worth_U)[others_N].abs().mean() for other in (dead, plain))
    assert near < far / 2


def test_a_channel_that_is_never_active_loses_its_credit() -> None:
    """However much the initial scores make of it: all tokens tell that it does nothing."""
    idle_N = SPACE.by_layer("channel")[0][:6]
    scores_U = random_numbers(SPACE.size, 8)
    scores_U[idle_N] = 2 + random_numbers(6, 1)
    search = PosteriorSearch(
        Budget(SPACE, 0.4),
        torch.full_like(scores_U, 0.6),
        scores_U,
        seed=3,
        design=Design(16, 4, CHUNKS),
        round_steps=8,
        discount=0.0,
    )
    for step in range(64):
        masks_BKCU = search.ask(step)
        reading = reading_of(search, masks_BKCU, step, idle=idle_N.tolist(), noise=3.0)
        losses_BKC = reading.losses_BKT.unflatten(2, (CHUNKS, -1)).sum(-1)
        search.tell(masks_BKCU, losses_BKC, learning_rate=0, reading=reading)
    assert search.rounds == 8
    assert (search.probs_U[idle_N] < 0.1).all() and (search.worth_U[idle_N] < 0.2).all()


def test_what_a_round_was_told_in_vain_is_forgotten() -> None:
    """Losses that are all alike end a round that nothing is learned from, and whose activities are of no use later."""
    search = reading_search()
    for step in range(2):
        masks_BKCU = search.ask(step)
        reading = reading_of(search, masks_BKCU, step)
        alike = replace(reading, losses_BKT=torch.full_like(reading.losses_BKT, 2.0))
        losses_BKC = alike.losses_BKT.unflatten(2, (CHUNKS, -1)).sum(-1)
        search.tell(masks_BKCU, losses_BKC, learning_rate=0, reading=alike)
    assert search.rounds == 0 and not search._active._sums.count


@pytest.mark.parametrize("space", [SPACE, LAYERED_BLOCKS], ids=["flat", "nested"])
@pytest.mark.parametrize("stop", [3, 4], ids=["within_a_round", "between_rounds"])
def test_a_search_that_reads_may_stop_and_go_on(space: Any, stop: int, tmp_path: Path) -> None:
    assert_resumes(lambda: reading_search(space=space), read, stop, tmp_path)


@pytest.mark.parametrize(
    ("kinds", "design", "given", "needed"),
    [
        (["kv_group", "channel"], Design(2, 2, 2), {}, True),
        (["kv_group", "channel"], Design(2, 2), {}, True),
        (["kv_group", "channel"], Design(1, 2), {}, False),  # a mask for the whole batch
        (["kv_group", "channel"], Design(2, 2, 2), {"by_activity": False}, False),
        (["kv_group"], Design(2, 2, 2), {}, False),
    ],
)
def test_what_is_not_needed_is_not_read(kinds: Any, design: Design, given: Any, needed: bool) -> None:
    assert reading_search(space=make_space(kinds, [(3, 5), (4, 6)]), design=design, **given).needs_reading is needed


# Of a model


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_activities_are_what_enters_the_down_projections(variant: Variant) -> None:
    """Under the mask, that of removed channels as if they were kept; however the windows are cut up."""
    model = variant.model()
    view, tokens_BT = describe(model), random_tokens(3, 11)
    mask_U = (random_numbers(view.space.size, 4) < 0.6) | view.space.of_kind("kv_group")  # no branch is closed
    with masked_objective(view) as objective:
        found_BTN = activities(objective, mask_U, tokens_BT)
        again_BTN = activities(objective, mask_U.float(), tokens_BT)  # gates
    with masked_objective(view, rows_per_forward=2) as objective:
        assert_close(activities(objective, mask_U, tokens_BT), found_BTN, LOGITS[torch.float64])
    taken: list[torch.Tensor] = []
    kept = [mask_U[view.space.span("channel", index)] for index in range(len(view.layers))]

    def cut(_: Any, given: Any) -> Any:  # the same by hand: down projections that ignore what is removed
        taken.append(given[0].abs())
        return (given[0] * kept[len(taken) - 1],)

    hooks = [layer.down.register_forward_pre_hook(cut) for layer in view.layers]
    with torch.no_grad():
        model(input_ids=tokens_BT)
    for hook in hooks:
        hook.remove()
    assert found_BTN.shape == (3, 11, int(view.space.of_kind("channel").sum()))
    assert torch.equal(found_BTN, again_BTN)
    assert_close(found_BTN, torch.cat(taken, dim=-1), LOGITS[torch.float64])


def test_watching_ends_with_its_block() -> None:
    """Afterwards nothing is recorded, and what one mask removes is not computed again."""
    view, tokens_BT = describe(VARIANTS[0].model()), random_tokens(2, 9)
    mask_U = random_numbers(view.space.size, 4) < 0.6
    with masked_objective(view) as objective:
        before = objective.losses(mask_U[None], tokens_BT)
        activities(objective, mask_U, tokens_BT)
        branches = list(itertools.chain(*(both.values() for both in objective._live._branches.values())))
        assert all(branch.watch is None for branch in branches)
        assert torch.equal(objective.losses(mask_U[None], tokens_BT), before)
