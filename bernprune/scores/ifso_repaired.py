"""What a unit is worth after its repair: judged by the error that is left once the others have made up for it.

That is the point of influence functions (Cheng, Zhang and Shi, 2024, arXiv 2308.06755) in closed form: the least
squared error of the projection that reads a unit, once the columns of all others are fitted to what it gave. It is
W_j' ([H^-1]_jj)^-1 W_j, with H the second moments of the inputs (Hassibi and Stork, 1993; in blocks, Kurtic et al.,
2023), here relative to the energy of what the layer hands on.

Letters: D output width of a projection, E its inputs, N units of C columns, R rows, T tokens.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bernprune.errors import ConfigError
from bernprune.models.hooks import hooked
from bernprune.models.statistics import POINTS, Gram
from bernprune.models.view import ModelView
from bernprune.scores.base import Metric
from bernprune.scores.stream import LayerPass, Scores, by_layer, of_parts

_DAMPING = 0.01  # of the mean of the diagonal


def errors(weight_DE: torch.Tensor, moments_EE: torch.Tensor, units: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error of W x without each unit's columns: as it is, and the least once the others make up for it.

    Args:
        weight_DE: float64.
        moments_EE: second moments of x, float64; damped by a hundredth of the mean of their diagonal.
        units: their number; each owns equally many adjacent columns.

    Returns:
        Both ``[N]``.
    """
    damping = _DAMPING * moments_EE.diagonal().mean().clamp(min=1e-300)
    damped_EE = moments_EE + damping * torch.eye(len(moments_EE), dtype=moments_EE.dtype, device=moments_EE.device)
    inverse_EE = torch.cholesky_inverse(torch.linalg.cholesky(damped_EE))
    columns_NCD = weight_DE.T.reshape(units, len(moments_EE) // units, -1)
    plain_N: torch.Tensor = (columns_NCD * (_blocks(damped_EE, units) @ columns_NCD)).sum((1, 2))
    repaired_N: torch.Tensor = (columns_NCD * torch.linalg.solve(_blocks(inverse_EE, units), columns_NCD)).sum((1, 2))
    return plain_N, repaired_N


def _blocks(matrix_EE: torch.Tensor, units: int) -> torch.Tensor:
    """The blocks of the units on the diagonal, ``[N, C, C]``."""
    width = len(matrix_EE) // units
    return matrix_EE.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _of_layer(combined: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[LayerPass], Scores]:
    """A metric of layers: what is made of both errors of their units."""

    def scores(at: LayerPass) -> Scores:
        moments, energy = {point: Gram(at.projection(point)) for point in POINTS}, list[float]()

        def weigh(module: nn.Module, inputs: Any, output_RTD: torch.Tensor) -> None:
            energy.append(output_RTD.double().square().sum().item())

        grams = [(at.projection(point), moments[point].hook) for point in POINTS]
        with hooked(*grams, (at.layer.layer, weigh)):
            seen = at.moments(POINTS)
        tokens, shape = seen["down"].count, at.layer.shape
        found = {}
        for point, units in (("output", shape.kv_groups), ("down", shape.channels)):
            plain_N, repaired_N = errors(at.weight(point), moments[point].mean_EE, units)
            found[point] = combined(plain_N, repaired_N) * tokens / sum(energy)
        return of_parts(found["output"], found["down"])

    return scores


def _needs_tokens(view: ModelView, windows_WT: torch.Tensor) -> None:
    """Raises ``ConfigError`` if there are fewer tokens than entries to tell apart."""
    windows, window = windows_WT.shape
    widest = max(getattr(layer, point).in_features for layer in view.layers for point in POINTS)
    if windows * window < widest:
        raise ConfigError(
            f"{windows * window:,} tokens of calibration text are too few for a stable Gram matrix of {widest:,} "
            f"inputs: at least {widest:,} are needed, which are {math.ceil(widest / window):,} windows of {window}"
        )


IFSO_REPAIRED = Metric(
    "ifso-repaired",
    "error of what reads a unit after the columns of the others have been fitted to make up for it",
    "after Cheng, Zhang and Shi, 2024",
    by_layer(_of_layer(lambda plain_N, repaired_N: repaired_N)),
    layerwise=True,
    needs=_needs_tokens,
)
IFSO_HALFWAY = Metric(
    "ifso-halfway",
    "geometric mean of that error and of the one before anything is fitted",
    "ours, after Cheng, Zhang and Shi, 2024",
    by_layer(_of_layer(lambda plain_N, repaired_N: (plain_N * repaired_N).sqrt())),
    layerwise=True,
    needs=_needs_tokens,
)
