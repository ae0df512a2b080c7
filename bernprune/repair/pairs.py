"""The same text on its way through the dense model and through the pruned one, layer by layer.

Letters: R rows of one forward pass, T tokens, D hidden size, A kept inputs of a projection.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from bernprune.errors import ModelError
from bernprune.models.hooks import hooked
from bernprune.models.statistics import weights_by_stream
from bernprune.models.streaming import LayerStream
from bernprune.models.view import ModelView
from bernprune.names import TargetName
from bernprune.repair.moments import Moments
from bernprune.repair.places import Place


class Pair:
    """Windows before a layer, as the dense model sees them and as the repaired one does; they rest on the CPU.

    For each layer: ``enter`` while it is still what it was, then whatever is asked and changed, then ``leave``.
    """

    def __init__(self, view: ModelView, windows_WT: torch.Tensor, *, rows_per_forward: int) -> None:
        self._device = view.device
        self._dense, self._pruned = (
            LayerStream(view, windows_WT, rows_per_forward=rows_per_forward) for _ in ("dense", "pruned")
        )
        self._before: list[list[torch.Tensor]] = []  # for each branch, the dense residual stream, pass by pass
        self._after: Sequence[torch.Tensor] = ()  # the dense residual stream after the last branch

    def enter(self, places: Sequence[Place]) -> None:
        """Take the dense windows through the layer."""
        self._before = [[] for _ in places]

        def note(at: int) -> Callable[..., None]:
            def noting(norm: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                self._before[at].append(inputs[0].cpu())

            return noting

        with hooked(*((place.norm, note(at)) for at, place in enumerate(places))):
            self._dense.advance()
        self._after = list(self._dense.hidden_RTD)

    def leave(self) -> None:
        """Take the other windows through the layer, as it is now."""
        self._pruned.advance()

    def last(self, place: Place, inputs_A: torch.Tensor, target: TargetName) -> Moments:
        """Moments of what the branch's last projection takes in now, and of what it should give.

        Args:
            inputs_A: which of its inputs.
            target: ``own``: what it gives on these very inputs; ``dense``: what it gives in the dense model;
                ``residual``: what makes the residual stream that of the dense model, where a token's errors count as
                shares of that stream and of what the pruned model makes of it (``weights_by_stream``), which may be
                massive where the dense one is not; otherwise all tokens count alike, as published.

        Raises:
            ModelError: not all of it is finite.
        """
        at = int(place.branch == "ffn")
        before, after = self._before[at], self._after if at else self._before[1]
        arriving: list[torch.Tensor] = []
        passes = iter(zip(before, after, strict=True))
        found = Moments(len(inputs_A), place.last.out_features, self._device)
        inputs_A = inputs_A.to(self._device)

        def arrive(norm: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            arriving[:] = inputs

        def gather(last: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            before_RTD, after_RTD = (dense_RTD.to(self._device) for dense_RTD in next(passes))
            wanted = {
                "own": lambda: output,
                "dense": lambda: after_RTD - before_RTD,
                "residual": lambda: after_RTD - arriving[0],
            }
            weights = None
            if target == "residual":
                weights = weights_by_stream(before_RTD, after_RTD, arriving[0] + output).flatten()
            found.add(inputs[0].flatten(0, -2)[:, inputs_A], wanted[target]().flatten(0, -2), weights)

        with hooked((place.norm, arrive), (place.last, gather)):
            self._pruned.run(until=place.last)
        return _finite(found, place)

    def first(self, place: Place, dense_DA: torch.Tensor) -> Moments:
        """Moments of what the branch takes in now, and of what its projections ``dense_DA`` give in the dense model.

        Without biases: those of keys may be hundreds of times as large as all else, which would then be rounded away.
        """
        before = iter(self._before[int(place.branch == "ffn")])
        found = Moments(dense_DA.shape[1], dense_DA.shape[0], self._device)

        def gather(norm: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            normed_RTD = norm.forward(next(before).to(self._device))  # which calls no hook, such as this one
            wanted_RTD = F.linear(normed_RTD, dense_DA)
            found.add(output.flatten(0, -2), wanted_RTD.flatten(0, -2))

        with hooked((place.norm, gather)):
            self._pruned.run(until=place.norm)
        return _finite(found, place)


def _finite(found: Moments, place: Place) -> Moments:
    if not found.finite:
        raise ModelError(
            f"activations at {place.name} are not finite on the calibration text, so it cannot be repaired; another "
            "model.dtype may do, or repair.method 'none'"
        )
    return found
