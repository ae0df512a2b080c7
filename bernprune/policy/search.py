"""Ask and tell: the search proposes masks and is told losses. It never sees a model.

Its whole state is the probabilities and the baseline's memory: masks are functions of (seed, step).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bernprune.errors import BudgetError, RunError
from bernprune.names import Projection, Scaling
from bernprune.policy.baselines import Baseline
from bernprune.policy.bernoulli import entropy, sample
from bernprune.policy.budget import Budget
from bernprune.policy.estimators import reinforce


@dataclass(frozen=True)
class StepStats:
    """What one step did; losses in nats per token, entropy in bits per unit."""

    loss: float
    loss_spread: float
    advantage_spread: float
    gradient_norm: float
    largest_move: float
    expected_sparsity: float
    entropy: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


class MaskSearch:
    """Projected policy-gradient descent on the expected loss of a product-Bernoulli policy.

    Args:
        probs_U: where to start, float64 ``[U]``; projected on the budget here.
        baseline: losses to advantages.
        floor, ceiling: bounds of every probability. At 0 or 1 a unit is never sampled otherwise and so never learns;
            bounds inside keep it alive.
        projection: ``cost-weighted`` (equal shift, budget met exactly) or ``published`` (at most the budget).

    Raises:
        BudgetError: the budget cannot be met between floor and ceiling.
    """

    def __init__(
        self,
        budget: Budget,
        probs_U: torch.Tensor,
        *,
        baseline: Baseline,
        seed: int,
        num_masks: int,
        scaling: Scaling = "natural",
        epsilon: float = 0.0,
        projection: Projection = "cost-weighted",
        floor: float = 0.01,
        ceiling: float = 0.99,
    ) -> None:
        if probs_U.shape != (budget.space.size,):
            raise BudgetError(f"{budget.space.size} probabilities are needed, but got {tuple(probs_U.shape)}")
        self.budget, self.baseline, self.seed, self.num_masks = budget, baseline, seed, num_masks
        self.scaling, self.epsilon = scaling, epsilon
        self._bounds = {"floor": floor, "ceiling": ceiling}
        self._project: Callable[..., torch.Tensor] = (
            budget.project if projection == "cost-weighted" else budget.project_published
        )
        # Steepest descent and projection must agree on what distance is: where a unit weighs as much as it costs, it
        # moves by its effect per cost, and a head does not outrun the many channels that cost as much.
        self._metric_U = budget.metric_U if projection == "cost-weighted" else torch.ones_like(budget.costs_U)
        self.probs_U = self._project(probs_U.double(), **self._bounds)

    def ask(self, step: int) -> torch.Tensor:
        """The masks of a step, bool ``[K, U]``; the same whenever asked."""
        return sample(self.probs_U, self.num_masks, seed=self.seed, step=step)

    def tell(
        self, masks_KU: torch.Tensor, losses_K: torch.Tensor, *, learning_rate: float, reference: float | None = None
    ) -> StepStats:
        """Move the policy by the losses of masks it was asked for.

        Args:
            losses_K: float64 nats per token; masks whose losses are dropped must be dropped from both.
            learning_rate: step size for the *mean* over masks, hence independent of their number.
            reference: loss of the fixed reference mask on the same text, if the baseline needs it.
        """
        losses_K = losses_K.double().cpu()
        advantages_K = self.baseline.advantages(losses_K, reference)
        gradient_U = reinforce(self.probs_U, masks_KU, advantages_K, scaling=self.scaling, epsilon=self.epsilon)
        moved_U = self._project(self.probs_U - learning_rate * gradient_U / self._metric_U, **self._bounds)
        largest_move = (moved_U - self.probs_U).abs().max().item()
        self.probs_U = moved_U
        return StepStats(
            loss=losses_K.mean().item(),
            loss_spread=losses_K.std(correction=0).item(),
            advantage_spread=advantages_K.square().mean().sqrt().item(),
            gradient_norm=gradient_U.norm().item(),
            largest_move=largest_move,
            expected_sparsity=self.budget.removed_share(self.probs_U),
            entropy=entropy(self.probs_U),
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "fingerprint": self.budget.space.fingerprint,
            "probs_U": self.probs_U,
            "baseline": self.baseline.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``RunError`` if the state belongs to other units."""
        if state["fingerprint"] != self.budget.space.fingerprint:
            raise RunError("the checkpoint was written for another model or another granularity")
        self.probs_U = state["probs_U"].double()
        self.baseline.load_state_dict(state["baseline"])
