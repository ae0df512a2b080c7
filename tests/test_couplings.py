"""Antithetic masks by exact enumeration: their estimates are unbiased, at least as good, and for pairs those of DisARM.

The K masks of a window and chunk depend on one uniform number for each unit, and that only on where it lies between the
points at which one of them changes its mind; so all that a step may draw, with its probability, is a finite list.

Letters: T all that may be drawn, K masks, C chunks, U units, P pieces of the unit interval.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from spaces import make_space, normal_numbers
from test_posterior import chances, every_draw, exact_effects, table_losses
from tolerances import EXACT, assert_close

from bernprune.errors import ConfigError
from bernprune.names import BaselineName, Sampling, Scaling
from bernprune.policy.baselines import BASELINES, make_baseline
from bernprune.policy.budget import Budget
from bernprune.policy.masks import Design, contrast, orders
from bernprune.policy.posterior import PosteriorSearch
from bernprune.policy.reinforce import ReinforceSearch

PROBS_U = torch.tensor([0.13, 0.5, 0.72, 0.96], dtype=torch.float64)
SHARP_U = torch.tensor([0.05, 0.95, 0.95, 0.05], dtype=torch.float64)
WORTHS = {"unknown": torch.zeros(4), "believed": torch.tensor([0.7, -1.3, 0.0, 4.0])}
# Units, masks, chunks, discount.
CASES = [(4, 2, 1, 1.0), (4, 3, 1, 0.4), (4, 4, 1, 1.0), (4, 2, 2, 0.4), (2, 3, 2, 1.0), (2, 4, 2, 0.4), (2, 4, 2, 0.0)]

Draws = tuple[torch.Tensor, torch.Tensor]


def pieces(probability: float | torch.Tensor, order_K: torch.Tensor) -> Draws:
    """What K masks do with one unit, bool ``[P, K]``, and how long the pieces of its uniform number are, ``[P]``.

    ``probability`` is that of all masks, or each has its own, ``[K]``.
    """
    shifts = order_K.double() / len(order_K)
    breaks = torch.cat([-shifts % 1, (probability - shifts) % 1, torch.ones(1)]).sort().values
    middles_P, lengths_P = (breaks[1:] + breaks[:-1]) / 2, breaks.diff()
    kept_PK, present_P = (middles_P[:, None] + shifts) % 1 < probability, lengths_P > 1e-12
    return kept_PK[present_P], lengths_P[present_P]


def antithetic_draws(
    probs_U: torch.Tensor, num_masks: int, num_chunks: int, order_UK: torch.Tensor | None = None
) -> Draws:
    """All that a window may draw, bool ``[T, K, C, U]``, and its probabilities."""
    order_UK = orders(num_masks)[: len(probs_U)] if order_UK is None else order_UK
    units = zip(probs_U.tolist(), order_UK, strict=True)
    by_unit = [pieces(probability, order_K) for probability, order_K in units] * num_chunks
    chosen = torch.cartesian_prod(*[torch.arange(len(lengths)) for _, lengths in by_unit]).view(-1, len(by_unit))
    kept = torch.stack([kept[chosen[:, i]] for i, (kept, _) in enumerate(by_unit)], dim=-1)
    weights_T = torch.stack([lengths[chosen[:, i]] for i, (_, lengths) in enumerate(by_unit)]).prod(0)
    assert_close(weights_T.sum(), 1.0, EXACT)
    return kept.unflatten(-1, (num_chunks, -1)), weights_T


def independent_draws(probs_U: torch.Tensor, num_masks: int, num_chunks: int) -> Draws:
    draws_TNU = every_draw(len(probs_U), num_masks * num_chunks)
    return draws_TNU.unflatten(1, (num_masks, num_chunks)), chances(draws_TNU, probs_U)


DRAWS: dict[Sampling, Callable[[torch.Tensor, int, int], Draws]] = {
    "antithetic": antithetic_draws,
    "independent": independent_draws,
}


def losses_of(draws_TKCU: torch.Tensor) -> torch.Tensor:
    """Arbitrary losses ``[T, K, C]``: a chunk's depends on its own mask and on all before it."""
    return table_losses(draws_TKCU.flatten(0, 1)).unflatten(0, draws_TKCU.shape[:2])


