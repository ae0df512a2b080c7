"""A model run layer by layer over many windows: what is gathered of a layer can be used, and dropped, before the next.

Whatever is done to a layer before the stream moves on, masking it or changing its weights, the layers behind it see.

Letters: W windows, T tokens, R rows of one forward pass, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from bernprune.models.forwards import forwarding
from bernprune.models.view import LayerView, ModelView


class LayerStream:
    """All windows, on their way through a model; they rest on the CPU.

    Args:
        windows_WT: int64.
        rows_per_forward: windows that are run at once.

    Attributes:
        index: number of the layer that comes next.
        hidden_RTD: what enters it, of all windows, on the CPU; one tensor a pass.
    """

    def __init__(self, view: ModelView, windows_WT: torch.Tensor, *, rows_per_forward: int) -> None:
        self._view, self.index = view, 0
        self._device = view.device
        self._calls: dict[int, list[dict[str, Any]]] = {}  # what layers take besides hidden states, by rows
        self.hidden_RTD = [self._embed(tokens_RT) for tokens_RT in windows_WT.split(rows_per_forward)]

    @property
    def layer(self) -> LayerView:
        """The layer that comes next."""
        return self._view.layers[self.index]

    def run(self, until: nn.Module | None = None) -> None:
        """Run the next layer, or as far as one of its modules, for the sake of hooks, and stay before it."""
        with ExitStack() as hooked:
            if until is not None:
                hooked.callback(until.register_forward_hook(_stop).remove)
            for hidden_RTD in self.hidden_RTD:
                with suppress(_FarEnough):
                    self._through(hidden_RTD)

    def advance(self) -> None:
        """Go through the next layer, as it is now."""
        for at, hidden_RTD in enumerate(self.hidden_RTD):
            self.hidden_RTD[at] = self._through(hidden_RTD).cpu()
        self.index += 1

    @torch.no_grad()
    def _through(self, hidden_RTD: torch.Tensor) -> torch.Tensor:
        return self.layer.layer(hidden_RTD.to(self._device), **self.layer_arguments(self.index, len(hidden_RTD)))

    def layer_arguments(self, layer: int, rows: int) -> dict[str, Any]:
        """What a layer is given besides the hidden states of so many rows: positions and masks."""
        return self._calls[rows][layer]

    @torch.no_grad()
    def _embed(self, tokens_RT: torch.Tensor) -> torch.Tensor:
        """What the first layer takes in. Windows have no padding, so equally many rows take the same arguments."""
        calls: list[tuple[torch.Tensor, dict[str, Any]]] = []
        with _passed_over(self._view, lambda hidden_RTD, arguments: calls.append((hidden_RTD, arguments))):
            self._view.decoder(input_ids=tokens_RT.to(self._device), use_cache=False)
        self._calls.setdefault(len(tokens_RT), [arguments for _, arguments in calls])
        return calls[0][0].cpu()


class _FarEnough(Exception):
    """Ends a pass in which nobody looks at what follows."""


def _stop(module: nn.Module, inputs: Any, output: Any) -> None:
    raise _FarEnough


@contextmanager
def _passed_over(view: ModelView, note: Callable[[torch.Tensor, dict[str, Any]], None]) -> Iterator[None]:
    """Let every layer hand on what it is given, once that is noted."""

    def hand_on(hidden_RTD: torch.Tensor, **arguments: Any) -> torch.Tensor:
        note(hidden_RTD, arguments)
        return hidden_RTD

    with ExitStack() as passed:
        for layer in view.layers:
            passed.enter_context(forwarding(layer.layer, hand_on))
        yield
