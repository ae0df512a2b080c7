"""How much there is to do, and the search that does it, as configured."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from bernprune.config import RunConfig
from bernprune.errors import ConfigError
from bernprune.policy.baselines import make_baseline
from bernprune.policy.budget import Budget
from bernprune.policy.masks import Design
from bernprune.policy.posterior import PosteriorSearch
from bernprune.policy.reinforce import ReinforceSearch
from bernprune.policy.search import MaskSearch

# The published budget for 7B models (15,000 steps of 2 masks on 8 windows), and the least that is worth a run.
MOST_SEQUENCES, LEAST_SEQUENCES, SEQUENCES_PER_UNIT = 240_000, 8_192, 2
ROUND_WINDOWS = 128  # fewer say too little of a whole layer, and the policy would follow noise


@dataclass
class Work:
    """How much was done; all of it is saved."""

    step: int = 0
    sequences: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Workload:
    """How much is to be done: steps of ``step_sequences`` windows, or as many as fit in ``seconds``; and a round's."""

    steps: int | None
    seconds: float | None
    step_sequences: int
    round_steps: float
    learning_rate: float

    def progress(self, work: Work) -> float:
        """Share of the work that is done; 1 or more when it is over."""
        if self.steps == 0:
            return 1.0
        by_steps = work.step / self.steps if self.steps is not None else 0.0
        by_time = work.seconds / self.seconds if self.seconds is not None else 0.0
        return max(by_steps, by_time)

    def learning_rate_at(self, work: Work) -> float:
        """A cosine from the first step size to zero, without warm-up."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress(work))))


def plan_work(config: RunConfig, num_units: int) -> Workload:
    """Turn the budget of sequences and seconds into steps, and those into rounds.

    Raises:
        ConfigError: a budget smaller than one step.
    """
    search = config.search
    needs_reference = search.method == "reinforce" and _baseline(config).needs_reference
    step_sequences = (search.masks + needs_reference + (search.objective == "kl")) * search.windows
    sequences = search.sequences
    if sequences is None and search.seconds is None:
        sequences = default_sequences(num_units)
    least_steps = _least_round(config)
    if sequences is not None and 0 < sequences < least_steps * step_sequences:
        raise ConfigError(
            f"setting 'search.sequences' must be 0 or at least {'two steps' if least_steps == 2 else 'one step'} of "
            f"{step_sequences} sequences "
            f"(masks and reference passes times windows), but got {sequences}"
        )
    steps = None if sequences is None else sequences // step_sequences
    round_steps = _round_steps(config, default_sequences(num_units) // step_sequences if steps is None else steps)
    return Workload(steps, search.seconds, step_sequences, round_steps, search.learning_rate)


def _round_steps(config: RunConfig, steps: int) -> float:
    """Steps between two renewals of the policy, on average: the last round ends with the last step."""
    search = config.search
    rounds = search.rounds or steps * search.windows // ROUND_WINDOWS
    return max(1, steps) / max(1, min(rounds, steps // _least_round(config)))


def _least_round(config: RunConfig) -> int:
    """Steps of the shortest round: the posterior takes a variance over the groups of masks in it."""
    return 2 if config.search.method == "posterior" and _design(config).groups == 1 else 1


def default_sequences(num_units: int) -> int:
    """A sensible number of windows to run forward for so many units."""
    return min(MOST_SEQUENCES, max(LEAST_SEQUENCES, SEQUENCES_PER_UNIT * num_units))


def _baseline(config: RunConfig) -> Any:
    search = config.search
    return make_baseline(search.baseline, window=search.baseline_window, num_masks=search.masks)


def make_search(config: RunConfig, budget: Budget, start: dict[str, torch.Tensor]) -> MaskSearch:
    """The search of a run at its start, which holds ``scores_U`` and ``probs_U``."""
    search, policy = config.search, config.policy
    design = _design(config)
    if search.method == "posterior":
        return PosteriorSearch(
            budget,
            start["probs_U"],
            start["scores_U"],
            seed=config.seed,
            design=design,
            round_steps=plan_work(config, budget.space.size).round_steps,
            forgetting=search.forgetting,
            floor=policy.floor,
            ceiling=policy.ceiling,
            discount=search.discount,
        )
    return ReinforceSearch(
        budget,
        start["probs_U"],
        baseline=_baseline(config),
        seed=config.seed,
        design=design,
        scaling=search.scaling,
        epsilon=search.epsilon,
        projection=policy.projection,
        floor=policy.floor,
        ceiling=policy.ceiling,
        discount=search.discount,
        pull=search.pull,
    )


def _design(config: RunConfig) -> Design:
    search = config.search
    if search.masks_per == "batch":
        return Design(1, search.masks, sampling=search.sampling)
    chunks = config.data.window // config.chunk if search.masks_per == "chunk" else 1
    return Design(search.windows, search.masks, chunks, search.sampling)
