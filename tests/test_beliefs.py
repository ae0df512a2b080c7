"""Lines through scores, what they have in common, and what sets units apart: against literal forms and simulations.

Letters: U units, N units of a group, G groups of a family, S scores, F features.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import pytest
import torch
from spaces import make_space, normal_numbers, random_numbers
from tolerances import EXACT, GUARDED, SAMPLED, assert_close

from bernprune.names import Kind
from bernprune.policy.beliefs import Beliefs, Line, common_spreads, priors, rising
from bernprune.policy.budget import Budget
from bernprune.policy.masks import Design
from bernprune.policy.posterior import PosteriorSearch

DRAWS = 300_000

# Lines


def features_of(scores_N: torch.Tensor) -> np.ndarray:
    """Constant, normal quantile z of the rank, and e^z, by a loop."""
    scores = scores_N.tolist()
    z = [NormalDist().inv_cdf((sum(other < score for other in scores) + 0.5) / len(scores)) for score in scores]
    return np.array([[1.0, quantile, math.exp(quantile)] for quantile in z])


def line_of(scores_N: torch.Tensor, forgetting: float = 0.3) -> Line:
    return Line(torch.arange(len(scores_N)), scores_N.view(len(scores_N), -1), forgetting)


def fitted(line: Line, observed_N: torch.Tensor, noise_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and variances after one more round."""
    line.observe(observed_N, noise_N)
    return line.fit(None)


@pytest.mark.parametrize(
    "change", [torch.exp, torch.log, lambda x: 3 * x - 7, lambda x: x**3, lambda x: -1 / x], ids=range(5)
)
def test_only_the_order_of_scores_counts(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """To the bit, under any increasing change; the reverse order is another line."""
    scores_N, noise_N = random_numbers(13, 0), random_numbers(13, 2)
    observed_N = scores_N + random_numbers(13, 1)
    expected = fitted(line_of(scores_N), observed_N, noise_N)
    for found_N, expected_N in zip(fitted(line_of(change(scores_N)), observed_N, noise_N), expected, strict=True):
        assert torch.equal(found_N, expected_N)
    assert not torch.equal(fitted(line_of(-scores_N), observed_N, noise_N)[0], expected[0])


def test_equal_scores_say_the_same() -> None:
    """Whatever their order: they have the features of the middle one of as many that differ."""
    features_NF = line_of(torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0])).features_NF
    apart_NF = line_of(torch.tensor([3.0, 1.0, 4.0, 2.0, 5.0])).features_NF
    for unit in (0, 2, 4):
        assert features_NF[unit].equal(apart_NF[2])
    assert features_NF[[1, 3]].equal(apart_NF[[1, 3]])


@pytest.mark.parametrize("num_scores", [1, 2, 3])
def test_a_line_is_recovered(num_scores: int) -> None:
    """Whatever rises linearly in the features of all scores, however unequal its noise is said to be, each round."""
    scores_NS = random_numbers(23 * num_scores, 0).view(23, num_scores)
    features_NF = torch.cat([torch.from_numpy(features_of(scores_N)) for scores_N in scores_NS.T], dim=1)
    coefficients_F = normal_numbers(3 * num_scores, seed=7).abs()
    coefficients_F[::3] *= -1  # constants alone may be negative
    line = line_of(scores_NS)
    for seed in range(1, 5):
        values_N, noise_N = features_NF @ coefficients_F, random_numbers(23, seed) + 0.01
        assert_close(fitted(line, values_N, noise_N)[0], values_N, GUARDED)


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_score_is_never_worth_less(seed: int) -> None:
    """Whatever is observed; where worth falls with the score, the line is level, at the mean by precision."""
    scores_N, noise_N = random_numbers(23, seed), 0.1 + random_numbers(23, seed + 10)
    line_N, _ = fitted(line_of(scores_N), normal_numbers(23, seed=seed), noise_N)
    assert line_N[scores_N.argsort()].diff().min() >= 0
    level_N, _ = fitted(line_of(scores_N), -scores_N, noise_N)
    weights_N = 1 / (noise_N + noise_N.mean())
    assert_close(level_N, torch.full_like(level_N, -(weights_N @ scores_N).item() / weights_N.sum().item()), GUARDED)


