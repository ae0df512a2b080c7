"""How far what leaves a block is from what entered it, token by token.

Letters: D hidden size; dots are any leading dimensions.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bernprune.names import InfluenceName, check_name

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # [..., D] twice, to [...]


def _cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(one, other, dim=-1)


_DISTANCES: dict[str, Distance] = {
    "cosine": lambda one, other: 1 - _cosine(one, other),
    "angular": lambda one, other: _cosine(one, other).clamp(-1, 1).acos() / math.pi,
    "mse": lambda one, other: (one - other).square().mean(-1),
    "mae": lambda one, other: (one - other).abs().mean(-1),
}


def distance_of(name: InfluenceName) -> Distance:
    """``cosine`` (ShortGPT), ``angular`` (CFSP), ``mse`` or ``mae``, at least float32.

    Raises:
        ConfigError: another name.
    """
    check_name("influence", name, InfluenceName)
    distance = _DISTANCES[name]

    def precise(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(one.dtype, torch.float32)
        return distance(one.to(dtype), other.to(dtype))

    return precise
