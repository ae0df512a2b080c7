"""Copies of weights that are about to be changed in place, from which the model can be had back to the bit."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Weights:
    """Weights and biases of some projections, as they are now, on the CPU."""

    def __init__(self, projections: Iterable[nn.Linear] = ()) -> None:
        self._kept: dict[nn.Linear, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self.keep(*projections)

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        return tuple(self._kept)

    def keep(self, *projections: nn.Linear) -> None:
        """Copy those of further projections; what is kept already stays as it is."""
        for projection in projections:
            if projection not in self._kept:
                bias_D = projection.bias
                kept_D = None if bias_D is None else _copied(bias_D)
                self._kept[projection] = (_copied(projection.weight), kept_D)

    def of(self, projection: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias as they were."""
        return self._kept[projection]

    def put_back(self) -> None:
        """Give the projections what was kept of them; one that had no bias has none again."""
        for projection, (weight_DE, bias_D) in self._kept.items():
            put(projection, weight_DE, bias_D)

    def exchange(self, into: "Weights") -> None:
        """Put back what was kept, and keep it no longer; ``into`` keeps what the projections had instead.

        At most one projection is held twice. Whenever this is interrupted, what is still to be put back is kept.
        """
        for projection in self.projections:
            into.keep(projection)
            put(projection, *self.of(projection))
            del self._kept[projection]

    @contextmanager
    def put_back_on_error(self) -> Iterator[None]:
        """Put back what was kept on an error within the block; Ctrl-C is one, too."""
        try:
            yield
        except BaseException:
            self.put_back()
            raise


def put(projection: nn.Linear, weight_DE: torch.Tensor, bias_D: torch.Tensor | None) -> None:
    """Write weight and bias into a projection, which is given a bias, or loses it, if need be."""
    weight = projection.weight
    weight.data.copy_(weight_DE)
    if bias_D is None:
        projection.register_parameter("bias", None)
    elif getattr(projection, "bias", None) is None:
        new_D = bias_D.detach().to(weight.device, weight.dtype, copy=True)
        projection.bias = nn.Parameter(new_D, requires_grad=weight.requires_grad)
    else:
        projection.bias.data.copy_(bias_D)


def _copied(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().to("cpu", copy=True)
