"""Random scores: what any metric must beat."""

import torch

from bernprune.scores.base import Projection
from bernprune.seeding import generator


def random_score(projection: Projection) -> torch.Tensor:
    """Standard normal numbers from (seed, layer, kind), ``[E]``."""
    source = generator(projection.seed, "random-score", projection.layer, projection.kind)
    return torch.randn(projection.weight_DE.shape[1], generator=source, dtype=torch.float64)
