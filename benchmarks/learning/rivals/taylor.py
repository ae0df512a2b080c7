"""LLM-Pruner's first-order Taylor importance (Ma, Fang and Wang, 2023, arXiv 2305.11627; released code).

The change of the loss when a weight goes is about w * dL/dw. Of every row (q, k, v, gate, up) or column (o, down) that
belongs to a unit, ``vector`` takes the absolute value of the sum and ``element`` the sum of the absolute values; a unit
has the total.

Departures: the calibration windows are those of the other metrics (the paper: 10 of 64 tokens), and no layer is spared.
Uniform is the paper's way; global ranks the units of all layers and kinds by importance per parameter.

Letters: U units, B windows, T tokens, N units of a group, O and I rows and columns of a weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from benchmarks.learning.task import Settings, Task
from bernprune.losses import token_losses
from bernprune.models.view import LayerView, ModelView
from bernprune.names import Kind

_ROWS = 16  # windows of one backward pass


def taylor(task: Task, settings: Settings) -> torch.Tensor:
    """Keep what matters most to first order; ``settings``: ``form``, ``scope``, ``windows`` of calibration."""
    tokens_BT = task.text(settings["windows"])
    task.meter.spend(len(tokens_BT), backward=True)
    importance_U = unit_importance(task.view, tokens_BT, settings["form"])
    if settings["scope"] == "layer":
        return task.select_by(importance_U, "layer")
    return task.select(importance_U / task.budget.costs_U)


def unit_importance(view: ModelView, tokens_BT: torch.Tensor, form: str) -> torch.Tensor:
    """Of every unit, by the gradient of the mean loss over all windows, float64 ``[U]``."""
    importance_U = torch.zeros(view.space.size, dtype=torch.float64)
    with _trainable(view):
        for tokens in tokens_BT.to(view.device).split(_ROWS):
            hidden = view.decoder(input_ids=tokens, use_cache=False).last_hidden_state
            loss = token_losses(view.model.get_output_embeddings(), hidden, tokens).sum()
            (loss / tokens_BT[:, 1:].numel()).backward()
        for index, layer in enumerate(view.layers):
            for kind, rows, column in _coupled(view, layer):
                units_N = importance_U[view.space.span(kind, index)]  # a view
                for salience_OI in [*map(_salience, rows), _salience(column).T]:
                    units_N += _of_units(salience_OI, len(units_N), form)
    return importance_U


def _coupled(view: ModelView, layer: LayerView) -> Iterator[tuple[Kind, list[nn.Linear], nn.Linear]]:
    """Kind, projections whose rows belong to its units, and the one whose columns do."""
    family = view.family
    yield (
        "kv_group",
        [getattr(layer.attention, name) for name in (family.query, family.key, family.value)],
        layer.output,
    )
    yield "channel", [getattr(layer.ffn, name) for name in (family.gate, family.up)], layer.down


def _salience(projection: nn.Linear) -> torch.Tensor:
    gradient_OI = projection.weight.grad
    assert gradient_OI is not None, "no gradient was taken"
    return (projection.weight * gradient_OI).detach().double()


def _of_units(salience_OI: torch.Tensor, count: int, form: str) -> torch.Tensor:
    """Rows to units, ``[N]``: the rows of a unit lie side by side."""
    rows_O = salience_OI.sum(1).abs() if form == "vector" else salience_OI.abs().sum(1)
    return rows_O.view(count, -1).sum(1)


@contextmanager
def _trainable(view: ModelView) -> Iterator[None]:
    """Let the coupled projections gather gradients, and forget them afterwards."""
    projections = [
        projection
        for layer in view.layers
        for _, rows, column in _coupled(view, layer)
        for projection in (*rows, column)
    ]
    try:
        for projection in projections:
            projection.weight.requires_grad_(True)
        yield
    finally:
        for projection in projections:
            projection.weight.requires_grad_(False)
            projection.weight.grad = None
