"""``default`` without one of its ingredients, each in turn; everything else stays as it ships."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.learning.rivals.ours import run_preset
from benchmarks.learning.task import Settings, Task
from bernprune.config import make_config
from bernprune.policy.posterior import PosteriorSearch
from bernprune.run.workload import plan_work
from bernprune.settings import merge
from bernprune.units import MaskRows


class _Raw(PosteriorSearch):
    """What is already believed stays in the losses: no control variate."""

    def effects(self, masks_BKCU: MaskRows, losses_BKC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        worth_U, self.worth_U = self.worth_U, torch.zeros_like(self.worth_U)
        found = super().effects(masks_BKCU, losses_BKC)
        self.worth_U = worth_U
        return found


class _Blind(PosteriorSearch):
    """Units are shrunk towards the mean of all regressed with them: scores only say where the policy starts."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        for regression in self._regressions:
            regression._features_NF = regression._features_NF[:, :1]
            regression.information_FF, regression.response_F = (
                regression.information_FF[:1, :1],
                regression.response_F[:1],
            )


class _Lines(PosteriorSearch):
    """Nothing sets a unit apart from the regression on its score."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        for regression in self._regressions:
            regression.shrink = lambda residual_N, variance_N: torch.zeros_like(residual_N)  # type: ignore[method-assign]


class _Sure(PosteriorSearch):
    """The policy takes every belief for the truth: it keeps by ceiling and floor, whatever the deviation."""

    def _conclude_round(self) -> None:
        super()._conclude_round()
        if self.rounds:
            costs_U = self.budget.hanging_cost(self.probs_U)
            self.probs_U = self.budget.at_price(self.worth_U, 1e-3 * self.deviation_U, costs_U, **self._bounds)


@dataclass(frozen=True)
class Ablation:
    """What replaces the ingredient: another search, or other settings, if need be with the number of rounds fixed."""

    search: type[PosteriorSearch] = PosteriorSearch
    given: Settings = field(default_factory=dict)
    as_many_rounds: bool = False


ABLATIONS = {
    "control-variate": Ablation(_Raw),
    "scores": Ablation(_Blind),
    "differences": Ablation(_Lines),
    "uncertainty": Ablation(_Sure),
    "rounds": Ablation(given={"search": {"rounds": 1}}),
    "forgetting": Ablation(given={"search": {"forgetting": 0.0}}),
    "masks-per-chunk": Ablation(given={"search": {"masks_per": "sequence"}}),
    "masks-per-sequence": Ablation(given={"search": {"masks_per": "batch"}}),
    "common-text": Ablation(given={"search": {"masks": 2, "windows": 32}}, as_many_rounds=True),
    "antithetic-masks": Ablation(given={"search": {"sampling": "independent"}}),
    "discount": Ablation(given={"search": {"discount": 1.0}}),
    "final-choice": Ablation(given={"search": {"selection": 0.0}}),
    "metric": Ablation(given={"initial": {"score": "random"}}),
}


def without(name: str) -> Callable[[Task, Settings], torch.Tensor]:
    """The method that lacks this ingredient."""
    ablation = ABLATIONS[name]

    def run(task: Task, settings: Settings) -> torch.Tensor:
        given = ablation.given
        if ablation.as_many_rounds:
            shipped = make_config(merge(task.given, {"search": {"sequences": task.meter.left}}))
            work = plan_work(shipped, task.space.size)
            given = merge(given, {"search": {"rounds": round((work.steps or 0) / work.round_steps)}})
        with patch("bernprune.run.workload.PosteriorSearch", ablation.search):
            return run_preset("default", task, given)

    return run
