"""Random scores: what any metric must beat."""

import torch

from bernprune.scores.base import Context, Metric
from bernprune.seeding import generator


def random_score(context: Context) -> torch.Tensor:
    """A standard normal number for each unit, from (seed, layer, kind)."""
    return torch.cat(
        [
            torch.randn(
                group.count,
                generator=generator(context.seed, "random-score", group.layer, group.kind),
                dtype=torch.float64,
            )
            for group in context.view.space.groups
        ]
    )


RANDOM = Metric(
    "random",
    "normal random numbers",
    "what any metric must beat",
    random_score,
    passes=lambda layers, options: 0.0,
    standardised=True,
)
