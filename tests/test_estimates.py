"""What a step tells of each unit, by exact enumeration of all that it may draw, independent and antithetic.

Letters: T all that may be drawn, B windows, K masks, C chunks, U units.
"""

from dataclasses import replace

import pytest
import torch
from enumeration import (
    DRAWS,
    PROBS_U,
    Draws,
    antithetic_draws,
    exact_effects,
    expected_move,
    independent_draws,
    losses_of,
)
from spaces import make_space, normal_numbers
from tolerances import EXACT, STEP, assert_close

from bernprune.errors import ConfigError
from bernprune.names import BaselineName, Sampling, Scaling
from bernprune.policy.baselines import BASELINES, make_baseline
from bernprune.policy.budget import Budget
from bernprune.policy.contrast import contrast
from bernprune.policy.masks import Design, amplitude
from bernprune.policy.posterior import PosteriorSearch
from bernprune.policy.reinforce import ReinforceSearch

SHARP_U = torch.tensor([0.05, 0.95, 0.95, 0.05], dtype=torch.float64)
WORTHS = {"unknown": torch.zeros(4), "believed": torch.tensor([0.7, -1.3, 0.0, 4.0])}
every_sampling = pytest.mark.parametrize("sampling", DRAWS)


def posterior(
    probs_U: torch.Tensor, design: Design, worth_U: torch.Tensor | None = None, discount: float = 1.0
) -> PosteriorSearch:
    """A search that happens to stand at this policy, believing these worths, by default none."""
    budget = Budget(make_space(["channel"], [(1, len(probs_U))]), 0.4)
    search = PosteriorSearch(
        budget, probs_U, torch.zeros_like(probs_U), seed=3, design=design, round_steps=1, discount=discount
    )
    search.probs_U = probs_U
    if worth_U is not None:
        search.beliefs.worth_U = worth_U
    return search


def reinforce(
    probs_U: torch.Tensor, design: Design, *, baseline: BaselineName = "leave-one-out", scaling: Scaling = "raw"
) -> ReinforceSearch:
    """A search whose limit is so far that nothing is projected in a small step."""
    memory = make_baseline(baseline, window=5, num_masks=design.masks)
    budget = Budget(make_space(["channel"], [(1, len(probs_U))]), 0.001)
    settings = {"projection": "published", "floor": 0.0, "ceiling": 1.0, "discount": 0.7}
    return ReinforceSearch(budget, probs_U, baseline=memory, seed=3, design=design, scaling=scaling, **settings)


# Effects


@every_sampling
@pytest.mark.parametrize("worth_U", WORTHS.values(), ids=WORTHS)
@pytest.mark.parametrize(
    ("num_units", "num_masks", "num_chunks", "discount"),
    [(4, 2, 1, 1.0), (4, 3, 1, 0.4), (3, 2, 2, 1.0), (3, 2, 2, 0.4), (3, 2, 2, 0.0), (2, 3, 2, 1.0), (2, 3, 2, 0.4)],
)
def test_effects_are_unbiased(
    num_units: int, num_masks: int, num_chunks: int, discount: float, worth_U: torch.Tensor, sampling: Sampling
) -> None:
    """Over all draws, whatever is believed; antithetic masks that are taken for independent mislead."""
    probs_U, worth_U = PROBS_U[-num_units:], worth_U[-num_units:].double()
    draws_TKCU, weights_T = DRAWS[sampling](probs_U, num_masks, num_chunks)
    losses_TKC, expected_U = losses_of(draws_TKCU), exact_effects(probs_U, num_chunks, discount)
    design = Design(1, num_masks, num_chunks, sampling)
    effects_TU = posterior(probs_U, design, worth_U, discount).estimate(draws_TKCU, losses_TKC).effects_BU
    assert_close(weights_T.sum(), 1.0, EXACT)
    assert_close(weights_T @ effects_TU, expected_U, EXACT)
    if sampling == "antithetic":  # negative control
        plain = posterior(probs_U, Design(1, num_masks, num_chunks), discount=discount)
        misled_U = weights_T @ plain.estimate(draws_TKCU, losses_TKC).effects_BU
        assert ((misled_U - expected_U).abs() > 0.01 * expected_U.abs()).all()
    if num_chunks > 1 and discount < 1:  # negative control: discounting shows
        assert (expected_U - exact_effects(probs_U, num_chunks, 1.0)).abs().max() > 0.1


