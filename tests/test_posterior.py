"""The posterior policy's estimates by exact enumeration, and the regression and shrinkage that they go through.

Letters: R rows, T tuples of masks that a window may draw, K masks, C chunks, U units, N units of a regression,
F features.
"""

import itertools
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
import torch
from spaces import all_masks, make_space, normal_numbers, random_numbers
from tolerances import EXACT, GUARDED, SAMPLED, assert_close

from bernprune.policy.budget import Budget
from bernprune.policy.masks import Design
from bernprune.policy.posterior import PosteriorSearch, Regression, Sums

DRAWS = 300_000

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
    search.probs_U, search.worth_U = probs_U, worth_U
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
    search.worth_U = torch.zeros_like(worth_U)
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


# Regression and shrinkage


def features_of(scores_N: torch.Tensor) -> np.ndarray:
    """Constant, normal quantile z of the rank, and e^z, by a loop."""
    scores = scores_N.tolist()
    z = [NormalDist().inv_cdf((sum(other < score for other in scores) + 0.5) / len(scores)) for score in scores]
    return np.array([[1.0, quantile, math.exp(quantile)] for quantile in z])


def regression_of(scores_N: torch.Tensor, forgetting: float = 0.3) -> Regression:
    return Regression(torch.arange(len(scores_N)), scores_N.view(len(scores_N), -1), forgetting)


