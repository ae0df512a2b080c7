"""A metric alone: Wanda-sp (Sun et al., 2023; An et al., 2023), FLAP (An et al., 2023), magnitude, random.

Uniform: every kind in every layer loses the same share. Global: layers compete, kind by kind, by their raw scores;
FLAP's, which are standardised, all in one pool, as in its paper (without its bias compensation). Every metric is
charged for the calibration windows, though magnitude and random do not look at them.
"""

import torch

from benchmarks.learning.task import Settings, Task


def metric(task: Task, settings: Settings) -> torch.Tensor:
    """Keep what scores best; ``settings``: ``score`` and ``scope``."""
    return task.select_by(task.scores(settings["score"]), settings["scope"])
