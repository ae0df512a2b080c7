"""What is believed of each unit's worth: a line through its initial scores, and what sets it apart from that.

All of it is empirical Bayes (Efron and Morris, 1973). A *group* has a line of its own: the channels of a layer, or all
units of another kind. The groups of a *family*, such as the channels of all layers, resemble each other, so each one's
line is shrunk towards the line of the family (Lindley and Smith, 1972), and so is how far its units differ from it.

Between rounds the world changes: as a layer loses units, those left become worth more, all of them together. So lines
forget, while what sets a unit apart is remembered.

Letters: U units, N units of a group, G groups of a family, L lines of all families, S scores, F features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bernprune.errors import RunError
from bernprune.policy.bernoulli import ranks
from bernprune.units import UnitSpace

_RIDGE = 1e-6  # of a line's information, so that few units, or equal ones, do not make it singular
_ITERATIONS = 100  # at most, towards what the lines of a family have in common
_SETTLED = 1e-9  # part of itself by which no variance still moves when it is found
_FREEDOM = 4.0  # degrees of freedom of what lines are drawn from: a few differ much more than the others do
_LEAST_VARIANCE = 1e-9  # of a coefficient among lines, in parts of its noise: they may be all but equal, not quite
_CLEAR = 2.0  # standard errors by which a group must differ from its family for that to be believed at all
_LEAST_SPREAD = 1e-3  # share of the noise that is always granted to differences between units
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Prior:
    """What the coefficients of one of a family's lines are drawn from: a normal distribution.

    Attributes:
        mean_F, covariance_FF: its mean, which is that of the family, and how well that is known.
        variance_F: variance of the line around that mean; coefficients are independent.
    """

    mean_F: torch.Tensor
    covariance_FF: torch.Tensor
    variance_F: torch.Tensor


@dataclass(frozen=True)
class GroupMean:
    """One more observation of a group's worths w: ``mean`` = sum of weights_u w_u + an error of variance ``noise``.

    Attributes:
        members_N, weights_N: which units, and weights that add up to 1.
        mean, noise: scalars, in nats per token and their square.
    """

    members_N: torch.Tensor
    weights_N: torch.Tensor
    mean: torch.Tensor
    noise: torch.Tensor


class Line:
    """Regression of the worth of a group's units on their initial scores.

    Features are a constant and, for each score, the normal quantile z of its rank in the group and e^z, which has the
    heavy tail that scores have: any monotone change of a score leaves them alone. No slope is negative, so a larger
    score never makes a unit worth less.
    """

    def __init__(self, members_N: torch.Tensor, scores_NS: torch.Tensor, forgetting: float) -> None:
        self.members_N, self._forgetting = members_N, forgetting
        ranks_NS = torch.stack([ranks(scores_N) for scores_N in scores_NS.unbind(1)], dim=1)
        z_NS = torch.special.ndtri((ranks_NS + 0.5) / len(ranks_NS))
        self.features_NF = torch.cat([torch.ones_like(z_NS[:, :1]), z_NS, z_NS.exp()], dim=1)
        features = self.features_NF.shape[1]
        self.information_FF = torch.zeros(features, features, dtype=torch.float64)
        self.response_F = torch.zeros(features, dtype=torch.float64)
        self.spread = 0.0  # variance of what sets units apart; 0 until the first round

    def observe(self, observed_N: torch.Tensor, variance_N: torch.Tensor) -> None:
        """One more round, older ones forgotten by degrees."""
        weights_N = 1 / (variance_N + (self.spread or variance_N.mean()))
        kept = 1 - self._forgetting
        self.information_FF = kept * self.information_FF + (self.features_NF.T * weights_N) @ self.features_NF
        self.response_F = kept * self.response_F + (self.features_NF.T * weights_N) @ observed_N

    def observe_mean(self, weights_N: torch.Tensor, mean: torch.Tensor, noise: torch.Tensor) -> None:
        """One more observation of the same round: the weighted mean of all units, with its variance."""
        weight = 1 / (noise + self.spread * weights_N.square().sum())
        features_F = weights_N @ self.features_NF
        self.information_FF = self.information_FF + weight * features_F.outer(features_F)
        self.response_F = self.response_F + weight * mean * features_F

    @property
    def guarded_FF(self) -> torch.Tensor:
        """Information that can be inverted."""
        guard = _RIDGE * self.information_FF.diagonal().mean()
        return self.information_FF + guard * torch.eye(len(self.response_F), dtype=torch.float64)

    def fit(self, prior: Prior | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The line's values, and their variances as if slopes were free, ``[N]``."""
        information_FF, response_F = self.guarded_FF, self.response_F
        if prior is None:
            covariance_FF = torch.linalg.inv(information_FF)
        else:
            information_FF = information_FF + torch.diag(1 / prior.variance_F)
            response_F = response_F + prior.mean_F / prior.variance_F
            covariance_FF = torch.linalg.inv(information_FF)
            towards_FF = covariance_FF / prior.variance_F  # how much of the common mean is in this line
            covariance_FF = covariance_FF + towards_FF @ prior.covariance_FF @ towards_FF.T
        variance_N = ((self.features_NF @ covariance_FF) * self.features_NF).sum(1)
        coefficients_F = torch.from_numpy(rising(information_FF.numpy(), response_F.numpy()))
        return self.features_NF @ coefficients_F, variance_N


