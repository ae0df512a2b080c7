"""The posterior policy's estimates by exact enumeration.

Letters: R rows, T tuples of masks that a window may draw, K masks, C chunks, U units.
"""

import itertools

import pytest
import torch
from spaces import all_masks, make_space, normal_numbers
from tolerances import EXACT, assert_close

from bernprune.policy.budget import Budget
from bernprune.policy.masks import Design
from bernprune.policy.posterior import PosteriorSearch, Sums

# Estimates


def table_losses(masks_RCU: torch.Tensor) -> torch.Tensor:
    """Arbitrary losses ``[R, C]``: a chunk's depends on its own mask and on all before it."""
    num_masks, codes_R, losses = 2 ** masks_RCU.shape[-1], 0, []
    for chunk in range(masks_RCU.shape[1]):
        codes_R = num_masks * codes_R + masks_RCU[:, chunk].long() @ 2 ** torch.arange(masks_RCU.shape[-1])
        losses.append(2 + normal_numbers(num_masks ** (chunk + 1), seed=chunk)[codes_R])
    return torch.stack(losses, dim=1)


def every_draw(num_units: int, size: int) -> torch.Tensor:
    """All that ``size`` masks can be together, bool ``[T, size, U]``."""
    masks = all_masks(num_units)
    return masks[torch.cartesian_prod(*[torch.arange(len(masks))] * size).reshape(-1, size)]


def chances(masks_RCU: torch.Tensor, probs_U: torch.Tensor) -> torch.Tensor:
    return torch.where(masks_RCU, probs_U, 1 - probs_U).flatten(1).prod(1)


def exact_effects(probs_U: torch.Tensor, num_chunks: int, discount: float) -> torch.Tensor:
    """Keeping a unit against cutting it in one chunk: that chunk's loss and, at a discount, later ones; all summed."""
    draws_RCU = every_draw(len(probs_U), num_chunks)
    losses_RC, chances_R = table_losses(draws_RCU), chances(draws_RCU, probs_U)
    effects_U = torch.zeros_like(probs_U)
    for chunk, unit in itertools.product(range(num_chunks), range(len(probs_U))):
        answers_R = sum(discount ** (later - chunk) * losses_RC[:, later] for later in range(chunk, num_chunks))
        kept = draws_RCU[:, chunk, unit]
        for rows, sign in ((kept, 1), (~kept, -1)):
            effects_U[unit] += sign * (chances_R * answers_R)[rows].sum() / chances_R[rows].sum()
    return effects_U


def estimator(probs_U: torch.Tensor, worth_U: torch.Tensor, discount: float) -> PosteriorSearch:
    """A search that happens to stand at this policy, believing these worths."""
    budget = Budget(make_space(["channel"], [(1, len(probs_U))]), 0.4)
    settings = {"seed": 3, "design": Design(1, 2), "round_steps": 1, "discount": discount}
    search = PosteriorSearch(budget, probs_U, torch.zeros_like(probs_U), **settings)
    search.probs_U, search.beliefs.worth_U = probs_U, worth_U
    return search


PROBS_U = torch.tensor([0.13, 0.5, 0.72, 0.96], dtype=torch.float64)
WORTHS = {"unknown": torch.zeros(4), "believed": torch.tensor([0.7, -1.3, 0.0, 4.0])}


@pytest.mark.parametrize("worth_U", WORTHS.values(), ids=WORTHS)
@pytest.mark.parametrize(
    ("num_units", "num_masks", "num_chunks", "discount"),
    [(4, 2, 1, 1.0), (4, 3, 1, 0.4), (3, 2, 2, 1.0), (3, 2, 2, 0.4), (3, 2, 2, 0.0), (2, 3, 2, 1.0), (2, 3, 2, 0.4)],
)
def test_estimates_are_unbiased(
    num_units: int, num_masks: int, num_chunks: int, discount: float, worth_U: torch.Tensor
) -> None:
    """Over every tuple of masks, whatever is believed: the effect of each unit, the discounted one where it is."""
    probs_U, worth_U = PROBS_U[-num_units:], worth_U[-num_units:].double()
    draws_TKCU = every_draw(num_units, num_masks * num_chunks).unflatten(1, (num_masks, num_chunks))
    losses_TKC = table_losses(draws_TKCU.flatten(0, 1)).unflatten(0, draws_TKCU.shape[:2])
    effects_TU, _ = estimator(probs_U, worth_U, discount).effects(draws_TKCU, losses_TKC)
    chances_T = chances(draws_TKCU, probs_U)
    assert_close(chances_T.sum(), 1.0, EXACT)
    expected = exact_effects(probs_U, num_chunks, discount)
    assert_close(chances_T @ effects_TU, expected, EXACT)
    if num_chunks > 1 and discount < 1:  # negative control: discounting shows
        assert (expected - exact_effects(probs_U, num_chunks, 1.0)).abs().max() > 0.1


@pytest.mark.parametrize("discount", [1.0, 0.4])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_what_is_explained_makes_no_noise(num_chunks: int, discount: float) -> None:
    """A linear loss with the true worths gives the same estimate, -worth, from all masks; without them it varies."""
    worth_U = torch.tensor([0.7, -1.3, 0.2, 4.0], dtype=torch.float64)
    search = estimator(PROBS_U, worth_U, discount)
    masks_BKCU = torch.rand(17, 3, num_chunks, 4, generator=torch.Generator().manual_seed(0)) < PROBS_U
    losses_BKC = 3 - masks_BKCU.double() @ worth_U / num_chunks
    effects_BU, advantages_BKC = search.effects(masks_BKCU, losses_BKC)
    assert_close(effects_BU, -worth_U.expand(17, -1), EXACT)
    assert advantages_BKC.abs().max() < EXACT
    search.beliefs.worth_U = torch.zeros_like(worth_U)
    assert search.effects(masks_BKCU, losses_BKC)[0].std(0).min() > 0.1


@pytest.mark.parametrize("cuts", [[37], [1] * 37, [5, 31, 1], [0, 20, 0, 17]], ids=str)
def test_sums_are_those_of_all_rows(cuts: list[int]) -> None:
    """Mean, and variance of the mean, however the rows come."""
    rows, sums = 1 + normal_numbers(37, 5, seed=0), Sums.empty(5)
    for part in rows.split(cuts):
        sums.add(part)
    assert sums.count == 37
    assert_close(sums.mean_U(), rows.mean(0), EXACT)
    assert_close(sums.variance_U(), rows.var(0) / 37, EXACT)
