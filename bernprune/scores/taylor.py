"""Taylor: how much the loss would change to first or second order if a unit's weights went (Ma, Fang and Wang, 2023,
LLM-Pruner, arXiv 2305.11627, and its released code). It back-propagates, layer by layer.

For every row (q, k, v, gate, up) or column (o, down) that belongs to a unit, ``vector`` takes the absolute value of the
sum of w g, ``element`` the sum of the absolute values, and ``second`` the sum of |w g - 1/2 w^2 F|, with F the mean
over windows of their squared gradients; a unit has the total. Biases are left out, as released.

The authors remove the same share of each layer but the first and last ones, which they spare; ``initial.allocation:
uniform`` does so but for the sparing. As these are estimates of one loss, here all units compete by default, each by
its estimate a parameter.

Letters: O, I rows and columns of a weight, N units of a group, U units.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from bernprune.models.statistics import POINTS
from bernprune.names import Kind
from bernprune.scores.backward import BackwardStream, asking_for_gradients
from bernprune.scores.base import PARTS, Context, Metric
from bernprune.scores.stream import COUPLED, fill, of_parts, of_units, projection_of

Form = Literal["vector", "element", "second"]


@dataclass(frozen=True)
class WeightGradient:
    """A projection's weight, its gradient of the mean loss and, if asked for, the mean over windows of their own
    squared gradients; float32 at least, ``[O, I]``, turned so that the rows of a unit lie side by side."""

    weight_OI: torch.Tensor
    grad_OI: torch.Tensor
    square_OI: torch.Tensor | None


LayerGradients = dict[Kind, list[WeightGradient]]


def layer_gradients(context: Context, *, squares: bool = False) -> Iterator[tuple[int, LayerGradients]]:
    """The index of each layer, from the last to the first, and the gradients of all that belongs to its units.

    Raises:
        ModelError: weights that are not in floating point.
    """
    view = context.view
    weights = [
        {name: projection_of(view, layer, name).weight for names in COUPLED.values() for name in names}
        for layer in view.layers
    ]
    with asking_for_gradients(view, [weight for of_layer in weights for weight in of_layer.values()]):
        rows = 1 if squares else context.rows_per_forward
        stream = BackwardStream(view, context.windows_WT, rows_per_forward=rows)
        for index in reversed(range(len(view.layers))):
            leaves = weights[index]
            gradients = stream.back(list(leaves.values()), squares=squares)
            squared: Sequence[torch.Tensor | None] = gradients.squares or [None] * len(leaves)
            triples = zip(leaves.values(), gradients.grads, squared, strict=True)
            found = {name: _turned(*triple, name=name) for name, triple in zip(leaves, triples, strict=True)}
            yield index, {kind: [found[name] for name in names] for kind, names in COUPLED.items()}


def _turned(
    weight_OI: torch.Tensor, grad_OI: torch.Tensor, square_OI: torch.Tensor | None, *, name: str
) -> WeightGradient:
    weight_OI = weight_OI.detach().to(grad_OI.dtype)
    if name not in POINTS:
        return WeightGradient(weight_OI, grad_OI, square_OI)
    return WeightGradient(weight_OI.T, grad_OI.T, None if square_OI is None else square_OI.T)


def salience(found: WeightGradient, form: Form) -> torch.Tensor:
    """What each row of a weight counts for, ``[O]``."""
    first_OI = found.weight_OI * found.grad_OI
    if form == "vector":
        return first_OI.sum(1).abs()
    if form == "second":
        assert found.square_OI is not None
        first_OI = first_OI - 0.5 * found.weight_OI.square() * found.square_OI
    return first_OI.abs().sum(1)


Estimate = Callable[[list[WeightGradient], int], torch.Tensor]  # of all that belongs to so many units, [N]


def by_gradients(estimate: Estimate, *, squares: bool = False) -> Callable[[Context], torch.Tensor]:
    """A metric of weights and their gradients."""

    def run(context: Context) -> torch.Tensor:
        scores_U = torch.zeros(context.view.space.size, dtype=torch.float64)
        for index, found in layer_gradients(context, squares=squares):
            shape = context.view.layers[index].shape
            counts = {"kv_group": shape.kv_groups, "channel": shape.channels}
            kv_groups_N, channels_N = (estimate(found[kind], counts[kind]) for kind in PARTS)
            fill(context.view, index, of_parts(kv_groups_N, channels_N), scores_U)
        return scores_U

    return run


def _metric(form: Form, about: str) -> Metric:
    def estimate(found: list[WeightGradient], count: int) -> torch.Tensor:
        return of_units([salience(each, form) for each in found], count)

    run = by_gradients(estimate, squares=form == "second")
    return Metric(
        f"taylor-{form}",
        about,
        "Ma, Fang and Wang, 2023",
        run,
        allocation="pooled",
        gradients=True,
        cost_power=1.0,
    )


TAYLOR_VECTOR = _metric("vector", "sizes of the sums of weight times gradient over each row or column of a unit")
TAYLOR_ELEMENT = _metric("element", "sum of the sizes of weight times gradient over a unit")
TAYLOR_SECOND = _metric("second", "the same to second order, with squared gradients of windows for the curvature")
