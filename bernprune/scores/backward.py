"""Back-propagation layer by layer: no more than one layer's activations of a few rows, and one layer's gradients.

A first pass notes what enters each layer, on the CPU, W * T * D numbers a layer; then each layer is run once more, from
the last to the first, and gradients go back through it (checkpointing, Chen et al., 2016).

Letters: R rows of one pass, W windows, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bernprune.errors import ModelError
from bernprune.losses import power_of_two, scale_of_mean, token_losses
from bernprune.models.streaming import LayerStream
from bernprune.models.view import ModelView
from bernprune.scores.base import not_finite

Dress = Callable[[int], AbstractContextManager[object]]  # what is done to a layer while it runs, by its index


class BackwardStream:
    """Gradients of the mean loss over all predictions, on their way back through a model.

    What goes back is the gradient of each pass's own mean, between layers times a power of two by which its largest
    number is near one: numbers of 16 bits are too coarse for those of a mean over many tokens, and float16 has none so
    small. What is added up over passes is weighted by their shares.

    Args:
        windows_WT: int64.
        rows_per_forward: windows that are run at once.
        dress: what is done to each layer for the length of its passes, such as to change its weights.

    Raises:
        ModelError: activations that are not finite.
    """

    def __init__(
        self, view: ModelView, windows_WT: torch.Tensor, *, rows_per_forward: int, dress: Dress | None = None
    ) -> None:
        self._view, self._dress = view, dress or (lambda index: nullcontext())
        self._device = view.device
        self._stream = LayerStream(view, windows_WT, rows_per_forward=rows_per_forward)
        self._inputs: list[list[torch.Tensor]] = []
        for index in range(len(view.layers)):
            self._inputs.append(list(self._stream.hidden_RTD))
            with self._dress(index):
                self._stream.advance()
            if not all(bool(hidden_RTD.isfinite().all()) for hidden_RTD in self._stream.hidden_RTD):
                raise not_finite(index)
        tokens = windows_WT.split(rows_per_forward)
        self._shares = [len(tokens_RT) / len(windows_WT) for tokens_RT in tokens]
        pairs = zip(self._stream.hidden_RTD, tokens, strict=True)
        self._upstream = [self._of_head(hidden_RTD, tokens_RT) for hidden_RTD, tokens_RT in pairs]

    def back(self, leaves: Sequence[torch.Tensor], *, squares: bool = False) -> "Gradients":
        """Go through the next layer from the end, for gradients by ``leaves``, which ask for them."""
        index, inputs = len(self._inputs) - 1, self._inputs.pop()
        found = Gradients.zero(leaves, squares=squares)
        for at, hidden_RTD in enumerate(inputs):
            hidden_RTD = hidden_RTD.to(self._device).requires_grad_()
            with self._dress(index), torch.enable_grad():
                arguments = self._stream.layer_arguments(index, len(hidden_RTD))
                output_RTD = self._view.layers[index].layer(hidden_RTD, **arguments)
            arriving = self._upstream[at]
            output_RTD.backward(arriving.grad_RTD.to(self._device))
            self._upstream[at] = _Scaled.of(hidden_RTD, arriving.scale)
            found.take(leaves, self._shares[at], arriving.scale)
        return found

    def _of_head(self, hidden_RTD: torch.Tensor, tokens_RT: torch.Tensor) -> "_Scaled":
        """The gradient of a pass's mean loss at what leaves the last layer."""
        scale = scale_of_mean(tokens_RT)
        hidden_RTD = hidden_RTD.to(self._device).requires_grad_()
        with torch.enable_grad():
            last_RTD = getattr(self._view.decoder, self._view.family.final_norm)(hidden_RTD)
            losses = token_losses(self._view.model.get_output_embeddings(), last_RTD, tokens_RT.to(self._device))
            (losses.mean() * scale).backward()
        return _Scaled.of(hidden_RTD, scale)


class _Scaled(NamedTuple):
    """A gradient times a power of two."""

    grad_RTD: torch.Tensor
    scale: float

    @classmethod
    def of(cls, hidden_RTD: torch.Tensor, scale: float) -> "_Scaled":
        """The one that has arrived at some activations, where it is given so large; on the CPU."""
        assert hidden_RTD.grad is not None
        grad_RTD = hidden_RTD.grad.cpu()
        by = 1 / power_of_two(grad_RTD.abs().max().item())
        return cls(grad_RTD * by, scale * by)


@dataclass(frozen=True)
class Gradients:
    """Sums over passes, weighted by their shares, float32 at least: gradients of the mean loss by some leaves and, if
    asked for, the mean of the passes' squared ones."""

    grads: list[torch.Tensor]
    squares: list[torch.Tensor] | None

    @classmethod
    def zero(cls, leaves: Sequence[torch.Tensor], *, squares: bool) -> "Gradients":
        def zeros() -> list[torch.Tensor]:
            return [torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)) for leaf in leaves]

        return cls(zeros(), zeros() if squares else None)

    def take(self, leaves: Sequence[torch.Tensor], share: float, scale: float) -> None:
        """Add the leaves' own gradients, which they have no longer; they are given times ``scale``."""
        for at, leaf in enumerate(leaves):
            assert leaf.grad is not None
            grad = leaf.grad.to(self.grads[at].dtype)
            self.grads[at].add_(grad, alpha=share / scale)
            if self.squares is not None:
                self.squares[at].addcmul_(grad, grad, value=share / scale**2)
            leaf.grad = None


@contextmanager
def asking_for_gradients(view: ModelView, weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """For the length of the block, these weights alone ask for gradients; afterwards all is as it was.

    Raises:
        ModelError: weights that are not floating-point numbers, as of quantised models.
    """
    odd = next((weight.dtype for weight in weights if not weight.is_floating_point()), None)
    if odd is not None:
        raise ModelError(f"gradients need weights in floating point, but the model has some in {odd}")
    parameters = list(view.model.parameters())
    asked = [parameter.requires_grad for parameter in parameters]
    kept = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, before, grad in zip(parameters, asked, kept, strict=True):
            parameter.requires_grad_(before)
            parameter.grad = grad
