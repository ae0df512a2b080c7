"""Projected descent along a score-function gradient, the published way (Gao et al., 2024, arXiv 2406.10576)."""

from collections.abc import Callable
from typing import Any

import torch

from bernprune.errors import ConfigError
from bernprune.names import Projection, Scaling, check_name
from bernprune.policy.baselines import Baseline, LeaveOneOut
from bernprune.policy.budget import Budget
from bernprune.policy.diagnostics import correlation_by_kind, signal_to_noise
from bernprune.policy.estimators import kl_gradient, reinforce
from bernprune.policy.masks import Design
from bernprune.policy.rounds import RoundSums, copied
from bernprune.policy.search import MaskSearch, Reading, StepStats, rewards_to_go
from bernprune.units import MaskRows

_LEAST_STEPS = 4  # that tell how much their gradients differ


class ReinforceSearch(MaskSearch):
    """Projected policy-gradient descent on the expected loss of a product-Bernoulli policy.

    Args:
        probs_U: where to start, float64 ``[U]``; projected on the budget here.
        baseline: losses to advantages.
        floor, ceiling: bounds of every probability. At 0 or 1 a unit is never sampled otherwise and so never learns;
            bounds inside keep it alive.
        projection: ``cost-weighted`` (equal shift, budget met exactly) or ``published`` (at most the budget).
        discount: what a chunk's mask answers for of the chunks behind it; see ``rewards_to_go``.
        pull: weight of KL(policy || start), summed over units, in what is minimised; needs bounds inside 0 and 1.

    Raises:
        ConfigError: an unknown scaling or projection, antithetic masks with a baseline other than leave-one-out, or a
            pull with bounds of 0 or 1.
        BudgetError: the budget cannot be met between floor and ceiling.
    """

    def __init__(
        self,
        budget: Budget,
        probs_U: torch.Tensor,
        *,
        baseline: Baseline,
        seed: int,
        design: Design,
        scaling: Scaling = "natural",
        epsilon: float = 0.0,
        projection: Projection = "cost-weighted",
        floor: float = 0.01,
        ceiling: float = 0.99,
        discount: float = 1.0,
        pull: float = 0.0,
    ) -> None:
        super().__init__(budget, probs_U, seed=seed, design=design)
        if design.swing:
            raise ConfigError(f"policy gradients need masks without swing, but got {design.swing:g}")
        check_name("scaling", scaling, Scaling)
        check_name("projection", projection, Projection)
        if design.sampling == "antithetic" and not isinstance(baseline, LeaveOneOut):
            raise ConfigError(f"antithetic masks need the baseline 'leave-one-out', not {type(baseline).__name__}")
        if pull > 0 and not 0 < floor < ceiling < 1:
            raise ConfigError(f"a pull needs 0 < floor < ceiling < 1, but got {floor:g} and {ceiling:g}")
        self.baseline, self.scaling, self.epsilon, self.discount = baseline, scaling, epsilon, discount
        self.needs_reference = baseline.needs_reference
        self._bounds = {"floor": floor, "ceiling": ceiling}
        self._project: Callable[..., torch.Tensor] = (
            budget.project if projection == "cost-weighted" else budget.project_published
        )
        # Steepest descent and projection must agree on what distance is: where a unit weighs as much as it costs, it
        # moves by its effect per cost, and a head does not outrun the many channels that cost as much.
        self._metric_U = budget.metric_U if projection == "cost-weighted" else torch.ones_like(budget.costs_U)
        self.pull = pull
        self.probs_U = self._start_U = self._project(self.probs_U, **self._bounds)
        self._sums = RoundSums.empty(len(self.probs_U))  # of the gradients of steps, since they were last looked at

    def tell(
        self,
        masks_BKCU: MaskRows,
        losses_BKC: torch.Tensor,
        *,
        learning_rate: float,
        reference_BC: torch.Tensor | None = None,
        reading: Reading | None = None,
    ) -> StepStats:
        self._check_told(masks_BKCU, losses_BKC)
        losses_BKC, before_U = losses_BKC.double().cpu(), self.probs_U
        returns_BKC = rewards_to_go(losses_BKC, self.discount)
        if self.baseline.needs_reference and reference_BC is None:
            raise ConfigError(
                f"baseline {type(self.baseline).__name__} needs reference_BC, the losses of a reference mask"
            )
        if reference_BC is not None:
            if reference_BC.shape != losses_BKC[:, 0].shape:
                raise ConfigError(
                    f"losses of a reference must be {list(losses_BKC[:, 0].shape)}, but are {list(reference_BC.shape)}"
                )
            reference_BC = rewards_to_go(reference_BC.double().cpu(), self.discount)
        advantages_BKC = self.baseline.advantages(returns_BKC, reference_BC)
        if not isinstance(advantages_BKC, torch.Tensor) or advantages_BKC.shape != returns_BKC.shape:
            raise ConfigError(
                f"baseline {type(self.baseline).__name__} must give advantages {list(returns_BKC.shape)}, but gave "
                f"{getattr(advantages_BKC, 'shape', advantages_BKC)!r:.100}"
            )
        if not advantages_BKC.is_floating_point() or not advantages_BKC.isfinite().all():
            raise ConfigError(
                f"baseline {type(self.baseline).__name__} must give finite floating-point advantages, but gave "
                f"{str(advantages_BKC.dtype).removeprefix('torch.')}, not all of which are that"
            )
        advantages_BKC = advantages_BKC.detach()
        # The mean over masks, but the sum over the chunks of each.
        chunks = losses_BKC.shape[-1]
        gradient_U = chunks * reinforce(
            before_U, masks_BKCU.flatten(0, 2), advantages_BKC.flatten(), scaling=self.scaling, epsilon=self.epsilon
        )
        # What the advantages of coupled masks lack: the others, which they leave out, tell of a unit too.
        variance_U, contrast_U = before_U * (1 - before_U), self.contrasts_U
        gradient_U = torch.where(contrast_U > 0, gradient_U * (variance_U / contrast_U), gradient_U)
        self._sums.add(gradient_U[None])
        after_U = before_U - learning_rate * gradient_U / self._metric_U
        if self.pull > 0:
            after_U -= self._pulled_U(learning_rate)
        self.probs_U = self._project(after_U, **self._bounds)
        return self.stats(losses_BKC, advantages_BKC, before_U)

    def diagnose(self, scores_U: torch.Tensor) -> dict[str, Any]:
        """Also, for each kind and of the gradients since it was last asked: ``signal_to_noise``, and ``agreement``, the
        correlation between the mean gradients of every other step and of the rest. The policy moves meanwhile, which
        counts as noise."""
        found, sums = super().diagnose(scores_U), self._sums
        self._sums = RoundSums.empty(len(self.probs_U))
        if sums.count < _LEAST_STEPS:
            return found
        space = self.budget.space
        return found | {
            "signal_to_noise": signal_to_noise(space, sums.mean_U(), sums.variance_U()),
            "agreement": correlation_by_kind(space, *sums.halves()),
        }

    def _pulled_U(self, learning_rate: float) -> torch.Tensor:
        """The step of the pull alone; it ends at the start and not beyond, so that a strong pull cannot overshoot."""
        gradient_U = kl_gradient(self.probs_U, self._start_U, scaling=self.scaling, epsilon=self.epsilon)
        step_U, gap_U = learning_rate * self.pull * gradient_U / self._metric_U, self.probs_U - self._start_U
        return torch.where(step_U.abs() < gap_U.abs(), step_U, gap_U)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "start_U": self._start_U,
            "baseline": self.baseline.state_dict(),
            **copied(vars(self._sums)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._start_U = state["start_U"].double()
        self.baseline.load_state_dict(state["baseline"])
        self._sums = RoundSums(**copied({name: state[name] for name in vars(self._sums)}))
