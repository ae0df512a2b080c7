"""IFSO: what the loss loses when a unit goes and survivors re-adjust (Cheng, Zhang and Shi, 2024, arXiv 2308.06755).

With gates m and weights w that stay at their optimum, dw/dm = -H_ww^-1 H_wm, and the change of the loss differs from
that with frozen weights by the products of second derivatives H_mw H_ww^-1 H_wm. Here is, as released, their size for
all gates at once, |H_mw H_wm 1|, with a number in place of the inverse, which changes no rank; both products are
differences of gradients, a hundredth away along the vector either way. The weights that may re-adjust are those of the
attention output and FFN down projections, and the text is one batch; released, all weights, and a mean over batches.

Letters: D output width of a projection, E its inputs, R rows, T tokens, N units, U units of the model.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bernprune.errors import ModelError
from bernprune.models.forwards import forwarding
from bernprune.models.statistics import POINTS
from bernprune.models.view import ModelView
from bernprune.scores.backward import BackwardStream, asking_for_gradients
from bernprune.scores.base import Context, Metric
from bernprune.scores.stream import fill, of_parts

_LENGTH = 0.01  # of a step, over that of the vector

Vector = dict[str, torch.Tensor]  # of a layer, by the name of the projection


def _needs_precision(view: ModelView, windows_WT: torch.Tensor) -> None:
    if view.model.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"score 'ifso' takes small differences of gradients, which {view.model.dtype} cannot hold; use model.dtype "
            "float32, or another score"
        )


def _ifso(context: Context) -> torch.Tensor:
    view = context.view
    step = _LENGTH / math.sqrt(sum(layer.shape.kv_groups + layer.shape.channels for layer in view.layers))
    toward = _difference(step, lambda moved: weight_gradients(context, 1 + moved))
    length = math.hypot(*(_length(v) for each in toward for v in each.values()))
    step = _LENGTH / length if length else 1.0  # along nothing
    products = _difference(step, lambda moved: gradients_of_gates(context, toward, moved))
    scores_U = torch.zeros(view.space.size, dtype=torch.float64)
    for index, product in enumerate(products):
        fill(view, index, of_parts(product["output"].abs(), product["down"].abs()), scores_U)
    return scores_U


def _difference(step: float, gradients: Callable[[float], Iterator[Vector]]) -> list[Vector]:
    """(gradients(step) - gradients(-step)) / (2 step) of each layer; gradients come from the last layer on."""
    found = list(gradients(step))
    for above, below in zip(found, gradients(-step), strict=True):  # a layer at a time: they are as large as weights
        for point in POINTS:
            above[point].sub_(below[point]).div_(2 * step)
    return found[::-1]


def _length(vector: torch.Tensor) -> float:
    return torch.linalg.vector_norm(vector, dtype=torch.float64).item()


def weight_gradients(context: Context, gate: float) -> Iterator[Vector]:
    """Gradients of the mean loss by the output and down projections' weights, on the CPU, all gates at ``gate``; of one
    layer after the other, from the last on."""
    view = context.view
    weights = [{point: getattr(layer, point).weight for point in POINTS} for layer in view.layers]
    gates = [{point: torch.full((1,), gate) for point in POINTS} for _ in view.layers]
    with asking_for_gradients(view, [weight for each in weights for weight in each.values()]):
        stream = BackwardStream(
            view,
            context.windows_WT,
            rows_per_forward=context.rows_per_forward,
            dress=lambda index: _dressed(view, index, gates),
        )
        for each in reversed(weights):
            yield _gradients(stream, each)


def gradients_of_gates(context: Context, toward: list[Vector], moved: float) -> Iterator[Vector]:
    """Gradients of the mean loss by units' gates, ``[N]`` on the CPU, weights ``moved`` so far along ``toward``; of one
    layer after the other, from the last on."""
    view = context.view
    gates = [
        {
            "output": torch.ones(layer.shape.kv_groups, device=layer.output.weight.device, requires_grad=True),
            "down": torch.ones(layer.shape.channels, device=layer.down.weight.device, requires_grad=True),
        }
        for layer in view.layers
    ]
    with asking_for_gradients(view, []):
        stream = BackwardStream(
            view,
            context.windows_WT,
            rows_per_forward=context.rows_per_forward,
            dress=lambda index: _dressed(view, index, gates, toward, moved),
        )
        for each in reversed(gates):
            yield _gradients(stream, each)


def _gradients(stream: BackwardStream, leaves: Vector) -> Vector:
    """Those of the layer that comes next, on the CPU."""
    found = stream.back(list(leaves.values()))
    return {point: grad.cpu() for point, grad in zip(leaves, found.grads, strict=True)}


@contextmanager
def _dressed(
    view: ModelView, index: int, gates: list[Vector], toward: list[Vector] | None = None, moved: float = 0.0
) -> Iterator[None]:
    """For the length of the block, what a layer's projections read passes gates, and their weights are moved."""
    with ExitStack() as undone:
        for point in POINTS:
            projection: nn.Linear = getattr(view.layers[index], point)
            gate_N = gates[index][point].to(projection.weight)
            gate_E = gate_N.repeat_interleave(projection.in_features // len(gate_N))
            along_DE = None if toward is None else toward[index][point]
            undone.enter_context(forwarding(projection, _gated(projection, gate_E, along_DE, moved)))
        yield


def _gated(projection: nn.Linear, gate_E: torch.Tensor, along_DE: torch.Tensor | None, moved: float) -> Any:
    def forward(x_RTE: torch.Tensor) -> torch.Tensor:
        weight_DE = (
            projection.weight if along_DE is None else projection.weight + moved * along_DE.to(projection.weight)
        )
        return F.linear(x_RTE * gate_E, weight_DE, projection.bias)

    return forward


IFSO = Metric(
    "ifso",
    "how the loss's slope by a gate moves as weights re-adjust, from differences of gradients",
    "Cheng, Zhang and Shi, 2024",
    _ifso,
    allocation="pooled",
    passes=lambda layers, options: 4.0,
    gradients=True,
    cost_power=0.5,
    needs=_needs_precision,
)