def test_a_score_told_twice_is_told_once() -> None:
    """Features that say the same share one coefficient; the line is where it was."""
    scores_N, noise_N = random_numbers(23, 0), random_numbers(23, 2) + 0.1
    observed_N = 3 * scores_N + normal_numbers(23, seed=1)
    once, twice = line_of(scores_N), line_of(torch.stack([scores_N, 2 * scores_N], dim=1))
    for _ in range(3):
        found, expected = fitted(twice, observed_N, noise_N), fitted(once, observed_N, noise_N)
        assert_close(found[0], expected[0], GUARDED)
        assert_close(found[1], expected[1], GUARDED)


@pytest.mark.parametrize("forgetting", [0.0, 0.3])
def test_rounds_are_forgotten_by_degrees(forgetting: float) -> None:
    """Least squares over the rows of all rounds, each weighted by its noise and by (1 - forgetting)^age."""
    scores_N = random_numbers(11, 0)
    line, features, rows, values = line_of(scores_N, forgetting), features_of(scores_N), [], []
    for age in (3, 2, 1, 0):
        observed, noise = 9 * scores_N + normal_numbers(11, seed=age), random_numbers(11, age) + 0.1
        line.spread = 0.2 * (3 - age)
        found_N, variance_N = fitted(line, observed, noise)
        weights = (1 - forgetting) ** age / (noise + (line.spread or noise.mean())).numpy()
        rows.append(features * np.sqrt(weights)[:, None])
        values.append(observed.numpy() * np.sqrt(weights))
    stacked = np.concatenate(rows)
    coefficients = np.linalg.lstsq(stacked, np.concatenate(values), rcond=None)[0]
    assert coefficients[1:].min() > 0  # so that the bound on slopes does not show
    covariance = np.linalg.inv(stacked.T @ stacked)
    assert_close(found_N, torch.from_numpy(features @ coefficients), GUARDED)
    assert_close(variance_N, torch.from_numpy(np.diag(features @ covariance @ features.T).copy()), GUARDED)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_the_best_coefficients_without_negative_slopes(size: int) -> None:
    """No set of slopes held at zero does better, over all sets."""
    held_back = 0
    for seed in range(20):
        root_FF, response_F = normal_numbers(size, size, seed=seed), normal_numbers(size, seed=1000 + seed)
        information_FF = root_FF @ root_FF.T + 0.01 * torch.eye(size, dtype=torch.float64)

        def cost(b_F: torch.Tensor, A_FF: torch.Tensor = information_FF, r_F: torch.Tensor = response_F) -> float:
            return (b_F @ A_FF @ b_F / 2 - r_F @ b_F).item()

        found_F = torch.from_numpy(rising(information_FF.numpy(), response_F.numpy()))
        assert (found_F[1:] >= 0).all()
        best = math.inf
        for slopes in itertools.product([False, True], repeat=size - 1):
            free_F = torch.tensor([True, *slopes])
            trial_F = torch.zeros_like(response_F)
            trial_F[free_F] = torch.linalg.solve(information_FF[free_F][:, free_F], response_F[free_F])
            if (trial_F[1:] >= 0).all():
                best = min(best, cost(trial_F))
        assert_close(cost(found_F), best, 1e3 * EXACT)
        held_back += int((found_F == 0).sum())
    assert held_back >= 10 * (size - 1)  # in many cases the bound shows


# What lines have in common


def observed_lines(coefficients_GF: torch.Tensor, noise: float, size: int = 41) -> list[Line]:
    """One round's lines of groups that follow these coefficients."""
    lines = []
    for group, coefficients_F in enumerate(coefficients_GF):
        scores_N = random_numbers(size, group)
        features_NF = torch.from_numpy(features_of(scores_N))
        observed_N = features_NF @ coefficients_F + noise**0.5 * normal_numbers(size, seed=100 + group)
        lines.append(line_of(scores_N))
        lines[-1].spread = noise / 2  # half of it is noise, half sets units apart
        lines[-1].observe(observed_N, torch.full_like(observed_N, noise / 2))
    return lines


