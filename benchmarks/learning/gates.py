"""Gates on an unmodified model: what the attention output and FFN down projections read is multiplied by them.

At 0 and 1 they equal bernprune's masks (but for a bias of such a projection, which a mask switches off with the whole
branch); between, and under autograd, they are what methods that back-propagate into masks optimise.

Letters: U units, E input entries of a projection.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from bernprune.models.view import ModelView
from bernprune.names import Kind


@contextmanager
def gated(view: ModelView, gates_U: torch.Tensor) -> Iterator[None]:
    """For the length of a ``with`` block, every kv group and channel passes on its output times its gate."""
    with ExitStack() as hooks:
        for index, layer in enumerate(view.layers):
            projections: dict[Kind, nn.Linear] = {"kv_group": layer.output, "channel": layer.down}
            for kind, projection in projections.items():
                gates_N = gates_U[view.space.span(kind, index)].to(projection.weight)
                gates_E = gates_N.repeat_interleave(projection.in_features // len(gates_N))
                hooks.callback(projection.register_forward_pre_hook(_times(gates_E)).remove)
        yield


def _times(gates_E: torch.Tensor) -> Any:
    def multiply(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0] * gates_E,)

    return multiply