@pytest.mark.parametrize(
    "change", [torch.exp, torch.log, lambda x: 3 * x - 7, lambda x: x**3, lambda x: -1 / x], ids=range(5)
)
def test_only_the_order_of_scores_counts(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """To the bit, under any increasing change; the reverse order is another regression."""
    scores_N, observed_N, noise_N = (random_numbers(13, seed) for seed in range(3))
    line_N, variance_N = regression_of(scores_N).regress(observed_N, noise_N)
    for found, expected in zip(
        regression_of(change(scores_N)).regress(observed_N, noise_N), (line_N, variance_N), strict=True
    ):
        assert torch.equal(found, expected)
    assert not torch.equal(regression_of(-scores_N).regress(observed_N, noise_N)[0], line_N)


@pytest.mark.parametrize("num_scores", [1, 2, 3])
def test_a_line_is_recovered(num_scores: int) -> None:
    """Whatever is linear in the features of all scores, however unequal its noise is said to be, round after round."""
    scores_NS = random_numbers(23 * num_scores, 0).view(23, num_scores)
    features_NF = torch.cat([torch.from_numpy(features_of(scores_N)) for scores_N in scores_NS.T], dim=1)
    regression = regression_of(scores_NS)
    for seed in range(1, 5):
        line_N, noise_N = features_NF @ normal_numbers(3 * num_scores, seed=7), random_numbers(23, seed) + 0.01
        assert_close(regression.regress(line_N, noise_N)[0], line_N, GUARDED)


def test_a_score_told_twice_is_told_once() -> None:
    """Features that say the same share one coefficient; the line is where it was."""
    scores_N, observed_N, noise_N = random_numbers(23, 0), normal_numbers(23, seed=1), random_numbers(23, 2) + 0.1
    once, twice = regression_of(scores_N), regression_of(torch.stack([scores_N, 2 * scores_N], dim=1))
    for _ in range(3):
        found, expected = twice.regress(observed_N, noise_N), once.regress(observed_N, noise_N)
        assert_close(found[0], expected[0], GUARDED)
        assert_close(found[1], expected[1], GUARDED)


@pytest.mark.parametrize("forgetting", [0.0, 0.3])
def test_rounds_are_forgotten_by_degrees(forgetting: float) -> None:
    """Least squares over the rows of all rounds, each weighted by its noise and by (1 - forgetting)^age."""
    scores_N = random_numbers(11, 0)
    regression, features, rows, values = regression_of(scores_N, forgetting), features_of(scores_N), [], []
    for age in (3, 2, 1, 0):
        observed, noise, regression.spread = (
            normal_numbers(11, seed=age),
            random_numbers(11, age) + 0.1,
            0.2 * (3 - age),
        )
        found_N, variance_N = regression.regress(observed, noise)
        weights = (1 - forgetting) ** age / (noise + (regression.spread or noise.mean())).numpy()
        rows.append(features * np.sqrt(weights)[:, None])
        values.append(observed.numpy() * np.sqrt(weights))
    stacked = np.concatenate(rows)
    coefficients = np.linalg.lstsq(stacked, np.concatenate(values), rcond=None)[0]
    covariance = np.linalg.inv(stacked.T @ stacked)
    assert_close(found_N, torch.from_numpy(features @ coefficients), GUARDED)
    assert_close(variance_N, torch.from_numpy(np.diag(features @ covariance @ features.T).copy()), GUARDED)


@pytest.mark.parametrize("spread", [0.5, 1.0, 5.0])
def test_signal_is_told_from_noise(spread: float) -> None:
    """The share is tau^2 / (tau^2 + v), also where noise differs from unit to unit, in any units of measurement."""
    noise_N = 0.2 + 2 * random_numbers(DRAWS, 0)
    residual_N = spread**0.5 * normal_numbers(DRAWS, seed=1) + noise_N.sqrt() * normal_numbers(DRAWS, seed=2)
    for scale in (1.0, 1e-6):
        share_N = regression_of(torch.zeros(1)).shrink(scale * residual_N, scale**2 * noise_N)
        assert_close(share_N, spread / (spread + noise_N), SAMPLED)


def test_pure_noise_is_no_signal() -> None:
    """Almost nothing of it, but never nothing: what is learned must be able to show later."""
    noise_N = 0.2 + 2 * random_numbers(DRAWS, 3)
    share_N = regression_of(torch.zeros(1)).shrink(noise_N.sqrt() * normal_numbers(DRAWS, seed=4), noise_N)
    assert share_N.min() > 0
    assert share_N.max() < SAMPLED


def test_shares_lie_between_nothing_and_all() -> None:
    """Of residuals and variances of any size."""
    for seed, exponent in itertools.product(range(20), (-20, -3, 0, 3, 20)):
        noise_N = 10 ** (6 * random_numbers(7, seed) - 3)
        for residual_N in (torch.zeros(7, dtype=torch.float64), 10.0**exponent * normal_numbers(7, seed=seed)):
            share_N = regression_of(torch.zeros(1)).shrink(residual_N, noise_N)
            assert share_N.isfinite().all()
            assert ((share_N >= 0) & (share_N <= 1)).all()


@pytest.mark.parametrize("scores", [[0.3], [0.3, 0.1], [0.5, 0.5], [0.2] * 9], ids=str)
def test_few_and_equal_units_are_regressed(scores: list[float]) -> None:
    """With fewer units than features the line goes through their means; nothing is ever infinite."""
    size, observed = len(scores), []
    regression, noise_N = (
        regression_of(torch.tensor(scores, dtype=torch.float64), 0.0),
        torch.ones(size, dtype=torch.float64),
    )
    for seed in range(5):
        observed.append(normal_numbers(size, seed=seed))
        regression.spread = 0.5
        line_N, variance_N = regression.regress(observed[-1], noise_N)
        assert line_N.isfinite().all()
        assert (variance_N > 0).all()
        if size < 3:
            assert_close(line_N, torch.stack(observed).mean(0), GUARDED)
        assert regression.shrink(observed[-1] - line_N, noise_N).isfinite().all()
        assert regression.spread > 0


# Rounds


class LiteralRegression:
    """One regression's beliefs as they are described, with every round's rows kept and none of the sums."""

    def __init__(self, scores_N: torch.Tensor, forgetting: float) -> None:
        self.features, self.forgetting, self.rounds, self.spread = features_of(scores_N), forgetting, [], 0.0
        self.precision, self.weighted, self.apart = np.zeros((3, len(scores_N)))

    def line(self) -> tuple[np.ndarray, np.ndarray]:
        """Of all rounds, and its variance."""
        faded = [(1 - self.forgetting) ** age for age in reversed(range(len(self.rounds)))]
        weights = np.concatenate([fade * weights for fade, (weights, _) in zip(faded, self.rounds, strict=True)])
        rows = np.tile(self.features, (len(self.rounds), 1)) * np.sqrt(weights)[:, None]
        targets = np.concatenate([targets for _, targets in self.rounds]) * np.sqrt(weights)
        values = self.features @ np.linalg.lstsq(rows, targets, rcond=None)[0]
        return values, np.diag(self.features @ np.linalg.inv(rows.T @ rows) @ self.features.T)

    def learn(self, observed: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Worths and their variances after one more round."""
        self.rounds.append((1 / (noise + (self.spread or noise.mean())), observed - self.apart))
        line, line_variance = self.line()
        self.precision, self.weighted = self.precision + 1 / noise, self.weighted + (observed - line) / noise
        residual, variance = self.weighted / self.precision, 1 / self.precision
        excess = residual**2 - variance
        spread = np.average(excess, weights=(variance + max(excess.mean(), 0)) ** -2)
        self.spread = max(spread, 1e-3 * variance.mean())
        signal = self.spread / (self.spread + variance)
        self.apart = signal * residual
        return line + self.apart, signal * variance + line_variance


@pytest.mark.parametrize("forgetting", [0.0, 0.2])
def test_rounds_follow_their_description(forgetting: float) -> None:
    """Worths and policies, over five rounds of one step and for two layers, are those of a transcription."""
    space, discount = make_space(["channel"], [(1, 9), (1, 14)]), 0.6
    budget, scores_U, values_U = Budget(space, 0.4), random_numbers(space.size, 0), random_numbers(space.size, 1)
    start_U = torch.full_like(scores_U, 0.6)
    settings = {"seed": 3, "design": Design(7, 3, 2), "round_steps": 1, "discount": discount, "forgetting": forgetting}
    search = PosteriorSearch(budget, start_U, scores_U, floor=0.03, ceiling=0.9, **settings)
    layers = [slice(0, 9), slice(9, 23)]
    regressions = [LiteralRegression(scores_U[layer], forgetting) for layer in layers]
    for step in range(5):
        masks_BKCU = search.ask(step)
        losses_BKC = ((1 - masks_BKCU[:].double()) @ values_U).square() / 20
        effects_BU, chances_U = search.effects(masks_BKCU, losses_BKC)[0], search.probs_U * (1 - search.probs_U)
        search.tell(masks_BKCU, losses_BKC, learning_rate=0.0)
        observed_U, noise_U = -effects_BU.mean(0), effects_BU.var(0) / 7
        for at in layers:  # those of a layer share their noise
            noise_U[at] = (noise_U[at] * chances_U[at]).mean() / chances_U[at]
        found = [
            regression.learn(observed_U[at].numpy(), noise_U[at].numpy())
            for regression, at in zip(regressions, layers, strict=True)
        ]
        worth_U, variance_U = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*found, strict=True))
        assert_close(search.worth_U, worth_U, GUARDED)
        costs_U = torch.full_like(worth_U, 3.0)
        expected_U = budget.at_price(worth_U, variance_U.sqrt(), costs_U, floor=0.03, ceiling=0.9)
        assert_close(search.probs_U, expected_U, GUARDED)
