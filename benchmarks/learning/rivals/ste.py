"""GRASPrune's projected straight-through gates (2026, arXiv 2604.19398; released code): back-propagation into gates.

Every step keeps the units of largest p = sigmoid(g / 1.5) that fit into the budget, runs the model under that hard
mask, and passes the gradient straight through: z = m + p - stop(p), so dz/dg = dp/dg. AdamW moves g.

Departures: g starts in the order of Wanda-sp within each kind and layer (the code: all equal). The rate is given as
``travel``, how far a gate moves in the whole run if it always moves one way, and falls to zero along a line; or as the
code's, 0.01 throughout, in steps of four windows. kv groups are gated where they are read (the code: at keys and
values). No scales are learned and folded in afterwards: no method here changes a weight.

Letters: U units.
"""

import torch

from benchmarks.learning.rivals.gradients import learning_rates
from benchmarks.learning.task import Settings, Task
from bernprune.policy.bernoulli import graded

_TAU = 1.5


def ste(task: Task, settings: Settings) -> torch.Tensor:
    """Keep what the last gates keep.

    Args:
        settings: ``travel`` or ``rate``, ``windows`` of a step, and ``order``: by ``p``, or by p per parameter,
            ``cost``.
    """
    scores_U = task.scores()
    costs_U = task.budget.costs_U / task.budget.costs_U.max() if settings["order"] == "cost" else torch.ones(())
    start_U = ((2 * graded(task.space, scores_U) - 1) / _TAU).sigmoid()
    gates_U = (_TAU * (start_U * costs_U).logit()).float().requires_grad_()  # so that either order starts with ranks
    optimizer = torch.optim.AdamW([gates_U], betas=(0.9, 0.99), weight_decay=0.0)
    for rate in learning_rates(task, settings):
        optimizer.param_groups[0]["lr"] = rate
        probs_U = (gates_U / _TAU).sigmoid()
        mask_U = prefix(task, probs_U.detach() / costs_U)
        loss = task.gated_loss(mask_U + probs_U - probs_U.detach(), task.text(settings["windows"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return task.select((gates_U.detach() / _TAU).sigmoid() / costs_U, scores_U)


def prefix(task: Task, priorities_U: torch.Tensor) -> torch.Tensor:
    """The units before the first that does not fit, and of every group at least the best, float32 ``[U]``."""
    order_U = priorities_U.argsort(descending=True, stable=True)
    fits_U = task.budget.costs_U[order_U].cumsum(0) <= task.budget.most
    mask_U = torch.zeros(len(order_U))
    mask_U[order_U[fits_U]] = 1
    for units in task.groups:
        mask_U[units[priorities_U[units].argmax()]] = 1
    return mask_U
