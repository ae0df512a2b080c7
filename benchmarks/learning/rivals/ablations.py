"""``default`` without one of its ingredients, each in turn; everything else stays as it ships."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.learning.rivals.ours import run_preset
from benchmarks.learning.task import Settings, Task
from bernprune.config import make_config
from bernprune.policy import beliefs
from bernprune.policy.beliefs import Line, common_spreads
from bernprune.policy.posterior import PosteriorSearch
from bernprune.policy.search import StepStats
from bernprune.run.methods import METHODS
from bernprune.run.workload import plan_work
from bernprune.settings import merge
from bernprune.units import MaskRows


class _Raw(PosteriorSearch):
    """What is already believed stays in the losses: no control variate."""

    def tell(self, masks_BKCU: MaskRows, losses_BKC: torch.Tensor, **given: Any) -> StepStats:
        worth_U, rounds = self.beliefs.worth_U, self.rounds
        self.beliefs.worth_U = torch.zeros_like(worth_U)
        stats = super().tell(masks_BKCU, losses_BKC, **given)
        if self.rounds == rounds:  # or something else is believed from now on
            self.beliefs.worth_U = worth_U
        return stats


class _Blind(PosteriorSearch):
    """Lines are level: scores only say where the policy starts."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        for line in self.beliefs.lines:
            line.features_NF = line.features_NF[:, :1]
            line.information_FF, line.response_F = line.information_FF[:1, :1], line.response_F[:1]


def _believing(part: str, instead: Callable[..., Any]) -> type[PosteriorSearch]:
    """The search with something else in the place of a part of ``bernprune.policy.beliefs``."""

    class Changed(PosteriorSearch):
        def _conclude_round(self) -> None:
            with patch.object(beliefs, part, instead):
                super()._conclude_round()

    return Changed


def _no_spreads(residuals: Sequence[torch.Tensor], variances: Sequence[torch.Tensor]) -> list[float]:
    """Nothing sets a unit apart from the line through its score."""
    return [1e-12 * variance_N.mean().item() for variance_N in variances]


def _own_spreads(residuals: Sequence[torch.Tensor], variances: Sequence[torch.Tensor]) -> list[float]:
    """How much its units differ is estimated for each layer by itself."""
    return [common_spreads([r_N], [v_N])[0] for r_N, v_N in zip(residuals, variances, strict=True)]


def _no_priors(lines: Sequence[Line]) -> list[None]:
    """Each layer has a line of its own, of which those of others say nothing."""
    return [None] * len(lines)


def _free(information_FF: np.ndarray, response_F: np.ndarray) -> np.ndarray:
    """Lines may fall with the score."""
    return np.linalg.solve(information_FF, response_F)


class _Sure(PosteriorSearch):
    """The policy takes every belief for the truth: it keeps by ceiling and floor, whatever the deviation."""

    def _conclude_round(self) -> None:
        super()._conclude_round()
        if self.rounds:
            costs_U = self.budget.marginal_cost(self.probs_U)
            self.probs_U = self.budget.at_price(self.worth_U, 1e-3 * self.deviation_U, costs_U, **self._bounds)


class _Unpriced(PosteriorSearch):
    """The final choice tries random challengers."""

    priced = False


@dataclass(frozen=True)
class Ablation:
    """What replaces the ingredient: another search, or other settings, if need be with the number of rounds fixed."""

    search: type[PosteriorSearch] = PosteriorSearch
    given: Settings = field(default_factory=dict)
    as_many_rounds: bool = False


ABLATIONS = {
    "activity": Ablation(given={"search": {"by_activity": False}}),
    "control-variate": Ablation(_Raw),
    "scores": Ablation(_Blind),
    "differences": Ablation(_believing("common_spreads", _no_spreads)),
    "common-lines": Ablation(_believing("priors", _no_priors)),
    "common-spreads": Ablation(_believing("common_spreads", _own_spreads)),
    "rising-lines": Ablation(_believing("rising", _free)),
    "uncertainty": Ablation(_Sure),
    "rounds": Ablation(given={"search": {"rounds": 1}}),
    "forgetting": Ablation(given={"search": {"forgetting": 0.0}}),
    "swing": Ablation(given={"search": {"swing": 0.0}}),
    "masks-per-chunk": Ablation(given={"search": {"masks_per": "sequence"}}),
    "masks-per-sequence": Ablation(given={"search": {"masks_per": "batch"}}),
    "common-text": Ablation(given={"search": {"masks": 2, "windows": 32}}, as_many_rounds=True),
    "antithetic-masks": Ablation(given={"search": {"sampling": "independent"}}),
    "discount": Ablation(given={"search": {"discount": 1.0}}),
    "looks": Ablation(_Unpriced),
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
            work = plan_work(shipped, task.space)
            given = merge(given, {"search": {"rounds": round((work.steps or 0) / work.round_steps)}})
        with patch.dict(METHODS, posterior=ablation.search):
            return run_preset("default", task, given)

    return run
