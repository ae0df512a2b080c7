"""What comes by in whole forward passes, of all layers at once, for tests of what goes layer by layer.

Letters: W windows, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from bernprune.models.statistics import POINTS, RunningMoments, moments
from bernprune.models.view import LayerView, ModelView


@contextmanager
def watching(layers: Sequence[LayerView]) -> Iterator[list[dict[str, RunningMoments]]]:
    """Gather the inputs of both projections of the given layers."""
    with ExitStack() as hooks:
        yield [hooks.enter_context(moments({point: getattr(layer, point) for point in POINTS})) for layer in layers]


@torch.inference_mode()
def run_windows(view: ModelView, windows_WT: torch.Tensor, *, rows_per_forward: int) -> None:
    """Run text through the decoder for the sake of hooks; the output embedding is not touched."""
    device = view.device
    for tokens_RT in windows_WT.split(rows_per_forward):
        view.decoder(input_ids=tokens_RT.to(device), use_cache=False)


def input_statistics(
    view: ModelView, windows_WT: torch.Tensor, *, rows_per_forward: int = 64
) -> list[dict[str, RunningMoments]]:
    """Statistics of every layer in one pass of the dense model; one dict a layer, keys ``output`` and ``down``."""
    with watching(view.layers) as gathered:
        run_windows(view, windows_WT, rows_per_forward=rows_per_forward)
    return gathered
