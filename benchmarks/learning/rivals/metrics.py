"""A metric alone: Wanda-sp (Sun et al., 2023; An et al., 2023), FLAP (An et al., 2023), magnitude, random.

Uniform: every kind in every layer loses the same share. Global: layers compete, kind by kind, by their raw scores;
FLAP's, which are standardised, all in one pool, as in its paper (without its bias compensation). In turn: uniform, and
each layer is scored on what the already pruned layers before it hand on, as Wanda-sp was published. Every metric is
charged for the calibration windows, though magnitude and random do not look at them, and in turn twice.
"""

import torch

from benchmarks.learning.task import Settings, Task


def metric(task: Task, settings: Settings) -> torch.Tensor:
    """Keep what scores best; ``settings``: ``score``, ``scope``, and ``inputs`` if they are those of pruned layers."""
    scores_U = task.scores_in_turn(settings["score"]) if "inputs" in settings else task.scores(settings["score"])
    return task.select_by(scores_U, settings["scope"])
