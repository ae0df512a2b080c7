"""Magnitude: the norm of the weights that read a unit. Known to do badly; kept as the simplest reference."""

import torch

from bernprune.scores.base import Projection


def magnitude(projection: Projection) -> torch.Tensor:
    """Euclidean norm of each column of the weight, ``[E]``."""
    norms_E: torch.Tensor = torch.linalg.vector_norm(projection.weight_DE.double(), dim=0)
    return norms_E