@pytest.mark.parametrize(("num_units", "num_chunks", "discount"), [(4, 1, 1.0), (2, 2, 0.4), (2, 2, 0.0)])
def test_four_antithetic_masks_are_unbiased(num_units: int, num_chunks: int, discount: float) -> None:
    """Too many to enumerate as independent ones."""
    probs_U = PROBS_U[-num_units:]
    draws_TKCU, weights_T = antithetic_draws(probs_U, 4, num_chunks)
    search = posterior(probs_U, Design(1, 4, num_chunks, "antithetic"), discount=discount)
    effects_TU = search.estimate(draws_TKCU, losses_of(draws_TKCU)).effects_BU
    assert_close(weights_T @ effects_TU, exact_effects(probs_U, num_chunks, discount), EXACT)


@pytest.mark.parametrize("discount", [1.0, 0.4])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_what_is_explained_makes_no_noise(num_chunks: int, discount: float) -> None:
    """A linear loss with the true worths gives the same estimate, -worth, from all masks; without them it varies."""
    worth_U = torch.tensor([0.7, -1.3, 0.2, 4.0], dtype=torch.float64)
    search = posterior(PROBS_U, Design(1, 3, num_chunks), worth_U, discount)
    masks_BKCU = torch.rand(17, 3, num_chunks, 4, generator=torch.Generator().manual_seed(0)) < PROBS_U
    losses_BKC = 3 - masks_BKCU.double() @ worth_U / num_chunks
    seen = search.estimate(masks_BKCU, losses_BKC)
    effects_BU, advantages_BKC = seen.effects_BU, seen.advantages_BKC
    assert_close(effects_BU, -worth_U.expand(17, -1), EXACT)
    assert advantages_BKC.abs().max() < EXACT
    search.beliefs.worth_U = torch.zeros_like(worth_U)
    assert search.estimate(masks_BKCU, losses_BKC).effects_BU.std(0).min() > 0.1


@pytest.mark.parametrize("probs_U", [PROBS_U, SHARP_U], ids=["any", "sharp"])
def test_pairs_are_those_of_disarm(probs_U: torch.Tensor) -> None:
    """Draw by draw (Dong, Mnih and Tucker, 2020, eq. 9): its gradient in the logits, over s (1 - s), is our effect."""
    draws_TKCU, _ = antithetic_draws(probs_U, 2, 1)
    losses_TK, kept_TKU = losses_of(draws_TKCU)[..., 0], draws_TKCU[:, :, 0].double()
    halves_T1 = (losses_TK[:, 0] - losses_TK[:, 1])[:, None] / 2
    signs_TU = (-1) ** kept_TKU[:, 1] * (kept_TKU[:, 0] != kept_TKU[:, 1])
    disarm_TU = halves_T1 * signs_TU * torch.sigmoid(probs_U.logit().abs())
    effects_TU = posterior(probs_U, Design(1, 2, 1, "antithetic")).estimate(draws_TKCU, losses_TK[..., None]).effects_BU
    assert_close(effects_TU, disarm_TU / (probs_U * (1 - probs_U)), EXACT)


