"""Where repair changes a model: the projections of each layer's two branches, and what of them a plan keeps.

Letters: E inputs of a projection, A those of them that are kept.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from bernprune.errors import ModelError
from bernprune.models.linear import is_plain, kind_of
from bernprune.models.slicing import adjacent_rows, check_architecture
from bernprune.models.view import ModelView
from bernprune.units import KeepPlan


@dataclass(frozen=True)
class Place:
    """One branch of one layer, under a plan.

    Attributes:
        norm: what the residual stream goes through on its way into the branch.
        first: projections into the units, each with the rows of it that are kept.
        last: projection out of them, of whose inputs ``kept_A`` are kept.
        units: how many are kept.
    """

    layer: int
    branch: Literal["attention", "ffn"]
    norm: nn.Module
    first: tuple[tuple[nn.Linear, torch.Tensor], ...]
    last: nn.Linear
    kept_A: torch.Tensor
    units: int

    @property
    def name(self) -> str:
        return f"the {'attention output' if self.branch == 'attention' else 'down'} projection of layer {self.layer}"


def places(view: ModelView, plan: KeepPlan, layer: int) -> tuple[Place, Place]:
    """Attention and FFN of a layer, in the order in which they add to the residual stream."""
    parts = view.layers[layer]
    family = view.family
    kept = plan.layers[layer]
    queries = adjacent_rows(kept.kv_groups, parts.output.in_features // parts.shape.kv_groups)
    keys, channels = (
        adjacent_rows(kept.kv_groups, view.architecture.head_dim),
        torch.tensor(kept.channels, dtype=torch.int64),
    )
    into_heads = ((family.query, queries), (family.key, keys), (family.value, keys))
    into_channels = ((family.gate, channels), (family.up, channels))
    return (
        Place(
            layer,
            "attention",
            getattr(parts.layer, family.attention_norm),
            tuple((getattr(parts.attention, name), rows) for name, rows in into_heads),
            parts.output,
            queries,
            len(kept.kv_groups),
        ),
        Place(
            layer,
            "ffn",
            getattr(parts.layer, family.ffn_norm),
            tuple((getattr(parts.ffn, name), rows) for name, rows in into_channels),
            parts.down,
            channels,
            len(channels),
        ),
    )


def check_places(view: ModelView, plan: KeepPlan) -> None:
    """Raises ``ModelError`` for a plan of another architecture, or a projection whose weights are quantised."""
    check_architecture(plan, view.architecture)
    for layer in range(len(view.layers)):
        for place in places(view, plan, layer):
            for projection in (place.last, *(first for first, _ in place.first)):
                if not is_plain(projection) or projection.weight.dtype.itemsize < 2:
                    raise ModelError(
                        f"a projection of the {place.branch} of layer {layer} is a {kind_of(projection)} in "
                        f"{projection.weight.dtype}, but repair can only change plain linear layers of 16 bits or "
                        "more; repair the model before quantising or adapting it"
                    )
