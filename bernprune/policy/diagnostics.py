"""What a search knows of itself, in figures that say whether more text would help.

Letters: U units, N units of a kind or group.
"""

import math

import torch

from bernprune.policy.bernoulli import entropy, ranks
from bernprune.units import UnitSpace


def entropy_by_layer(space: UnitSpace, probs_U: torch.Tensor) -> list[float | None]:
    """Mean entropy of a layer's units in bits; None for a layer without any."""
    members = [space.layer_U == layer for layer in range(len(space.architecture.layers))]
    return [entropy(probs_U[members_U]) if members_U.any() else None for members_U in members]


def rank_correlation(space: UnitSpace, values_U: torch.Tensor, scores_U: torch.Tensor) -> dict[str, float]:
    """Spearman's rank correlation for each kind, in a layer (in all, where each has one unit), averaged over layers."""
    found: dict[str, float] = {}
    for kind in space.kinds:
        layers = space.by_layer(kind)
        spans = [at for at in layers if len(at) > 1] or [torch.cat(layers)]
        each = [correlation(ranks(values_U[at]), ranks(scores_U[at])) for at in spans]
        found[kind] = sum(each) / len(each)
    return found


def correlation_by_kind(space: UnitSpace, first_U: torch.Tensor, second_U: torch.Tensor) -> dict[str, float]:
    """Correlation of two observations of the same, for each kind."""
    members = {kind: space.of_kind(kind) for kind in space.kinds}
    return {kind: correlation(first_U[at], second_U[at]) for kind, at in members.items()}


def signal_to_noise(space: UnitSpace, observed_U: torch.Tensor, noise_U: torch.Tensor) -> dict[str, float]:
    """For each kind, mean(o^2) / mean(v) - 1 of observations o with variances v, 0 at least: how much more its units
    differ from zero than their noise explains, relative to it."""
    found: dict[str, float] = {}
    for kind in space.kinds:
        at = space.of_kind(kind)
        noise = noise_U[at].mean().item()
        found[kind] = max(0.0, observed_U[at].square().mean().item() / noise - 1) if noise > 0 else 0.0
    return found


def expected_regret(probs_U: torch.Tensor, deviation_U: torch.Tensor) -> float:
    """What knowing every worth exactly would gain on average, nats per token, were worths additive and the price fixed.

    A unit whose net worth is believed to be normal with deviation d is kept with probability s = Phi(z); deciding by
    its mean loses d (phi(z) - |z| Phi(-|z|)) against deciding by the truth (expected value of perfect information;
    Raiffa and Schlaifer, 1961).

    Args:
        probs_U: s, without floor or ceiling, ``[U]``.
        deviation_U: d, nats per token, ``[U]``.
    """
    distance_U = torch.special.ndtri(probs_U).abs()
    density_U = torch.exp(-distance_U.square() / 2) / math.sqrt(2 * math.pi)
    lost_U = density_U - distance_U * torch.special.ndtr(-distance_U)
    return float((deviation_U * lost_U.nan_to_num(0.0)).sum())  # where a unit is certain, distance is infinite


def correlation(first_N: torch.Tensor, second_N: torch.Tensor) -> float:
    """Pearson's correlation; 0 where one of them does not vary."""
    first_N, second_N = first_N - first_N.mean(), second_N - second_N.mean()
    scale = (first_N.norm() * second_N.norm()).item()
    return (first_N @ second_N).item() / scale if scale > 0 else 0.0
