"""Tasks of the learning benchmark on a tiny random model, for its tests.

Letters: K masks, U units.
"""

from pathlib import Path

import torch
from tiny_run import Place, tiny_text

from benchmarks.learning.task import Source, Task

WINDOW, SPARSITY = 16, 0.3
SEQUENCES = 640
CONFIG = {"data": {"window": WINDOW, "eval_tokens": 320}, "initial": {"windows": 8}}


def source_of(place: Place) -> Source:
    """A tiny model and two texts."""
    held_out = tiny_text(place.folder / "held-out.txt", 400, seed=9)
    return Source(str(place.model), str(place.text), str(held_out), CONFIG)


def task_of(source: Source, *, seed: int = 0, limit: int = SEQUENCES) -> Task:
    return Task(source, Path(source.text).parent, sparsity=SPARSITY, seed=seed, limit=limit)


def random_masks(task: Task, count: int) -> torch.Tensor:
    """Masks ``[K, U]`` on the budget."""
    random = torch.Generator().manual_seed(3)
    scores_KU = torch.rand(count, task.space.size, generator=random, dtype=torch.float64)
    return torch.stack([task.select(scores_U) for scores_U in scores_KU])
