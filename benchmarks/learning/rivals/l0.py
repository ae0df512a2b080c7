"""Deterministic soft gates in the manner of DDP (Huang et al., 2026, arXiv 2603.08065; released code).

Gates are soft and nothing is sampled: z = clip(1/2 + (a - v) / T, 0, 1), AdamW moves a, and the shift v is solved for
before every step, so that the soft gates meet the budget. What is minimised is the loss, plus price * cost * z, plus a
penalty on gates that are neither open nor shut, price * cost * z (1 - z), whose weight grows from nothing while the
temperature T falls. The price of a parameter is what the open question is worth on average: dL/dz per cost of the gates
between 0 and 1. At the end the largest a are kept.

Departures: DDP's gates are not bounded by 1 and stay in the model as scales, which no method here may do. It starts
with all gates open and meets the budget by learned multipliers, of the penalty too; here the start is the order of
Wanda-sp and the budget is met throughout. It adds the divergence from the dense model to the loss.

Letters: U units.
"""

import torch

from benchmarks.learning.rivals.gradients import learning_rates
from benchmarks.learning.task import Settings, Task
from bernprune.policy.bernoulli import graded

_WARM, _COLD = 1.0, 0.1


def l0(task: Task, settings: Settings) -> torch.Tensor:
    """Keep what the last gates open.

    Args:
        settings: ``travel`` (see ``ste``), ``windows`` of a step, ``penalty``: its weight at the end.
    """
    scores_U = task.scores()
    costs_U = task.budget.costs_U / task.budget.costs_U.mean()
    values_U = (2 * graded(task.space, scores_U) - 1).requires_grad_()
    optimizer = torch.optim.AdamW([values_U], betas=(0.9, 0.99), weight_decay=0.0)
    rates = learning_rates(task, settings)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        progress = step / len(rates)
        temperature = _WARM * (_COLD / _WARM) ** progress
        gates_U = task.budget.project(0.5 + values_U.detach() / temperature)
        loss = task.gated_loss(gates_U.requires_grad_(), task.text(settings["windows"]))
        (gradient_U,) = torch.autograd.grad(loss, gates_U)
        values_U.grad = _gradient(gates_U.detach(), gradient_U, costs_U, settings["penalty"] * progress)
        optimizer.step()
    return task.select(values_U.detach(), scores_U)


def _gradient(
    gates_U: torch.Tensor, loss_gradient_U: torch.Tensor, costs_U: torch.Tensor, penalty: float
) -> torch.Tensor:
    """Of the penalised loss at a constant budget; zero for gates that are fully open or shut."""
    between_U = (gates_U > 0) & (gates_U < 1)
    price = loss_gradient_U[between_U].sum() / costs_U[between_U].sum()
    pull_U = penalty * price.abs() * costs_U * (1 - 2 * gates_U)
    pull_U -= costs_U * pull_U[between_U].sum() / costs_U[between_U].sum()
    return torch.where(between_U, loss_gradient_U - price * costs_U + pull_U, 0.0)
