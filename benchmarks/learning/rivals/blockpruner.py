"""BlockPruner (Zhong et al., 2024, arXiv 2406.10594): greedy removal of whole attention and FFN blocks by their loss.

In each round every block that is left is taken out by itself, and the one that is missed least goes for good, until the
budget is met. It leaves no unit in the blocks that it removes; the attention of the first layer stays.

Departure: of the block that goes last as many units come back as the budget allows, the best by Wanda-sp, or it would
remove up to half as much again as other methods.

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
    scores_U = task.scores()
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
        alive_U, last = masks_KU[best], blocks.pop(best)
    for unit in last[scores_U[last].argsort(descending=True)].tolist():
        alive_U[unit] = True
        if task.budget.removed_share(alive_U) < task.budget.sparsity:
            alive_U[unit] = False
            break
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
