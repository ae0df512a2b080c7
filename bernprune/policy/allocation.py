"""How much each layer keeps, where it is not left to the scores of its units.

Letters: L layers, G groups of units (a kind in a layer).
"""

import torch

from bernprune.errors import BudgetError
from bernprune.units import UnitSpace

# CFSP divides the sum of distances over 128 windows of 1,024 tokens by 10,000; distances here are means over tokens.
STEEPNESS = 128 * 1024 / 1e4
_ROOM = 1.05  # as released: how far the largest share stays below 1


def shares_by_importance(importance_L: torch.Tensor, keep: float, *, steepness: float = STEEPNESS) -> torch.Tensor:
    """Share of its units that each layer keeps, float64 ``[L]``, with the mean ``keep``: more where it matters more.

    keep * t / mean(t), with t a sigmoid of steepness times the difference from the mean importance; where that would be
    1 or more, all layers are drawn to the mean until it is less (Wang et al., 2024, CFSP, released code).

    Raises:
        BudgetError: importances that are not finite.
    """
    if not importance_L.isfinite().all():
        raise BudgetError(f"importances of layers must be finite, but are {importance_L.tolist()}")
    t_L = torch.sigmoid(steepness * (importance_L.double() - importance_L.double().mean()))
    mean = t_L.mean()
    if keep * t_L.max() / mean >= 1:
        t_L = mean + (t_L - mean) * mean * (1 / keep - 1) / (t_L.max() - mean) / _ROOM
    return keep * t_L / mean


def shares_of_groups(space: UnitSpace, shares_L: torch.Tensor) -> torch.Tensor:
    """Of layers to their groups of units, ``[G]``."""
    return torch.stack([shares_L[group.layer] for group in space.groups]).double()