def restricted_likelihood(lines: Sequence[Line], spread_F: torch.Tensor) -> float:
    """Of the variances of the coefficients, by the marginal normal density of each group's own estimates."""
    covariances = [line.guarded_FF.inverse() for line in lines]
    own = [covariance_FF @ line.response_F for covariance_FF, line in zip(covariances, lines, strict=True)]
    precisions = [(covariance_FF + torch.diag(spread_F)).inverse() for covariance_FF in covariances]
    total_FF = torch.stack(precisions).sum(0)
    mean_F = total_FF.inverse() @ sum(W_FF @ b_F for W_FF, b_F in zip(precisions, own, strict=True))
    value = -total_FF.logdet().item() / 2
    for precision_FF, own_F in zip(precisions, own, strict=True):
        value += precision_FF.logdet().item() / 2 - ((own_F - mean_F) @ precision_FF @ (own_F - mean_F)).item() / 2
    return value


@pytest.mark.parametrize("spreads", [(3.0, 0.5, 2.0), (3.0, 0.0, 2.0), (0.0, 0.0, 0.0)], ids=str)
def test_variances_are_the_likeliest(spreads: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """No other variance of any coefficient has a larger restricted likelihood, alone or together with all."""
    coefficients_GF = torch.tensor([2.0, 9.0, 9.0]) + normal_numbers(7, 3, seed=3) * torch.tensor(spreads).sqrt()
    monkeypatch.setattr("bernprune.policy.beliefs._FREEDOM", 1e12)  # with which Student's distribution is a normal one
    lines = observed_lines(coefficients_GF, noise=2.0)
    prior = priors(lines)[0]
    assert prior is not None
    best = restricted_likelihood(lines, prior.variance_F)
    for change in (0.8, 0.95, 1.05, 1.25):
        for which in ([0], [1], [2], [0, 1, 2]):
            other_F = prior.variance_F.clone()
            other_F[which] *= change
            assert restricted_likelihood(lines, other_F) <= best + 1e-6, (change, which)


def test_an_outlier_does_not_set_the_others_apart() -> None:
    """A layer whose line is a hundred times as steep is believed, and those that are alike are still drawn together."""
    alike_F, steep_F = torch.tensor([2.0, 9.0, 9.0]).double(), torch.tensor([200.0, 900.0, 900.0]).double()
    coefficients_GF = torch.stack([*[alike_F] * 29, steep_F])
    lines = observed_lines(coefficients_GF, noise=400.0)
    errors = {"together": list[float](), "alone": list[float]()}
    for line, prior, coefficients_F in zip(lines, priors(lines), coefficients_GF, strict=True):
        for name, given in (("together", prior), ("alone", None)):
            error_N = line.fit(given)[0] - line.features_NF @ coefficients_F
            errors[name].append(error_N.square().mean().item())
    assert sum(errors["together"][:-1]) < 0.4 * sum(errors["alone"][:-1])
    assert errors["together"][-1] < 1.2 * errors["alone"][-1]


@pytest.mark.parametrize("size", [1, 2, 7, 200])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e12])
def test_lines_that_differ_by_any_factor_are_finite(size: int, scale: float) -> None:
    """One is a million times as steep, with or without much noise; in any unit of measurement."""
    for count, noise in itertools.product((2, 30), (1e-12, 1.0)):
        coefficients_GF = scale * torch.tensor([1e6, *[1.0] * (count - 1)]).double()[:, None].expand(-1, 3)
        lines = observed_lines(coefficients_GF, noise=noise * scale**2, size=size)
        for line, prior in zip(lines, priors(lines), strict=True):
            values_N, variances_N = line.fit(prior)
            assert values_N.isfinite().all() and variances_N.isfinite().all() and (variances_N >= 0).all()


def test_what_is_common_is_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    """From many groups: means within their stated errors, variances, and each group's line nearer than by itself."""
    spreads_F, mean_F = torch.tensor([3.0, 0.5, 2.0]).double(), torch.tensor([2.0, 9.0, 9.0]).double()
    coefficients_GF = mean_F + normal_numbers(300, 3, seed=3) * spreads_F.sqrt()
    monkeypatch.setattr("bernprune.policy.beliefs._FREEDOM", 1e12)
    lines = observed_lines(coefficients_GF, noise=8.0)
    prior = priors(lines)[0]
    assert prior is not None
    assert ((prior.mean_F - mean_F) / prior.covariance_FF.diagonal().sqrt()).abs().max() < 3
    assert (prior.covariance_FF.diagonal().sqrt() / mean_F).max() < 0.1
    assert ((prior.variance_F / spreads_F).log().abs() < 0.5).all()
    errors, stated = {"alone": 0.0, "shrunk": 0.0}, 0.0
    for line, coefficients_F in zip(lines, coefficients_GF, strict=True):
        true_N = line.features_NF @ coefficients_F
        errors["alone"] += (line.fit(None)[0] - true_N).square().mean().item()
        line_N, variance_N = line.fit(prior)
        errors["shrunk"] += (line_N - true_N).square().mean().item()
        stated += variance_N.mean().item()
    assert errors["shrunk"] < 0.9 * errors["alone"]
    assert 0.9 < stated / errors["shrunk"] < 1.1