def posterior(probs_U: torch.Tensor, design: Design, worth_U: torch.Tensor, discount: float) -> PosteriorSearch:
    """A search that happens to stand at this policy, believing these worths."""
    budget = Budget(make_space(["channel"], [(1, len(probs_U))]), 0.4)
    search = PosteriorSearch(
        budget, probs_U, torch.zeros_like(probs_U), seed=3, design=design, round_steps=1, discount=discount
    )
    search.probs_U, search.beliefs.worth_U = probs_U, worth_U
    return search


def reinforce(
    probs_U: torch.Tensor, design: Design, *, baseline: BaselineName = "leave-one-out", scaling: Scaling = "raw"
) -> ReinforceSearch:
    """A search whose limit is so far that nothing is projected in a small step."""
    memory = make_baseline(baseline, window=5, num_masks=design.masks)
    budget = Budget(make_space(["channel"], [(1, len(probs_U))]), 0.001)
    settings = {"projection": "published", "floor": 0.0, "ceiling": 1.0, "discount": 0.7}
    return ReinforceSearch(budget, probs_U, baseline=memory, seed=3, design=design, scaling=scaling, **settings)


@pytest.mark.parametrize("worth_U", WORTHS.values(), ids=WORTHS)
@pytest.mark.parametrize(("num_units", "num_masks", "num_chunks", "discount"), CASES)
def test_effects_are_unbiased(
    num_units: int, num_masks: int, num_chunks: int, discount: float, worth_U: torch.Tensor
) -> None:
    """Over the joint law of the masks, whatever is believed; taken for independent, the same masks mislead."""
    probs_U, worth_U = PROBS_U[-num_units:], worth_U[-num_units:].double()
    draws_TKCU, weights_T = antithetic_draws(probs_U, num_masks, num_chunks)
    losses_TKC, expected_U = losses_of(draws_TKCU), exact_effects(probs_U, num_chunks, discount)
    design = Design(1, num_masks, num_chunks, "antithetic")
    effects_TU, _ = posterior(probs_U, design, worth_U, discount).effects(draws_TKCU, losses_TKC)
    assert_close(weights_T @ effects_TU, expected_U, EXACT)
    plain = posterior(probs_U, Design(1, num_masks, num_chunks), torch.zeros(num_units).double(), discount)
    misled_U = weights_T @ plain.effects(draws_TKCU, losses_TKC)[0]
    assert ((misled_U - expected_U).abs() > 0.01 * expected_U.abs()).all()


@pytest.mark.parametrize("scaling", ["raw", "sqrt-fisher", "natural"])
@pytest.mark.parametrize(
    ("num_units", "num_masks", "num_chunks"), [(4, 2, 1), (3, 3, 1), (3, 4, 1), (3, 2, 2), (1, 3, 2), (1, 4, 2)]
)
def test_the_expected_step_follows_the_gradient(
    num_units: int, num_masks: int, num_chunks: int, scaling: Scaling
) -> None:
    """Of the real search, told every draw; scaled as it is scaled for independent masks."""
    probs_U, rate = PROBS_U[:num_units], 0.001
    draws_TKCU, weights_T = antithetic_draws(probs_U, num_masks, num_chunks)
    search = reinforce(probs_U, Design(1, num_masks, num_chunks, "antithetic"), scaling=scaling)
    moved_U = torch.zeros_like(probs_U)
    for draw, losses, weight in zip(draws_TKCU, losses_of(draws_TKCU), weights_T, strict=True):
        search.probs_U = probs_U
        search.tell(draw[None], losses[None], learning_rate=rate)
        moved_U += weight * (search.probs_U - probs_U)
    powers = {"raw": 0.0, "sqrt-fisher": 0.5, "natural": 1.0}
    scale_U = (probs_U * (1 - probs_U)) ** powers[scaling]
    assert_close(-moved_U / rate, scale_U * exact_effects(probs_U, num_chunks, 0.7), EXACT)


