"""Back-propagation layer by layer: no more than one layer's activations of a few rows, and one layer's gradients.

A first pass notes what enters each layer, on the CPU, W * T * D numbers a layer; then each layer is run once more, from
the last to the first, and gradients go back through it (checkpointing, Chen et al., 2016).

Letters: R rows of one pass, W windows, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from bernprune.errors import ModelError
from bernprune.losses import token_losses
from bernprune.models.streaming import LayerStream
from bernprune.models.view import ModelView

Dress = Callable[[int], AbstractContextManager[object]]  # what is done to a layer while it runs, by its index


class BackwardStream:
    """Gradients of the mean loss over all predictions, on their way back through a model.

    Args:
        windows_WT: int64.
        rows_per_forward: windows that are run at once.
        dress: what is done to each layer for the length of its passes, such as to change its weights.
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
        predictions = windows_WT[:, 1:].numel()
        tokens = windows_WT.split(rows_per_forward)
        pairs = zip(self._stream.hidden_RTD, tokens, strict=True)
        self._upstream = [self._of_head(hidden_RTD, tokens_RT, predictions) for hidden_RTD, tokens_RT in pairs]

    def back(self, after: Callable[[], None] | None = None) -> None:
        """Go through the next layer from the end: ``grad`` of what asks for it grows; ``after`` follows each pass."""
        index, inputs = len(self._inputs) - 1, self._inputs.pop()
        for at, hidden_RTD in enumerate(inputs):
            hidden_RTD = hidden_RTD.to(self._device).requires_grad_()
            with self._dress(index), torch.enable_grad():
                told = self._stream.told(index, len(hidden_RTD))
                output_RTD = self._view.layers[index].layer(hidden_RTD, **told)
            output_RTD.backward(self._upstream[at].to(self._device))
            assert hidden_RTD.grad is not None
            self._upstream[at] = hidden_RTD.grad.cpu()
            if after is not None:
                after()

    def _of_head(self, hidden_RTD: torch.Tensor, tokens_RT: torch.Tensor, predictions: int) -> torch.Tensor:
        """The gradient at what leaves the last layer."""
        hidden_RTD = hidden_RTD.to(self._device).requires_grad_()
        with torch.enable_grad():
            last_RTD = getattr(self._view.decoder, self._view.family.final_norm)(hidden_RTD)
            losses = token_losses(self._view.model.get_output_embeddings(), last_RTD, tokens_RT.to(self._device))
            (losses.sum() / predictions).backward()
        assert hidden_RTD.grad is not None
        return hidden_RTD.grad.cpu()


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