def test_groups_that_are_alike_share_one_line() -> None:
    """As if the rows of all were one group's."""
    scores_N, noise_N = random_numbers(11, 0), torch.ones(11, dtype=torch.float64)
    lines, together = [line_of(scores_N) for _ in range(5)], line_of(scores_N, forgetting=0.0)
    for line in lines:
        for told in (line, together):
            told.observe(20 * scores_N + normal_numbers(11, seed=1), noise_N)
    expected = together.fit(None)
    for line, prior in zip(lines, priors(lines), strict=True):
        for found_N, expected_N in zip(line.fit(prior), expected, strict=True):
            assert_close(found_N, expected_N, GUARDED)


def test_a_line_alone_has_nothing_in_common() -> None:
    """Nor would it know how much lines differ."""
    assert priors([line_of(random_numbers(7, 0))]) == [None]


# What sets units apart


@pytest.mark.parametrize("spread", [0.5, 1.0, 5.0])
def test_signal_is_told_from_noise(spread: float) -> None:
    """The variance beyond that of the noise, also where noise differs from unit to unit, in any unit of measurement."""
    noise_N = 0.2 + 2 * random_numbers(DRAWS, 0)
    residual_N = spread**0.5 * normal_numbers(DRAWS, seed=1) + noise_N.sqrt() * normal_numbers(DRAWS, seed=2)
    for scale in (1.0, 1e-6):
        assert_close(common_spreads([scale * residual_N], [scale**2 * noise_N]), [scale**2 * spread], SAMPLED)


def test_pure_noise_is_no_signal() -> None:
    """Almost nothing of it, but never nothing: what is learned must be able to show later."""
    noise_N = 0.2 + 2 * random_numbers(DRAWS, 3)
    (spread,) = common_spreads([noise_N.sqrt() * normal_numbers(DRAWS, seed=4)], [noise_N])
    assert 0 < spread < SAMPLED * noise_N.mean()


def test_spreads_are_finite_and_positive() -> None:
    """For residuals and variances of any size, of one group and of several."""
    for seed, exponent in itertools.product(range(20), (-20, -3, 0, 3, 20)):
        noises = [10 ** (6 * random_numbers(size, seed) - 3) for size in (7, 2, 1)]
        for scale in (0.0, 10.0**exponent):
            residuals = [scale * normal_numbers(len(noise_N), seed=seed) for noise_N in noises]
            for spread in common_spreads(residuals[:1], noises[:1]) + common_spreads(residuals, noises):
                assert 0 < spread < math.inf