def rising(information_FF: np.ndarray, response_F: np.ndarray) -> np.ndarray:
    """The coefficients b, of which none but the first may be negative, that minimise b'Ab / 2 - r'b.

    The active set method of Lawson and Hanson (1974, ch. 23), with the first coefficient always free.
    """
    sloped_F = np.arange(len(response_F)) > 0
    found_F = np.linalg.solve(information_FF, response_F)
    if (found_F[sloped_F] > 0).all():
        return found_F  # as it mostly is
    found_F, free_F = np.zeros_like(response_F), ~sloped_F
    for _ in range(3 * len(response_F)):  # by which it has ended, but for rounding
        trial_F = _solve(information_FF, response_F, free_F)
        while (wrong_F := free_F & (trial_F <= 0) & sloped_F).any():
            steps_F = found_F[wrong_F] / np.maximum((found_F - trial_F)[wrong_F], _TINY)
            found_F = found_F + steps_F.min() * (trial_F - found_F)
            leaving = np.flatnonzero(wrong_F)[steps_F.argmin()]
            found_F[leaving], free_F[leaving] = 0.0, False
            trial_F = _solve(information_FF, response_F, free_F)
        found_F = trial_F
        gains_F = np.where(free_F, 0.0, response_F - information_FF @ found_F)
        if gains_F.max() <= 1e-12 * np.abs(response_F).max():
            break
        free_F[gains_F.argmax()] = True
    return found_F


def _solve(information_FF: np.ndarray, response_F: np.ndarray, free_F: np.ndarray) -> np.ndarray:
    found_F = np.zeros_like(response_F)
    found_F[free_F] = np.linalg.solve(information_FF[free_F][:, free_F], response_F[free_F])
    return found_F


