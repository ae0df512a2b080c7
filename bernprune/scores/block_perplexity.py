"""Block perplexity: blocks go one after the other, each time the one that is missed least (Zhong et al., 2024,
BlockPruner, arXiv 2406.10594).

In each round every block that is left is taken out by itself, on the same text; that with the least loss goes for good,
until the share of parameters is removed that ``Options.sparsity`` asks for. A block's score is the number of the round
it went in; those that are left follow in the order of their losses in the last round.

Letters: K candidates, U units.
"""

import math

import torch

from bernprune.objective import masked_objective
from bernprune.scores.base import BLOCKS, Context, Metric, Options


def _block_perplexity(context: Context) -> torch.Tensor:
    space, costs_U = context.view.space, context.view.space.costs_U()
    alive_U, scores_U = torch.ones(space.size, dtype=torch.bool), torch.zeros(space.size, dtype=torch.float64)
    rounds = 0
    with masked_objective(context.view, context.ops, rows_per_forward=context.rows_per_forward) as objective:
        while True:
            candidates = alive_U.nonzero()[:, 0]
            masks_KU = alive_U.repeat(len(candidates), 1)
            masks_KU[torch.arange(len(candidates)), candidates] = False
            masks_KU = space.alive(masks_KU)
            losses_K = objective.losses(masks_KU, context.windows_WT).nan_to_num(nan=math.inf)
            best = int(losses_K.argmin())
            scores_U[alive_U & ~masks_KU[best]] = rounds
            alive_U, rounds = masks_KU[best], rounds + 1
            if not alive_U.any() or 1 - (costs_U * alive_U).sum() / costs_U.sum() >= context.options.sparsity:
                break
    for place, candidate in enumerate(candidates[losses_K.argsort(stable=True)].tolist()):
        if alive_U[candidate]:
            scores_U[candidate] = rounds + place / len(candidates)
    return scores_U


def _passes(layers: int, options: Options) -> float:
    """Passes at most, if attention and FFN cost the same and no layer goes whole: all candidates, then one fewer each
    round."""
    candidates = layers * len(set(BLOCKS).intersection(options.kinds))
    blocks = layers * max(1, len({"attention", "ffn"}.intersection(options.kinds)))
    rounds = min(blocks, math.ceil(options.sparsity * blocks) + 1)
    return float(sum(candidates - done for done in range(rounds)))


BLOCK_PERPLEXITY = Metric(
    "block-perplexity",
    "the round in which a block goes, if each time that goes which is missed least",
    "Zhong et al., 2024 (BlockPruner)",
    _block_perplexity,
    kinds=BLOCKS,
    allocation="pooled",
    passes=_passes,
    reads=("sparsity",),
)
