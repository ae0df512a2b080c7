"""Magnitude: the norm of the weights that read a unit. Known to do badly; kept as the simplest reference."""

import torch

from bernprune.scores.base import Metric
from bernprune.scores.stream import Projection, by_weights


def magnitude(projection: Projection) -> torch.Tensor:
    """Euclidean norm of each column of the weight, ``[E]``."""
    return torch.linalg.vector_norm(projection.weight_DE.double(), dim=0)


MAGNITUDE = Metric(
    "magnitude",
    "norm of the weights that read a unit",
    "folklore",
    by_weights(magnitude),
    passes=lambda layers, options: 0.0,
)