def priors(lines: Sequence[Line]) -> list[Prior | None]:
    """What each line is drawn from, by the observations of all; None for a line alone.

    The coefficients b of line g are drawn from N(mean, diag(variance of g)), and what is observed of it says
    ``information b = response``, with noise of covariance ``information``. Coefficients have Student's distribution, a
    normal one whose variance is drawn for each line (Lange, Little and Taylor, 1989): else a layer whose units are
    worth ten times as much as others' would make it seem that lines have nothing in common, and of those of which
    little is seen each would go by its noise. What all share of the variances is found by the iteration of Harville
    (1977, section 5.2), which leaves those that are zero. The matrices are few and tiny, and numpy's calls cost a
    fraction of torch's.
    """
    if len(lines) == 1:
        return [None]
    information_GFF = np.stack([line.guarded_FF.numpy() for line in lines])
    response_GF = np.stack([line.response_F.numpy() for line in lines])
    noise_F = 1 / _diagonals(information_GFF).mean(0)
    variance_F, variance_GF = noise_F, np.broadcast_to(noise_F, response_GF.shape)
    for _ in range(_ITERATIONS):
        # What is known of each line, its variances given.
        given_GFF = information_GFF + np.eye(len(noise_F)) / variance_GF[:, None]
        left_GFF = np.linalg.inv(given_GFF)  # doubt, the mean given
        own_GFF = left_GFF @ information_GFF  # share of each line's own observations in it
        means_GFF = left_GFF / variance_GF[:, None]  # and of the mean: the rest, without the rounding of a difference
        # The mean of all lines, by generalised least squares.
        total_FF = (information_GFF @ means_GFF).sum(0)
        covariance_FF = np.linalg.inv(total_FF)
        mean_F = rising(total_FF, np.einsum("gfe,gf->e", means_GFF, response_GF))
        apart_GF = np.einsum("gef,gf->ge", left_GFF, response_GF - information_GFF @ mean_F)
        doubt_GF = _diagonals(left_GFF + own_GFF @ covariance_FF @ own_GFF.swapaxes(1, 2))
        # The variances that all lines share, and from them those of each.
        known_F = (1 - doubt_GF / variance_GF).sum(0)
        squares_F = (apart_GF**2 * variance_F / variance_GF).sum(0)
        variance_F = np.maximum(squares_F / np.maximum(known_F, _TINY), _LEAST_VARIANCE * noise_F)
        before_GF, variance_GF = variance_GF, (_FREEDOM * variance_F + apart_GF**2 + doubt_GF) / (_FREEDOM + 1)
        if (np.abs(variance_GF - before_GF) <= _SETTLED * variance_GF).all():
            break
    common = torch.from_numpy(mean_F), torch.from_numpy(covariance_FF)
    return [Prior(*common, own_F) for own_F in torch.from_numpy(variance_GF)]


def _diagonals(many_GFF: np.ndarray) -> np.ndarray:
    return np.diagonal(many_GFF, axis1=1, axis2=2)


def common_spreads(residuals: Sequence[torch.Tensor], variances: Sequence[torch.Tensor]) -> list[float]:
    """The variance, for each group, by which its residuals differ more than their noise explains.

    Estimates of the groups are drawn to what they have in common, all the way where they do not clearly differ from it
    (the non-negative garrote; Breiman, 1995): of many, some are large by chance. What they have in common is expected,
    not estimated: where noise exceeds signal, an estimate may be nothing by chance, and units would pass for known.

    Args:
        residuals, variances: for each group ``[N]``, what was observed of its units less their line, and its noise.
    """
    excesses = [residual_N.square() - noise_N for residual_N, noise_N in zip(residuals, variances, strict=True)]
    spread_G = torch.stack([excess_N.mean() for excess_N in excesses]).clamp(min=0)
    for _ in range(3):  # each unit's weight depends on the spread
        weights = [1 / (noise_N + spread).square() for noise_N, spread in zip(variances, spread_G, strict=True)]
        totals_G = torch.stack([weights_N.sum() for weights_N in weights])
        own_G = torch.stack([(w_N * e_N).sum() for w_N, e_N in zip(weights, excesses, strict=True)]) / totals_G
        estimate = (totals_G * own_G).sum() / totals_G.sum()
        spread_G = torch.maximum(own_G, estimate.clamp(min=0))
    common = _expected_positive(estimate, (2 / totals_G.sum()).sqrt())
    apart_G = own_G - common
    doubt_G = _CLEAR**2 * (2 / totals_G) / apart_G.square().clamp(min=_TINY)
    spread_G = (common + apart_G * (1 - doubt_G).clamp(min=0)).clamp(min=0)
    return [
        max(spread, _LEAST_SPREAD * noise_N.mean().item())
        for spread, noise_N in zip(spread_G.tolist(), variances, strict=True)
    ]


