"""IFSO: what the loss loses when a unit goes and survivors re-adjust (Cheng, Zhang and Shi, 2024, arXiv 2308.06755).

With gates m and weights w that stay at their optimum, dw/dm = -H_ww^-1 H_wm, and the change of the loss differs from
that with frozen weights by the products of second derivatives H_mw H_ww^-1 H_wm. Here is, as released, their size for
all gates at once, |H_mw H_wm 1|, with a number in place of the inverse, which changes no rank; both products are
differences of gradients, a hundredth of the vector's length apart. The weights that may re-adjust are those of the
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
from bernprune.models.statistics import POINTS
from bernprune.models.view import ModelView
from bernprune.scores.backward import BackwardStream, asking_for_gradients
from bernprune.scores.base import Context, Metric
from bernprune.scores.stream import fill, of_parts

_LENGTH = 0.01  # of a step, over that of the vector

Vectors = list[dict[str, torch.Tensor]]  # of each layer, by the name of the projection


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
    step = _LENGTH / max(1e-300, math.sqrt(sum(v.square().sum().item() for each in toward for v in each.values())))
    products = _difference(step, lambda moved: gradients_of_gates(context, toward, moved))
    scores_U = torch.zeros(view.space.size, dtype=torch.float64)
    for index, product in enumerate(products):
        fill(view, index, of_parts(product["output"].abs(), product["down"].abs()), scores_U)
    return scores_U


def _difference(step: float, gradients: Callable[[float], Vectors]) -> Vectors:
    """(gradients(step) - gradients(-step)) / (2 step)."""
    above, below = gradients(step), gradients(-step)
    pairs = zip(above, below, strict=True)
    return [{point: (one[point] - other[point]) / (2 * step) for point in POINTS} for one, other in pairs]


def weight_gradients(context: Context, gate: float) -> Vectors:
    """Gradients of the mean loss by the output and down projections' weights, on the CPU, all gates at ``gate``."""
    view = context.view
    weights = [{point: getattr(layer, point).weight for point in POINTS} for layer in view.layers]
    gates = [{point: torch.full((1,), gate) for point in POINTS} for _ in view.layers]
    found: Vectors = []
    with asking_for_gradients(view, [weight for each in weights for weight in each.values()]):
        stream = BackwardStream(
            view,
            context.windows_WT,
            rows_per_forward=context.rows_per_forward,
            dress=lambda index: _dressed(view, index, gates),
        )
        for each in reversed(weights):
            stream.back()
            found.insert(0, {point: _grad(weight) for point, weight in each.items()})
            for weight in each.values():
                weight.grad = None
    return found


def gradients_of_gates(context: Context, toward: Vectors, moved: float) -> Vectors:
    """Gradients of the mean loss by units' gates, ``[N]`` on the CPU, weights ``moved`` so far along ``toward``."""
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
        for _ in view.layers:
            stream.back()
    return [{point: _grad(gate_N) for point, gate_N in each.items()} for each in gates]


def _grad(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad.double().cpu()


@contextmanager
def _dressed(
    view: ModelView, index: int, gates: Vectors, toward: Vectors | None = None, moved: float = 0.0
) -> Iterator[None]:
    """For the length of the block, what a layer's projections read passes gates, and their weights are moved."""
    with ExitStack() as undone:
        for point in POINTS:
            projection: nn.Linear = getattr(view.layers[index], point)
            gate_N = gates[index][point].to(projection.weight)
            gate_E = gate_N.repeat_interleave(projection.in_features // len(gate_N))
            along_DE = None if toward is None else toward[index][point]
            projection.__dict__["forward"] = _gated(projection, gate_E, along_DE, moved)
            undone.callback(projection.__dict__.pop, "forward")
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
