"""Repairs in closed form: other weights for the inputs that are kept, from moments alone.

All of them minimise E|t - W x - b|^2, each over what it may change. W0 is the weight of the kept inputs as it was; S
and C are E[xx'] and E[tx'] about the means if there may be a bias, and about 0 for x and b for t if not.

Letters: A inputs of a projection, D its outputs, U units of A / U adjacent inputs each.
"""

from dataclasses import dataclass

import torch

from bernprune.errors import ModelError
from bernprune.repair.moments import Moments

_JITTERS = (0.0, 1e-12, 1e-10, 1e-8, 1e-6)  # of the mean of the diagonal, tried in turn
ADMM_DAMPING, ADMM_RHO, ADMM_STEPS = 0.1, 10.0, 20


@dataclass(frozen=True)
class Linear:
    """What a projection does to its kept inputs: float64 ``[D, A]``, and ``[D]`` or None for no bias."""

    weight_DA: torch.Tensor
    bias_D: torch.Tensor | None


def compensated(moments: Moments, dense: Linear) -> Linear:
    """Another bias alone, so that the outputs have the mean that they should have (FLAP: An et al., 2023).

    With t = W0 x + (what the removed inputs gave) + b, that adds what they gave on average.
    """
    mean_A, mean_D = moments.means
    return Linear(dense.weight_DA, mean_D - dense.weight_DA @ mean_A)


def reconstructed(moments: Moments, dense: Linear, ridge: float, *, biased: bool) -> Linear:
    """Ridge regression drawn to the weights as they were: W = W0 + (C - W0 S)(S + ridge * mean(diag S))^-1.

    With t what the whole projection gave on the same inputs, C - W0 S is the removed weights times the moments of
    removed with kept inputs, which makes it the input side of LIAR (2024, arXiv 2407.13331); with other t, its form for
    accumulated errors.

    Args:
        ridge: above 0; a larger one changes less, and without end it is ``compensated``.
    """
    gram_AA, cross_DA = _about(moments, dense, biased=biased)
    change_DA = _solved(gram_AA, (cross_DA - dense.weight_DA @ gram_AA).T, ridge).T
    return _with_bias(moments, dense, dense.weight_DA + change_DA, biased=biased)


def rescaled(moments: Moments, dense: Linear, ridge: float, *, units: int, biased: bool) -> Linear:
    """A factor for each unit, by least squares drawn to 1, folded into the weights.

    The factors that GRASPrune (2026, arXiv 2604.19398) learns by back-propagation, in closed form: with W = W0 diag(s),
    E|t - W x|^2 is quadratic in s, and its matrix is (W0'W0 * S), summed over the inputs of each pair of units.
    """
    gram_AA, cross_DA = _about(moments, dense, biased=biased)
    width = len(gram_AA) // units
    products_AA = (dense.weight_DA.T @ dense.weight_DA) * gram_AA
    matrix_UU = products_AA.view(units, width, units, width).sum((1, 3))
    wanted_U = (dense.weight_DA * cross_DA).sum(0).view(units, width).sum(1)
    scales_U = 1 + _solved(matrix_UU, (wanted_U - matrix_UU.sum(1))[:, None], ridge)[:, 0]
    return _with_bias(moments, dense, dense.weight_DA * scales_U.repeat_interleave(width), biased=biased)


def reformed(moments: Moments, dense: Linear, kept_A: torch.Tensor, *, biased: bool) -> Linear:
    """ADMM between weights that fit and weights of kept inputs alone (Shen et al., 2024, 'Search for Efficient LLMs').

    Here the moments and weights are those of all inputs, ``kept_A`` (bool) says which are kept, and of the result the
    others are 0. Inputs are scaled to E[x^2] = 1, their matrix damped by a tenth of the mean of its diagonal.
    """
    gram_AA, cross_DA = _about(moments, dense, biased=biased)
    scale_A = gram_AA.diagonal().clamp(min=0).sqrt()
    scale_A = scale_A.where(scale_A > 0, 1.0)
    gram_AA, cross_DA = gram_AA / scale_A[:, None] / scale_A, cross_DA / scale_A
    start_DA = dense.weight_DA * scale_A
    damping = ADMM_DAMPING * gram_AA.diagonal().mean()
    gram_AA.diagonal().add_(damping + ADMM_RHO)
    factor_AA = factor(gram_AA)
    wanted_DA, free_DA = cross_DA + damping * start_DA, torch.zeros_like(start_DA)
    kept_DA = start_DA * kept_A
    for _ in range(ADMM_STEPS):
        fitted_DA = torch.cholesky_solve((wanted_DA + ADMM_RHO * (kept_DA - free_DA)).T, factor_AA).T
        kept_DA = (fitted_DA + free_DA) * kept_A
        free_DA += fitted_DA - kept_DA
    return _with_bias(moments, dense, kept_DA / scale_A, biased=biased)


def _about(moments: Moments, dense: Linear, *, biased: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """S and C, as above."""
    if biased:
        return moments.about(*moments.means)
    mean_A, mean_D = moments.means
    zero_D = torch.zeros_like(mean_D) if dense.bias_D is None else dense.bias_D
    return moments.about(torch.zeros_like(mean_A), zero_D)


def _with_bias(moments: Moments, dense: Linear, weight_DA: torch.Tensor, *, biased: bool) -> Linear:
    """These weights with the bias that goes best with them, or the one that was there."""
    return compensated(moments, Linear(weight_DA, None)) if biased else Linear(weight_DA, dense.bias_D)


def _solved(gram_AA: torch.Tensor, wanted_AD: torch.Tensor, ridge: float) -> torch.Tensor:
    """Solve (S + ridge * mean(diag S)) X = wanted, with the ridge added to S where it lies; X is 0 where S is."""
    mean = gram_AA.diagonal().mean()
    if mean == 0:  # inputs that are always the same, or weights that make nothing of them
        return torch.zeros_like(wanted_AD)
    gram_AA.diagonal().add_(ridge * mean)
    return torch.cholesky_solve(wanted_AD, factor(gram_AA))


def factor(gram_AA: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor, of a matrix that rounding has left a hair short of positive with a little on its diagonal.

    Raises:
        ModelError: it is singular all the same.
    """
    mean = gram_AA.diagonal().mean()
    for jitter in _JITTERS:
        tried_AA = gram_AA if not jitter else gram_AA + torch.diag_embed(jitter * mean.expand(len(gram_AA)))
        factor_AA: torch.Tensor
        factor_AA, failed = torch.linalg.cholesky_ex(tried_AA)
        if not failed.item() and mean > 0:
            return factor_AA
    raise ModelError(
        f"the Gram matrix of {len(gram_AA):,} inputs is singular: on the calibration text some are not finite, or "
        "differ too much in size; give other text, or repair.method 'bias' or 'none'"
    )
