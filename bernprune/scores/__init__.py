"""Metrics that can start the policy. One file each: a projection's weight and inputs in, a score a column out.

To add one, write ``def my_score(projection: Projection) -> torch.Tensor``; in Python, ``initial_scores`` takes it as it
is. For a name in the configuration, give it a line in ``SCORES`` and in ``bernprune.names.ScoreName``.
"""

from bernprune.scores.base import Projection, Score, initial_scores, unit_scores
from bernprune.scores.flap import flap
from bernprune.scores.magnitude import magnitude
from bernprune.scores.random_score import random_score
from bernprune.scores.wanda_sp import wanda_sp

SCORES: dict[str, Score] = {"wanda-sp": wanda_sp, "flap": flap, "magnitude": magnitude, "random": random_score}

__all__ = ["SCORES", "Projection", "Score", "initial_scores", "unit_scores"]