def grouped(spreads: Sequence[float], size: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Residuals with such spreads under noise of variance 1."""
    scales = [(1 + spread) ** 0.5 for spread in spreads]
    residuals = [scale * normal_numbers(size, seed=group) for group, scale in enumerate(scales)]
    return residuals, [torch.ones(size, dtype=torch.float64)] * len(spreads)


def test_groups_that_may_be_alike_are() -> None:
    """Of many groups with little signal all are told the same, near the truth; alone, half of them are told none."""
    residuals, noises = grouped([0.05] * 40, 101)
    together = torch.tensor(common_spreads(residuals, noises))
    alone = torch.tensor([common_spreads([r_N], [v_N])[0] for r_N, v_N in zip(residuals, noises, strict=True)])
    assert (together == together.median()).sum() >= 35
    assert 0.02 < together.median() < 0.1
    assert ((together - 0.05).abs().mean()) < 0.3 * (alone - 0.05).abs().mean()


def test_a_group_that_clearly_differs_keeps_what_it_has() -> None:
    """Nearly; and it does not change what is common to the others much."""
    residuals, noises = grouped([0.05] * 8 + [30.0], 501)
    *others, outlier = common_spreads(residuals, noises)
    (alone,) = common_spreads(residuals[-1:], noises[-1:])
    assert 0.9 * alone < outlier < alone
    assert_close(others, common_spreads(residuals[:-1], noises[:-1]), 0.1)


# Rounds


def test_few_and_equal_units_are_believed_something() -> None:
    """With fewer units than features, or equal scores; nothing is ever infinite."""
    space = make_space(["kv_group", "channel"], [(1, 1), (2, 2), (1, 9)])
    for scores_U in (random_numbers(space.size, 0), torch.ones(space.size, dtype=torch.float64)):
        beliefs = Beliefs(space, scores_U[:, None], 0.1)
        for seed in range(5):
            beliefs.learn(normal_numbers(space.size, seed=seed), torch.ones(space.size, dtype=torch.float64))
            assert beliefs.worth_U.isfinite().all()
            assert (beliefs.deviation_U > 0).all()
            assert beliefs.deviation_U.isfinite().all()


@pytest.mark.parametrize("rounds", [2, 12])
@pytest.mark.parametrize("kind", ["kv_group", "channel"])
def test_what_is_believed_is_as_sure_as_it_says(kind: Kind, rounds: int) -> None:
    """Worths are off by their deviations: over many worlds in which units differ from lines that differ, too."""
    space, off, said = make_space([kind], [(15, 60)] * 3), 0.0, 0.0
    scores_U = random_numbers(space.size, 0)
    for world in range(10):
        levels_U = 0.5 * normal_numbers(3, seed=3 * world).repeat_interleave(space.size // 3) * (kind == "channel")
        truth_U = levels_U + scores_U + normal_numbers(space.size, seed=3 * world + 1)
        beliefs, noise_U = Beliefs(space, scores_U[:, None], 0.0), 0.5 + 2 * random_numbers(space.size, world)
        for noise in normal_numbers(rounds, space.size, seed=3 * world + 2):
            beliefs.learn(truth_U + noise_U.sqrt() * noise, noise_U)
        off += (beliefs.worth_U - truth_U).square().mean().item()
        said += beliefs.deviation_U.square().mean().item()
    assert said == pytest.approx(off, rel=0.15)


@pytest.mark.parametrize(
    ("kind", "spread", "rounds"), [("channel", 0.5, 1), ("channel", 0.1, 3), ("kv_group", 0.1, 12)]
)
def test_no_world_passes_for_known(kind: Kind, spread: float, rounds: int) -> None:
    """Not one of many in which noise exceeds signal, so that the signal may seem to be nothing by chance."""
    space = make_space([kind], [(15, 60)] * 3)
    scores_U = random_numbers(space.size, 0)
    for world in range(60):
        truth_U = scores_U + spread**0.5 * normal_numbers(space.size, seed=3 * world + 1)
        beliefs, noise_U = Beliefs(space, scores_U[:, None], 0.1), 1.5 + 3 * random_numbers(space.size, world)
        for noise in normal_numbers(rounds, space.size, seed=3 * world + 2):
            beliefs.learn(truth_U + noise_U.sqrt() * noise, noise_U)
        off = (beliefs.worth_U - truth_U).square().mean().item()
        assert beliefs.deviation_U.square().mean().item() > 0.3 * off, world


def test_what_is_believed_is_restored() -> None:
    """All of it, and what is learned next is the same."""
    space = make_space(["kv_group", "channel"], [(3, 11), (2, 9)])
    beliefs, restored = (Beliefs(space, random_numbers(space.size, 0)[:, None], 0.1) for _ in range(2))
    rounds = normal_numbers(4, space.size, seed=1), 0.5 + random_numbers(space.size, 2)
    for observed_U in rounds[0][:3]:
        beliefs.learn(observed_U, rounds[1])
    restored.load_state_dict(beliefs.state_dict())
    for _ in range(2):
        for name in ("worth_U", "deviation_U"):
            assert torch.equal(getattr(restored, name), getattr(beliefs, name)), name
        assert restored.reliability == beliefs.reliability
        for each in (beliefs, restored):
            each.learn(rounds[0][3], rounds[1])


class LiteralLine:
    """One line as it is described, with every round's rows kept and none of the sums."""

    def __init__(self, scores_N: torch.Tensor, forgetting: float) -> None:
        self.features, self.forgetting, self.rounds, self.spread = features_of(scores_N), forgetting, [], 0.0
        self.precision, self.weighted, self.apart = np.zeros((3, len(scores_N)))

    def observe(self, observed: np.ndarray, noise: np.ndarray) -> None:
        self.rounds.append((1 / (noise + (self.spread or noise.mean())), observed - self.apart))

    def as_line(self) -> Line:
        """With the weighted sums of all rows."""
        line = line_of(torch.zeros(len(self.features)))
        line.features_NF = torch.from_numpy(self.features)
        faded = [(1 - self.forgetting) ** age for age in reversed(range(len(self.rounds)))]
        weights = np.concatenate([fade * weights for fade, (weights, _) in zip(faded, self.rounds, strict=True)])
        rows = np.tile(self.features, (len(self.rounds), 1))
        targets = np.concatenate([targets for _, targets in self.rounds])
        line.information_FF = torch.from_numpy(rows.T @ (weights[:, None] * rows))
        line.response_F = torch.from_numpy(rows.T @ (weights * targets))
        return line


def literal_round(
    lines: Sequence[LiteralLine], observed: Sequence[np.ndarray], noise: Sequence[np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Worths and their variances after one more round of a family."""
    for line, observed_N, noise_N in zip(lines, observed, noise, strict=True):
        line.observe(observed_N, noise_N)
    drawn_from = zip(lines, priors([line.as_line() for line in lines]), strict=True)
    fits = [tuple(values_N.numpy() for values_N in line.as_line().fit(prior)) for line, prior in drawn_from]
    for line, (values, _), observed_N, noise_N in zip(lines, fits, observed, noise, strict=True):
        line.precision, line.weighted = line.precision + 1 / noise_N, line.weighted + (observed_N - values) / noise_N
    residuals = [torch.from_numpy(line.weighted / line.precision) for line in lines]
    spreads = common_spreads(residuals, [torch.from_numpy(1 / line.precision) for line in lines])
    worths, variances = [], []
    for line, line.spread, (values, variance) in zip(lines, spreads, fits, strict=True):
        signal = line.spread / (line.spread + 1 / line.precision)
        line.apart = signal * line.weighted / line.precision
        worths.append(values + line.apart)
        variances.append((1 - signal) ** 2 * variance + signal / line.precision)
    return torch.from_numpy(np.concatenate(worths)), torch.from_numpy(np.concatenate(variances))


@pytest.mark.parametrize("forgetting", [0.0, 0.2])
def test_rounds_follow_their_description(forgetting: float) -> None:
    """Worths and policies, over five rounds of one step and for two layers, are those of a transcription."""
    space, discount = make_space(["channel"], [(1, 9), (1, 14)]), 0.6
    budget, scores_U, values_U = Budget(space, 0.4), random_numbers(space.size, 0), random_numbers(space.size, 1)
    start_U = torch.full_like(scores_U, 0.6)
    settings = {"seed": 3, "design": Design(7, 3, 2), "round_steps": 1, "discount": discount, "forgetting": forgetting}
    search = PosteriorSearch(budget, start_U, scores_U, floor=0.03, ceiling=0.9, **settings)
    layers = [slice(0, 9), slice(9, 23)]
    lines = [LiteralLine(scores_U[layer], forgetting) for layer in layers]
    for step in range(5):
        masks_BKCU = search.ask(step)
        losses_BKC = ((1 - masks_BKCU[:].double()) @ values_U).square() / 20
        effects_BU, chances_U = (
            search.estimate(masks_BKCU, losses_BKC).effects_BU,
            search.probs_U * (1 - search.probs_U),
        )
        search.tell(masks_BKCU, losses_BKC, learning_rate=0.0)
        observed_U, noise_U = -effects_BU.mean(0), effects_BU.var(0) / 7
        for at in layers:  # those of a layer share their noise
            noise_U[at] = (noise_U[at] * chances_U[at]).mean() / chances_U[at]
        told = [[values_U[at].numpy() for at in layers] for values_U in (observed_U, noise_U)]
        worth_U, variance_U = literal_round(lines, *told)
        assert_close(search.worth_U, worth_U, GUARDED)
        costs_U = torch.full_like(worth_U, 3.0)
        expected_U = budget.at_price(worth_U, variance_U.sqrt(), costs_U, floor=0.03, ceiling=0.9)
        assert_close(search.probs_U, expected_U, GUARDED)