def test_windows_are_averaged() -> None:
    """Two windows, each with its own pair, as the mean of both."""
    probs_U = PROBS_U[:2]
    draws_TKCU, weights_T = antithetic_draws(probs_U, 2, 1)
    search, moved_U = reinforce(probs_U, Design(2, 2, 1, "antithetic")), torch.zeros_like(probs_U)
    for first, second in itertools.product(range(len(weights_T)), repeat=2):
        pair = draws_TKCU[[first, second]]
        search.probs_U = probs_U
        search.tell(pair, losses_of(pair), learning_rate=0.001)
        moved_U += weights_T[first] * weights_T[second] * (search.probs_U - probs_U)
    assert_close(-moved_U / 0.001, exact_effects(probs_U, 1, 1.0), EXACT)


@pytest.mark.parametrize("probs_U", [PROBS_U, SHARP_U], ids=["any", "sharp"])
def test_pairs_are_those_of_disarm(probs_U: torch.Tensor) -> None:
    """Draw by draw (Dong, Mnih and Tucker, 2020, eq. 9): its gradient in the logits, over s (1 - s), is our effect."""
    draws_TKCU, _ = antithetic_draws(probs_U, 2, 1)
    losses_TK, kept_TKU = losses_of(draws_TKCU)[..., 0], draws_TKCU[:, :, 0].double()
    halves_T1 = (losses_TK[:, 0] - losses_TK[:, 1])[:, None] / 2
    signs_TU = (-1) ** kept_TKU[:, 1] * (kept_TKU[:, 0] != kept_TKU[:, 1])
    disarm_TU = halves_T1 * signs_TU * torch.sigmoid(probs_U.logit().abs())
    search = posterior(probs_U, Design(1, 2, 1, "antithetic"), torch.zeros_like(probs_U), 1.0)
    effects_TU, _ = search.effects(draws_TKCU, losses_TK[..., None])
    assert_close(effects_TU, disarm_TU / (probs_U * (1 - probs_U)), EXACT)


def variance_U(draws: Draws, losses_TKC: torch.Tensor, probs_U: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Of the effects, unit by unit."""
    draws_TKCU, weights_T = draws
    design = Design(1, draws_TKCU.shape[1], 1, sampling)
    effects_TU, _ = posterior(probs_U, design, torch.zeros_like(probs_U), 1.0).effects(draws_TKCU, losses_TKC)
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


@pytest.mark.parametrize("sampling", DRAWS)
def test_a_unit_is_known_the_better_the_more_its_masks_differ(sampling: Sampling) -> None:
    """What units of a layer share of the noise is spread over them by their contrast."""
    probs_U = torch.linspace(0.05, 0.9, 13, dtype=torch.float64)
    design, budget = Design(6, 3, 2, sampling), Budget(make_space(["channel"], [(1, 13)]), 0.4)
    search = PosteriorSearch(budget, probs_U, probs_U, seed=3, design=design, round_steps=1)
    contrast_U = contrast(search.probs_U, design)
    search.tell(search.ask(0), normal_numbers(6, 3, 2, seed=0), learning_rate=0.0)
    precision_U = search.beliefs.state_dict()["precision_U"]
    assert_close(precision_U / precision_U.mean(), contrast_U / contrast_U.mean(), EXACT)


@pytest.mark.parametrize("baseline", BASELINES)
def test_other_baselines_are_refused(baseline: BaselineName) -> None:
    """The correction is that of leaving one out."""
    design = Design(2, 3, 1, "antithetic")
    if baseline == "leave-one-out":
        assert reinforce(PROBS_U, design, baseline=baseline).ask(0)[:].shape == (2, 3, 1, 4)
        return
    with pytest.raises(ConfigError, match="antithetic masks need the baseline 'leave-one-out'"):
        reinforce(PROBS_U, design, baseline=baseline)
