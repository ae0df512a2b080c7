"""CFSP: activations weigh relative weights within a block (Wang et al., 2024, arXiv 2409.13199, and released code).

What a block may keep goes by its importance, which is the allocation ``block-influence``. The fine score of channel j
is mean_i [N(W_down a) + N(W_up') + N(W_gate')]_ij a_j, with a_j the norm of its activations. As released, N divides by
the sum over i, so that every column sums to 1, the weights cancel, and the score is 3 a_j / d. Here N divides by the
sum over j: a weight counts for its share of what the same output reads.

The paper scores channels alone. A kv group has the mean over its columns of the same with W_output and W_value.

Letters: D hidden size, F channels, E entries of the attention output's input.
"""

import torch

from bernprune.scores.base import PARTS, Metric
from bernprune.scores.stream import LayerPass, Scores, by_layer, of_columns


def fine_scores(read_DE: torch.Tensor, made_DE: list[torch.Tensor], norm_E: torch.Tensor, over: int) -> torch.Tensor:
    """mean_i [N(read * a) + sum N(made)]_ij a_j, ``[E]``.

    Args:
        read_DE: weight that reads what the weights ``made_DE`` make; each has a column an entry.
        norm_E: a, sizes of the entries.
        over: what N sums over: 0 the rows, as released, 1 the columns.
    """
    terms = [_relative(read_DE * norm_E, over), *(_relative(weight, over) for weight in made_DE)]
    return torch.stack(terms).sum(0).mean(0) * norm_E


def _relative(weight_DE: torch.Tensor, over: int) -> torch.Tensor:
    sizes_DE = weight_DE.abs()
    return sizes_DE / sizes_DE.sum(over, keepdim=True).clamp(min=1e-300)


def _of_layer(at: LayerPass, over: int) -> Scores:
    seen = at.moments(("output", "down"))
    windows = len(at.context.windows_WT)

    def weight(name: str) -> torch.Tensor:
        return at.weight(name).cpu()

    # The norm of all tokens of a sample, in the mean over samples.
    norms = {name: (moments.second_moment_E * moments.count / windows).sqrt() for name, moments in seen.items()}
    shape, head_dim = at.layer.shape, at.view.architecture.head_dim
    value_ED = weight("value").view(shape.kv_groups, 1, head_dim, -1)
    value_ED = value_ED.expand(-1, shape.queries_per_group, -1, -1).flatten(0, 2)
    channels_F = fine_scores(weight("down"), [weight("up").T, weight("gate").T], norms["down"], over)
    return of_columns(at.layer, fine_scores(weight("output"), [value_ED.T], norms["output"], over), channels_F)


def _metric(name: str, about: str, over: int) -> Metric:
    return Metric(
        name,
        about,
        "Wang et al., 2024",
        by_layer(lambda at: _of_layer(at, over)),
        kinds=PARTS,
        allocation="block-influence",
        layerwise=True,
    )


CFSP = _metric("cfsp", "relative weights around a unit, times the norm of what it hands on", 1)
CFSP_RELEASED = _metric("cfsp-released", "the same with the released normalisation, in which weights cancel", 0)
