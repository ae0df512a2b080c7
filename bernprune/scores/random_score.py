"""Random scores: what any metric must beat."""

import torch

from bernprune.scores.base import Metric
from bernprune.scores.stream import Projection, by_weights
from bernprune.seeding import generator


def random_score(projection: Projection) -> torch.Tensor:
    """Standard normal numbers from (seed, layer, kind), ``[E]``."""
    source = generator(projection.seed, "random-score", projection.layer, projection.kind)
    return torch.randn(projection.weight_DE.shape[1], generator=source, dtype=torch.float64)


RANDOM = Metric(
    "random",
    "normal random numbers",
    "what any metric must beat",
    by_weights(random_score),
    passes=lambda layers, options: 0.0,
    layerwise=True,
)
