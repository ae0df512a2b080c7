"""Weights for a policy: those that are right on average over the masks that it draws, before anything is decided.

A search whose masks run on the dense model's weights learns what units are worth to survivors that do not know of their
loss, and after a repair they do. With weights that are fitted to the policy itself, what survivors can make up for
costs nothing already while it is learned; as the policy decides itself, they become what ridge regression gives for
its selection.

Letters: U units, N those of one branch, E = N * C inputs of its last projection, D its outputs.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from bernprune.errors import ModelError, prefixed
from bernprune.models.hooks import hooked
from bernprune.models.statistics import Gram, weights_by_stream
from bernprune.models.streaming import LayerStream
from bernprune.models.view import ModelView
from bernprune.names import Kind
from bernprune.progress import followed
from bernprune.repair.closed import factor
from bernprune.repair.weights import Weights, put

logger = logging.getLogger(__name__)

_RIDGE = 0.01  # of the mean square of an input
_OUT: dict[Kind, str] = {"kv_group": "attention output", "channel": "down"}  # projections out of units


def expected_fit(weight_DE: torch.Tensor, gram_EE: torch.Tensor, probs_N: torch.Tensor, ridge: float) -> torch.Tensor:
    """The weights W' with the least E|W x - W'(m * x)|^2 + r|W' - W|^2, over inputs and masks, ``[D, E]``.

    Units are kept independently of each other, each with its probability p; that masks of a search may swing together
    is left out. With S = E[xx'], M = E[mm'] and P = diag(p) of the inputs, W' = (W S P + r W)(S * M + r)^-1. Where
    every p is 0 or 1, that is ridge regression of what the removed inputs gave on the kept ones (LIAR, 2024, arXiv
    2407.13331); in between, the penalty that drop-out comes to (Wager, Wang and Liang, 2013, arXiv 1307.1493) is on
    top.

    Args:
        gram_EE: S, of the dtype that is computed in.
        probs_N: of units with equally many adjacent inputs.
        ridge: r, relative to the mean of the diagonal of S.
    """
    probs_E = probs_N.to(gram_EE).repeat_interleave(len(gram_EE) // len(probs_N))
    together_EE = torch.outer(probs_E, probs_E)
    width = len(gram_EE) // len(probs_N)
    blocks_CCN = together_EE.view(len(probs_N), width, len(probs_N), width).diagonal(dim1=0, dim2=2)
    blocks_CCN.copy_(probs_N.to(gram_EE).expand_as(blocks_CCN))  # inputs of one unit are kept together
    weight_DE, mean = weight_DE.to(gram_EE), gram_EE.diagonal().mean()
    if mean == 0:  # what is always zero may be read by any weight
        return weight_DE.clone()
    damping = ridge * mean
    matrix_EE = gram_EE * together_EE
    matrix_EE.diagonal().add_(damping)
    wanted_DE = weight_DE @ (gram_EE * probs_E) + damping * weight_DE
    solved_ED: torch.Tensor = torch.cholesky_solve(wanted_DE.T, factor(matrix_EE))
    return solved_ED.T


@dataclass(frozen=True)
class _Place:
    """The last projection of a branch, the units that it reads, and what enters it in the dense model."""

    name: str
    projection: nn.Linear
    units: slice
    gram_EE: torch.Tensor  # on the CPU


class ExpectedWeights:
    """The weights of a model's last projections, written for one policy after another, and given back at the end.

    They are fitted to what enters in the dense model: errors that add up on the way are left to the repair. Those of a
    token count as shares of its residual stream (``weights_by_stream``).
    """

    def __init__(self, view: ModelView, windows_WT: torch.Tensor, *, rows_per_forward: int) -> None:
        """Takes one pass over the windows, int64.

        Raises:
            ModelError: projections that are not plain, or activations that are not finite.
        """
        if view.opaque is not None:
            raise ModelError(f"weights can only be fitted to a policy where they are plain, but {view.opaque}")
        self._places = list(_places(view, windows_WT, rows_per_forward))
        self._originals = Weights(place.projection for place in self._places)
        self._on_cpu = False  # from when a GPU was full

    def fit(self, probs_U: torch.Tensor) -> None:
        """Write the weights for masks that keep units with these probabilities."""
        for place in self._places:
            weight_DE, bias_D = self._originals.of(place.projection)
            put(place.projection, self._fitted(place, weight_DE, probs_U), bias_D)

    def _fitted(self, place: _Place, weight_DE: torch.Tensor, probs_U: torch.Tensor) -> torch.Tensor:
        device = torch.device("cpu") if self._on_cpu else place.projection.weight.device
        try:
            gram_EE, probs_N = place.gram_EE.to(device), probs_U[place.units].to(device)
            with prefixed(f"{place.name} cannot be fitted", ModelError):
                return expected_fit(weight_DE.to(device), gram_EE, probs_N, _RIDGE)
        except torch.OutOfMemoryError:  # of a GPU, and fewer rows would not help
            if self._on_cpu:
                raise
            logger.warning("the GPU has no room to fit weights to the policy: it is done on the CPU, which takes long")
            self._on_cpu = True
        return self._fitted(place, weight_DE, probs_U)

    def undo(self) -> None:
        """Give the model back the weights that it had, to the bit, and all memory."""
        self._originals.put_back()
        self._originals, self._places = Weights(), []


@torch.no_grad()
def _places(view: ModelView, windows_WT: torch.Tensor, rows_per_forward: int) -> Iterator[_Place]:
    stream = LayerStream(view, windows_WT, rows_per_forward=rows_per_forward)
    for index, layer in enumerate(followed(view.layers, "weights for the policy", unit="layer")):
        found = [
            (f"the {name} projection of layer {index}", projection, units, Gram(projection))
            for projection, (kind, name) in zip((layer.output, layer.down), _OUT.items(), strict=True)
            if (units := view.space.span(kind, index)) is not None
        ]
        with _counted_by_stream(layer.layer, {projection: gram for _, projection, _, gram in found}):
            stream.advance()
        for name, projection, units, gram in found:
            gram_EE = gram.mean_EE
            if not gram_EE.isfinite().all():
                raise ModelError(f"activations of layer {index} are not finite on the calibration text")
            precise = torch.promote_types(projection.weight.dtype, torch.float32)
            yield _Place(name, projection, units, gram_EE.to("cpu", precise))


@contextmanager
def _counted_by_stream(layer: nn.Module, grams: Mapping[nn.Module, Gram]) -> Iterator[None]:
    """For the length of the block, gather what enters projections of a layer, by the stream before and after it."""
    entered: dict[nn.Module, torch.Tensor] = {}

    def enter(projection: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        entered[projection] = inputs[0]

    def leave(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        weights_RT = weights_by_stream(inputs[0], output)
        for projection, gram in grams.items():
            gram.add(entered.pop(projection), weights_RT)

    with hooked(*((projection, enter) for projection in grams), (layer, leave)):
        yield
