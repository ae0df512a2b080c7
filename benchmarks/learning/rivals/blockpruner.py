"""BlockPruner (Zhong et al., 2024, arXiv 2406.10594): greedy removal of whole attention and FFN blocks by their loss.

In each round every block that is left is taken out by itself, and the one that is missed least goes for good, until the
budget is met. Its granularity is its own: the sparsity it reaches is at or above the one asked for, and it leaves no
unit in the blocks that it removes, but the attention of the first layer.

Letters: K candidates, U units, B blocks.
"""

import torch

from benchmarks.learning.task import Settings, Task
from bernprune.errors import ConfigError


def blockpruner(task: Task, settings: Settings) -> torch.Tensor:
    """Keep the blocks that are left.

    Args:
        settings: most ``windows`` that a candidate is run on (the paper: 256).

    Raises:
        ConfigError: less than one window for each candidate.
    """
    blocks = [
        units
        for units, group in zip(task.groups, task.space.groups, strict=True)
        if (group.kind, group.layer) != ("kv_group", 0)  # caches take their length from it
    ]
    windows = min(settings["windows"], task.meter.left // _most_candidates(task, blocks))
    if not windows:
        raise ConfigError(f"{task.meter.left:,} sequences are fewer than the blocks to try out")
    tokens_BT = task.text(windows)
    alive_U = torch.ones(task.space.size, dtype=torch.bool)
    while task.budget.removed_share(alive_U) < task.budget.sparsity:
        masks_KU = alive_U.repeat(len(blocks), 1)
        for mask_U, units in zip(masks_KU, blocks, strict=True):
            mask_U[units] = False
        best = int(task.losses(masks_KU, tokens_BT).argmin())
        alive_U = masks_KU[best]
        del blocks[best]
    return alive_U


def _most_candidates(task: Task, blocks: list[torch.Tensor]) -> int:
    """Candidates over all rounds if the cheapest blocks were always those that go."""
    left, count = task.budget.sparsity * task.budget.total, 0
    for rounds, cost in enumerate(sorted(task.budget.costs_U[units].sum().item() for units in blocks)):
        if left <= 0:
            break
        count += len(blocks) - rounds
        left -= cost
    return count