def _expected_positive(estimate: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """The mean of what cannot be negative, of which this is a normal estimate with that standard error."""
    ratio = estimate / error
    log_density = -(ratio.square() + math.log(2 * math.pi)) / 2
    return estimate + error * (log_density - torch.special.log_ndtr(ratio)).exp()


class Beliefs:
    """What is believed of all units, after the rounds told so far.

    Args:
        scores_US: initial scores, larger is kept; only their order within a group counts. ``[U, S]``.
        forgetting: share of a line's past that a round forgets.

    Attributes:
        groups: units that share a line.
        worth_U, deviation_U: mean and standard deviation of what keeping a unit saves, nats per token, ``[U]``.
        reliability: mean share of a unit's observed difference that is signal.
    """

    def __init__(self, space: UnitSpace, scores_US: torch.Tensor, forgetting: float) -> None:
        self._families = [
            [Line(members_N, scores_US[members_N], forgetting) for members_N in family] for family in _families(space)
        ]
        self.groups = [line.members_N for line in self.lines]
        self.worth_U = torch.zeros(space.size, dtype=torch.float64)
        self.deviation_U = torch.zeros_like(self.worth_U)
        self.reliability = 0.0
        # What sets units apart from their line, by precision: information, and information times value.
        self._precision_U = torch.zeros_like(self.worth_U)
        self._weighted_U, self._apart_U = torch.zeros_like(self.worth_U), torch.zeros_like(self.worth_U)

    @property
    def lines(self) -> list[Line]:
        return [line for family in self._families for line in family]

    def learn(self, observed_U: torch.Tensor, noise_U: torch.Tensor, means: Sequence[GroupMean] = ()) -> None:
        """One more round: what was observed of each unit's worth, and its variance, ``[U]``; and of groups together."""
        self._precision_U += 1 / noise_U
        variance_U = torch.empty_like(noise_U)
        for family in self._families:
            for line in family:
                at = line.members_N
                line.observe(observed_U[at] - self._apart_U[at], noise_U[at])
                for group in means:
                    if group.members_N.equal(at):
                        mean = group.mean - group.weights_N @ self._apart_U[at]
                        line.observe_mean(group.weights_N, mean, group.noise)
            for line, prior in zip(family, priors(family), strict=True):
                at = line.members_N
                self.worth_U[at], variance_U[at] = line.fit(prior)
                self._weighted_U[at] += (observed_U[at] - self.worth_U[at]) / noise_U[at]
        noise_U, reliable_U = 1 / self._precision_U, torch.empty_like(noise_U)
        residual_U = self._weighted_U * noise_U
        for family in self._families:
            spreads = common_spreads(
                *([values_U[line.members_N] for line in family] for values_U in (residual_U, noise_U))
            )
            for line, spread in zip(family, spreads, strict=True):
                line.spread = spread
                reliable_U[line.members_N] = spread / (spread + noise_U[line.members_N])
        self._apart_U = reliable_U * residual_U
        self.worth_U += self._apart_U
        # (1 - r) line + r observed: as far as a unit's own observations are believed, its line is not.
        self.deviation_U = (variance_U * (1 - reliable_U).square() + reliable_U * noise_U).sqrt()
        self.reliability = reliable_U.mean().item()

    def state_dict(self) -> dict[str, Any]:
        lines = self.lines
        return {
            "reliability": self.reliability,
            "worth_U": self.worth_U.clone(),
            "deviation_U": self.deviation_U,
            "precision_U": self._precision_U.clone(),
            "weighted_U": self._weighted_U.clone(),
            "apart_U": self._apart_U.clone(),
            "information_LFF": torch.stack([line.information_FF for line in lines]),
            "response_LF": torch.stack([line.response_F for line in lines]),
            "spread_L": torch.tensor([line.spread for line in lines], dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``RunError`` for beliefs that follow from another number of scores."""
        lines = self.lines
        if state["response_LF"].shape != (len(lines), len(lines[0].response_F)):
            raise RunError("the checkpoint was written for another number of initial scores")
        self.reliability = state["reliability"]
        self.worth_U, self.deviation_U = state["worth_U"].clone(), state["deviation_U"].clone()
        self._precision_U, self._weighted_U = state["precision_U"].clone(), state["weighted_U"].clone()
        self._apart_U = state["apart_U"].clone()
        for line, information_FF, response_F, spread in zip(
            lines, state["information_LFF"], state["response_LF"], state["spread_L"].tolist(), strict=True
        ):
            line.information_FF = information_FF.clone()
            line.response_F = response_F.clone()
            line.spread = spread


def _families(space: UnitSpace) -> list[list[torch.Tensor]]:
    """Units of the groups of each family: the channels of each layer, and every other kind over all layers."""
    return [space.by_layer(kind) if kind == "channel" else [torch.cat(space.by_layer(kind))] for kind in space.kinds]
