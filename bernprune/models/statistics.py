"""First and second moments of what enters and leaves projections, above all the attention output and FFN down ones.

Letters: N tokens of one forward pass, E input entries of a projection, W windows, T tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from bernprune.models.hooks import hooked

POINTS = ("output", "down")


class RunningMoments:
    """Running moments of what enters, or leaves, one projection, float64 ``[E]`` on the CPU."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._sum_E = torch.zeros(width, dtype=torch.float64)
        self._squares_E = torch.zeros(width, dtype=torch.float64)

    def add(self, x_NE: torch.Tensor) -> None:
        # Sums of one batch are exact enough in float32; adding up many batches is not.
        x_NE = x_NE.to(torch.promote_types(x_NE.dtype, torch.float32))
        self._sum_E += x_NE.sum(0).double().cpu()
        self._squares_E += x_NE.square().sum(0).double().cpu()
        self.count += len(x_NE)

    @property
    def mean_E(self) -> torch.Tensor:
        return self._sum_E / self.count

    @property
    def second_moment_E(self) -> torch.Tensor:
        return self._squares_E / self.count

    @property
    def variance_E(self) -> torch.Tensor:
        return (self.second_moment_E - self.mean_E.square()).clamp(min=0)


def weights_by_stream(*streams_RTD: torch.Tensor) -> torch.Tensor:
    """What an error counts at each token, ``[R, T]``: 1 over the sum of the mean squares of its residual streams.

    Every branch reads the stream through a norm, so errors count as shares of it. Language models give some tokens,
    such as the first, streams a thousand times as large as the others', and take that back in the end (massive
    activations; Sun et al., 2024, arXiv 2402.17762): with plain squares, fits would go by those tokens alone. A token
    whose streams are all zero, as of padding, counts nothing: there is nothing to have a share of.
    """
    wide = torch.promote_types(streams_RTD[0].dtype, torch.float32)
    sizes_RT = torch.stack([stream_RTD.to(wide).square().mean(-1) for stream_RTD in streams_RTD]).sum(0)
    nothing_RT = sizes_RT == 0
    weights_RT = 1 / sizes_RT.clamp(min=torch.finfo(wide).tiny).masked_fill(nothing_RT, 1)
    return weights_RT.masked_fill(nothing_RT & ~nothing_RT.all(), 0)  # if all are, they count alike


class Gram:
    """Running second moments of a projection's inputs with one another, float64 ``[E, E]`` on its device."""

    def __init__(self, projection: nn.Linear) -> None:
        size, device = projection.in_features, projection.weight.device
        self._total_EE, self._weight = torch.zeros(size, size, dtype=torch.float64, device=device), 0.0

    def hook(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """A forward hook, by which all tokens count alike."""
        self.add(inputs[0])

    def add(self, x_RTE: torch.Tensor, weights_RT: torch.Tensor | None = None) -> None:
        """Add tokens, each as often as its weight says; by default once."""
        # Products of one batch are exact enough in float32; adding up many batches is not.
        x_RTE = x_RTE.to(torch.promote_types(x_RTE.dtype, torch.float32))
        if weights_RT is not None:
            x_RTE = x_RTE * weights_RT.to(x_RTE.dtype).sqrt()[..., None]
        x_NE = x_RTE.flatten(0, -2)
        self._total_EE += x_NE.T @ x_NE
        self._weight += len(x_NE) if weights_RT is None else weights_RT.sum(dtype=torch.float64).item()

    @property
    def mean_EE(self) -> torch.Tensor:
        return self._total_EE / self._weight


@contextmanager
def moments(
    inputs: Mapping[str, nn.Linear], outputs: Mapping[str, nn.Linear] | None = None
) -> Iterator[dict[str, RunningMoments]]:
    """For the length of the block, gather what enters some projections, and what leaves others, by their names."""
    with ExitStack() as hooks:
        gathered = {}
        for name, projection in inputs.items():
            entering = gathered[name] = RunningMoments(projection.in_features)
            hooks.enter_context(hooked((projection, _recorder(entering.add))))
        for name, projection in (outputs or {}).items():
            leaving = gathered[name] = RunningMoments(projection.out_features)
            hooks.enter_context(hooked((projection, _recorder(leaving.add, of_output=True))))
        yield gathered


def _recorder(add: Callable[[torch.Tensor], None], *, of_output: bool = False) -> Any:
    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        add((output if of_output else inputs[0]).flatten(0, -2))

    return record
