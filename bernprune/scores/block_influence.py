"""Block influence: how much a block changes what passes through it (Men et al., 2024, ShortGPT, arXiv 2403.03853).

With other distances, that of whole layers says how much each of them may keep (Wang et al., 2024, CFSP).

Letters: L layers, R rows, T tokens, D hidden size.
"""

from typing import Any

import torch
from torch import nn

from bernprune.models.hooks import hooked
from bernprune.names import InfluenceName
from bernprune.scores.base import BLOCKS, Context, Metric
from bernprune.scores.distances import Distance, distance_of
from bernprune.scores.stream import LayerPass, Scores, by_layer


class _Mean:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: torch.Tensor) -> None:
        self.total += values.double().sum().item()
        self.count += values.numel()

    @property
    def value(self) -> torch.Tensor:
        return torch.tensor([self.total / self.count], dtype=torch.float64)


def influence_of(at: LayerPass, distance: Distance) -> Scores:
    """Mean distance over tokens between what enters and leaves: of the attention block, the FFN block, and both."""
    means, between = {kind: _Mean() for kind in BLOCKS}, list[torch.Tensor]()

    def after_attention(module: nn.Module, inputs: Any, output: Any) -> None:
        between.append(output[0])

    def after_layer(module: nn.Module, inputs: tuple[torch.Tensor, ...], output_RTD: torch.Tensor) -> None:
        middle_RTD = inputs[0] + between.pop()
        means["attention"].add(distance(inputs[0], middle_RTD))
        means["ffn"].add(distance(middle_RTD, output_RTD))
        means["layer"].add(distance(inputs[0], output_RTD))

    with hooked((at.layer.attention, after_attention), (at.layer.layer, after_layer)):
        at.run()
    return {kind: mean.value for kind, mean in means.items()}


def layer_influence(context: Context, name: InfluenceName) -> torch.Tensor:
    """Mean distance over tokens between what enters and what leaves each layer, float64 ``[L]``."""
    distance, found = distance_of(name), list[torch.Tensor]()

    def of_layer(at: LayerPass) -> Scores:
        found.append(influence_of(at, distance)["layer"])
        return {}

    by_layer(of_layer)(context)
    return torch.cat(found)


BLOCK_INFLUENCE = Metric(
    "block-influence",
    "1 - cosine between what enters and what leaves a block",
    "Men et al., 2024 (ShortGPT)",
    by_layer(lambda at: influence_of(at, distance_of("cosine"))),
    kinds=BLOCKS,
    allocation="pooled",
)
