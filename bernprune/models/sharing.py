"""A prefix of layers run once for all masks that agree on it: a batch that grows where masks part.

Masks that differ in few units, like the challengers of a final choice, agree on the layers below the first of these
units, and there give the same hidden states for the same text. A batch begins with one row for each window; before a
layer in which masks part, the rows of those that agreed until then are copied.

Letters: K masks, U units, N units of one layer, B windows, P rows of one layer.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bernprune.units import UnitSpace


@dataclass(frozen=True)
class Branching:
    """Where masks part.

    Attributes:
        masks_of_layers: for each layer, one mask of each class of masks that agree up to and including it.
        parents_of_layers: for each class of a layer, its class in the layer before; in the first layer, class 0.
        class_K: each mask's class in the last layer.
    """

    masks_of_layers: list[torch.Tensor]
    parents_of_layers: list[torch.Tensor]
    class_K: torch.Tensor

    @classmethod
    def of(cls, space: UnitSpace, alive_KU: torch.Tensor) -> "Branching":
        """Where masks part, given by what they leave alive, bool on the CPU."""
        class_K = torch.zeros(len(alive_KU), dtype=torch.int64)
        masks_of_layers = []
        parents_of_layers = []
        for span in space.layer_spans:
            kept_KN = alive_KU[:, span]
            keys = [
                (parent, kept_N.numpy().tobytes()) for parent, kept_N in zip(class_K.tolist(), kept_KN, strict=True)
            ]
            first = {key: mask for mask, key in reversed(list(enumerate(keys)))}  # of each class, its first mask
            classes = sorted(first.values())
            masks_of_layers.append(torch.tensor(classes))
            parents_of_layers.append(class_K[classes])
            class_K = torch.tensor([classes.index(first[key]) for key in keys])
        return cls(masks_of_layers, parents_of_layers, class_K)

    @contextmanager
    def growing(self, layers: Sequence[nn.Module], windows: int) -> Iterator[None]:
        """For the length of the block, let the batch of a forward pass of so many windows grow where masks part."""
        with ExitStack() as hooks:
            before = 1
            for layer, parents in zip(layers, self.parents_of_layers, strict=True):
                if len(parents) > 1:
                    grow = _Grow(parents if len(parents) > before else None, windows, len(parents))
                    hooks.callback(layer.register_forward_pre_hook(grow, with_kwargs=True).remove)
                before = len(parents)
            yield


class _Grow:
    """A hook that copies rows of hidden states, where masks part, and of what else has one for each window."""

    def __init__(self, parents: torch.Tensor | None, windows: int, classes: int) -> None:
        each_B = torch.arange(windows)
        self._windows, self._window_P = windows, each_B.repeat(classes)
        self._source_P = None if parents is None else (parents[:, None] * windows + each_B).flatten()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden, *rest = args
        if self._source_P is not None:
            hidden = hidden[self._source_P.to(hidden.device)]
        return (hidden, *map(self._grown, rest)), {name: self._grown(value) for name, value in kwargs.items()}

    def _grown(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._grown, value))
        if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == self._windows > 1:
            return value[self._window_P.to(value.device)]
        return value