def variance_U(draws: Draws, losses_TKC: torch.Tensor, probs_U: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Of the effects, unit by unit."""
    draws_TKCU, weights_T = draws
    effects_TU = (
        posterior(probs_U, Design(1, draws_TKCU.shape[1], 1, sampling)).estimate(draws_TKCU, losses_TKC).effects_BU
    )
    return weights_T @ effects_TU.square() - (weights_T @ effects_TU).square()


@pytest.mark.parametrize("num_masks", [2, 3, 4])
@pytest.mark.parametrize("probs_U", [PROBS_U, SHARP_U, torch.full_like(SHARP_U, 0.7)], ids=["any", "sharp", "even"])
def test_antithetic_estimates_vary_less(probs_U: torch.Tensor, num_masks: int) -> None:
    """Unit by unit, on losses with interactions, than estimates from as many independent masks."""
    variances = {}
    for sampling, draw in DRAWS.items():
        draws = draw(probs_U, num_masks, 1)
        variances[sampling] = variance_U(draws, losses_of(draws[0]), probs_U, sampling)
    assert (variances["antithetic"] < variances["independent"]).all()


def test_orders_differ_for_a_reason() -> None:
    """Shifted in the same order for all units, masks that follow each other are alike, and tell less than strangers."""
    probs_U, values_U = torch.full((4,), 0.5, dtype=torch.float64), torch.tensor([0.5, 0.8, 1.1, 1.5]).double()
    same = antithetic_draws(probs_U, 4, 1, torch.arange(4).expand(4, -1))
    own, strangers = antithetic_draws(probs_U, 4, 1), independent_draws(probs_U, 4, 1)
    kinds: list[tuple[Draws, Sampling]] = [(own, "antithetic"), (strangers, "independent"), (same, "antithetic")]
    found = [variance_U(draws, draws[0].double() @ values_U, probs_U, sampling) for draws, sampling in kinds]
    assert found[0].sum() < 0.9 * found[1].sum() < 0.8 * found[2].sum()


@every_sampling
def test_a_unit_is_known_the_better_the_more_its_masks_differ(sampling: Sampling) -> None:
    """What units of a layer share of the noise is spread over them by their contrast."""
    probs_U = torch.linspace(0.05, 0.9, 13, dtype=torch.float64)
    design, budget = Design(6, 3, 2, sampling), Budget(make_space(["channel"], [(1, 13)]), 0.4)
    search = PosteriorSearch(budget, probs_U, probs_U, seed=3, design=design, round_steps=1)
    contrast_U = contrast(search.probs_U, design)
    search.tell(search.ask(0), normal_numbers(6, 3, 2, seed=0), learning_rate=0.0)
    precision_U = search.beliefs.state_dict()["precision_U"]
    assert_close(precision_U / precision_U.mean(), contrast_U / contrast_U.mean(), EXACT)


def test_contrasts_follow_policy_and_design() -> None:
    """Though they are worked out once for each."""
    search = posterior(PROBS_U, Design(1, 4, 1, "antithetic", 0.8))
    for probs_U, swing in ((PROBS_U, 0.8), (SHARP_U, 0.8), (SHARP_U, 0.3), (PROBS_U, 0.3), (PROBS_U, 0.0)):
        search.probs_U, search.design = probs_U, replace(search.design, swing=swing)
        amplitude_U = amplitude(probs_U, search.design, search.budget.space)
        for _ in range(2):
            assert torch.equal(search.contrasts_U, contrast(probs_U, search.design, amplitude_U))


# Steps of policy gradients


@pytest.mark.parametrize("scaling", ["raw", "sqrt-fisher", "natural"])
@pytest.mark.parametrize("baseline", ["leave-one-out", "none"])
@every_sampling
@pytest.mark.parametrize(
    ("num_units", "num_masks", "num_chunks"), [(3, 1, 1), (4, 2, 1), (3, 3, 1), (2, 2, 2), (1, 3, 2), (1, 4, 2)]
)
def test_the_expected_step_follows_the_gradient(
    num_units: int, num_masks: int, num_chunks: int, sampling: Sampling, baseline: BaselineName, scaling: Scaling
) -> None:
    """However many masks there are; chunks add up, later ones at a discount; scaled as for independent masks."""
    if (baseline == "leave-one-out" and num_masks == 1) or (baseline == "none" and sampling == "antithetic"):
        return  # what cannot be asked for
    probs_U = PROBS_U[:num_units]
    draws_TKCU, weights_T = DRAWS[sampling](probs_U, num_masks, num_chunks)
    search = reinforce(probs_U, Design(1, num_masks, num_chunks, sampling), baseline=baseline, scaling=scaling)
    moved_U = expected_move(search, draws_TKCU[:, None], losses_of(draws_TKCU)[:, None], weights_T)
    powers = {"raw": 0.0, "sqrt-fisher": 0.5, "natural": 1.0}
    scale_U = (probs_U * (1 - probs_U)) ** powers[scaling]
    assert_close(-moved_U, scale_U * exact_effects(probs_U, num_chunks, 0.7), STEP)


@every_sampling
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_windows_are_averaged(num_chunks: int, sampling: Sampling) -> None:
    """Two windows, each with its own pair, on one of which all is thrice as dear, as the mean of both."""
    probs_U = PROBS_U[: 3 - num_chunks]
    draws_TKCU, weights_T = DRAWS[sampling](probs_U, 2, num_chunks)
    both_T2 = torch.cartesian_prod(*[torch.arange(len(weights_T))] * 2)
    draws_TBKCU = draws_TKCU[both_T2]
    losses_TBKC = losses_of(draws_TKCU)[both_T2] * torch.tensor([1.0, 3.0])[:, None, None]
    search = reinforce(probs_U, Design(2, 2, num_chunks, sampling))
    moved_U = expected_move(search, draws_TBKCU, losses_TBKC, weights_T[both_T2].prod(1))
    assert_close(-moved_U, 2 * exact_effects(probs_U, num_chunks, 0.7), STEP)


@pytest.mark.parametrize("baseline", BASELINES)
def test_other_baselines_are_refused(baseline: BaselineName) -> None:
    """The correction for antithetic masks is that of leaving one out."""
    design = Design(2, 3, 1, "antithetic")
    if baseline == "leave-one-out":
        assert reinforce(PROBS_U, design, baseline=baseline).ask(0)[:].shape == (2, 3, 1, 4)
        return
    with pytest.raises(ConfigError, match="antithetic masks need the baseline 'leave-one-out'"):
        reinforce(PROBS_U, design, baseline=baseline)
