"""How much there is to do, as configured: steps, rounds, what is left for the choice and the repair."""

import math
from bisect import bisect_right
from dataclasses import dataclass

import torch

from bernprune.config import RunConfig
from bernprune.errors import ConfigError
from bernprune.policy.budget import Budget
from bernprune.policy.looks import look_sequences, look_windows, most_changes
from bernprune.policy.race import CHALLENGERS, MOST_FINALISTS, heat_sequences
from bernprune.policy.rounds import HAIR, round_ends, rounds_in
from bernprune.policy.selection import Limits, select
from bernprune.repair.needs import needed_windows
from bernprune.run.methods import (
    design_of,
    loss_of,
    method_of,
    reads_activity,
    runs_reference,
)
from bernprune.sections import SearchConfig
from bernprune.units import Architecture, UnitSpace

# The published budget for 7B models (15,000 steps of 2 masks on 8 windows), and the least that is worth a run.
MOST_SEQUENCES, LEAST_SEQUENCES, SEQUENCES_PER_UNIT = 240_000, 8_192, 2
AUTO_TIMES, AUTO_REGRET = 8, 0.1
FITS = 32  # of weights to the policy, at most: one takes as long on a large model as thousands of sequences
FITTING_TOKENS = 24  # for each input of the widest projection that is fitted (benchmarks/smollm2: what fewer cost)
FINALIST_TOKENS = 6  # the same, of finalists that are repaired to be judged
FITTING_WINDOWS = 128  # at least, whatever that makes
LEAST_JUDGING, MOST_JUDGING = 2, 256  # windows that judge repairs; two for a standard error
ROUND_WINDOWS = 128  # fewer say too little of a whole layer, and the policy would follow noise
# Share of the sequences for the final choice: what LOOKS looks and the race before them take, MOST_CHOOSING at most.
LOOKS, MOST_CHOOSING, CHOOSING = 6, 0.3, 0.1  # CHOOSING where nothing is looked at

ASKED_TO_FINISH = "asked: the run was told to finish"


@dataclass
class Work:
    """How much was done; all of it is saved."""

    step: int = 0
    sequences: int = 0
    seconds: float = 0.0
    settled: bool = False  # the expected regret was small enough
    last: int | None = None  # steps after which the user wants it to end

    @property
    def asked_to_finish(self) -> bool:
        """Whether it ends here because the user wants it to."""
        return self.last is not None and self.step >= self.last


@dataclass(frozen=True)
class Workload:
    """A search's budget.

    Attributes:
        steps: of the search, at most; None: as many as fit in ``seconds``.
        sequences: limit of the search and the final choice together.
        step_sequences: windows run forward in a step.
        probe_sequences: in the probe of what would be selected now, at the end of each round.
        round_steps: steps of a round, maybe with a fraction.
        choosing: what may be run to choose among finalists, as a share of what the search took.
        looks: whether that choice goes by single changes.
        looking: sequences that are enough for them; 0: not known.
        regret: the search ends where it expects less, in nats; None: never.
        fit_rounds: rounds after which weights are fitted to the policy anew.
    """

    steps: int | None
    seconds: float | None
    sequences: int | None
    step_sequences: int
    probe_sequences: int
    round_steps: float
    learning_rate: float
    choosing: float
    looks: bool
    looking: int
    regret: float | None
    fit_rounds: int

    def progress(self, work: Work) -> float:
        """Share of the work that is done; 1 or more when it is over."""
        if self.steps == 0 or work.settled or work.asked_to_finish:
            return 1.0
        by_steps = work.step / self.steps if self.steps is not None else 0.0
        by_time = work.seconds / self.seconds if self.seconds is not None else 0.0
        return max(by_steps, by_time)

    def why_over(self, work: Work) -> str:
        """What ended the search: a word, and the reason as a clause."""
        if work.settled:
            return f"settled: knowing every unit exactly was expected to gain less than {self.regret:g} nats"
        if self.steps is not None and work.step >= self.steps:
            return "sequences: those that are left are too few for a step"
        if work.asked_to_finish:
            return ASKED_TO_FINISH
        return "seconds: all the time that it was given was spent"

    def round_ends(self, step: int) -> bool:
        """Whether a round ends with this step."""
        return round_ends(step, self.round_steps)

    def fits(self, step: int) -> bool:
        """Whether weights are fitted to the policy after this step: where every ``fit_rounds``-th round ends."""
        return self.round_ends(step) and rounds_in(step + 1, self.round_steps) % self.fit_rounds == 0

    def selection_sequences(self, work: Work) -> int:
        """What may be run forward to choose among finalists, after a search of so much work.

        One that has settled leaves sequences over, so that looks need not do with their share of the limit.
        """
        share = int(self.choosing * work.sequences + HAIR)
        if work.settled:
            most = int(MOST_CHOOSING / (1 - MOST_CHOOSING) * work.sequences + HAIR)
            share = max(share, min(self.looking, most))
        return share if self.sequences is None else min(share, self.sequences - work.sequences)

    def windows_read(self, search: SearchConfig, space: UnitSpace) -> tuple[float, float]:
        """Most windows of text that the search reads, and that are then read to choose; infinite if unknown.

        A look at fewer changes than there may be reads little: it counts as one at all of them.
        """
        learning = math.inf if self.steps is None else float(self.steps * search.windows)
        work = Work(sequences=0 if self.steps is None else self.steps * self.step_sequences)
        each, cost = search.final_windows, heat_sequences(1 + CHALLENGERS, search.final_windows)
        if self.looks:
            each, cost = _look(search, space)
        choosing = search.final_windows + each * self.selection_sequences(work) / cost if self.choosing else 0.0
        return learning, math.inf if choosing and self.steps is None else choosing

    def learning_rate_at(self, work: Work) -> float:
        """A cosine from the first step size to zero, without warm-up."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress(work))))


def plan_work(config: RunConfig, space: UnitSpace) -> Workload:
    """Turn the budget of sequences and seconds into steps, and those into rounds.

    Raises:
        ConfigError: a budget smaller than one step.
    """
    search, least_steps = config.search, _least_round(config)
    dense_pass, method = loss_of(search).needs_dense, method_of(config)
    again = runs_reference(config) or reads_activity(config)
    step_sequences = (search.masks + again + dense_pass) * search.windows
    probe_sequences = 0 if method == "reinforce" else (1 + dense_pass) * search.windows
    sequences, seconds, regret = search.sequences, search.seconds, search.regret
    if sequences == "auto":
        sequences, regret = min(MOST_SEQUENCES, AUTO_TIMES * default_sequences(space.size)), regret or AUTO_REGRET
    elif sequences is None and seconds is None:
        sequences = default_sequences(space.size)
    if sequences is not None and 0 < sequences < least_steps * step_sequences:
        by_default = "" if sequences == search.sequences else ", which is the default for this model"
        raise ConfigError(
            f"setting 'search.sequences' must be 0 or at least {'two steps' if least_steps == 2 else 'one step'} of "
            f"{step_sequences} sequences "
            f"(search.masks and reference passes times search.windows), but got {sequences}{by_default}"
        )
    available = default_sequences(space.size) if sequences is None else sequences
    choosing = _choosing(config, space, available - 2 * step_sequences)  # what whole steps and rounds leave over
    searching = 1 - choosing
    limit = int(searching * available + HAIR)
    steps, rounds = _fitting(config, limit, step_sequences, probe_sequences)
    if not rounds:  # no room for probes, or to choose
        probe_sequences = 0
        steps, rounds = _fitting(config, limit, step_sequences, 0)
        steps = steps or (least_steps if sequences else 0)
    return Workload(
        steps=None if sequences is None else steps,
        seconds=None if seconds is None else searching * seconds,
        sequences=sequences,
        step_sequences=step_sequences,
        probe_sequences=probe_sequences,
        round_steps=max(1, steps) / max(1, rounds),
        learning_rate=search.learning_rate,
        choosing=choosing / searching,
        looks=method == "posterior",
        looking=_looking(config, space),
        regret=regret,
        fit_rounds=-(-max(1, rounds) // FITS),
    )


def _choosing(config: RunConfig, space: UnitSpace, available: int) -> float:
    """Share of the sequences for the final choice."""
    search = config.search
    if search.selection is not None or search.refit:  # then what is chosen is judged after its repair
        return search.selection or 0.0
    if method_of(config) != "posterior":
        return CHOOSING
    return min(MOST_CHOOSING, _looking(config, space) / max(1, available))


def _looking(config: RunConfig, space: UnitSpace) -> int:
    """Sequences that looks and the race before them take; 0 where their share is given, or nothing is looked at."""
    search, dense_pass = config.search, loss_of(config.search).needs_dense
    if search.selection is not None or search.refit or method_of(config) != "posterior":
        return 0
    racing = heat_sequences(MOST_FINALISTS, search.final_windows) + dense_pass * search.final_windows
    return racing + LOOKS * _look(search, space)[1]


def _look(search: SearchConfig, space: UnitSpace) -> tuple[int, int]:
    """Windows that a look and its heat read, and the sequences they take."""
    looked_at, raced = look_windows(search.look_windows, search.final_windows)
    windows = looked_at + raced
    return windows, look_sequences(most_changes(space), looked_at, raced) + loss_of(search).needs_dense * windows


def _fitting(config: RunConfig, limit: int, step_sequences: int, probe_sequences: int) -> tuple[int, int]:
    """The most steps that fit, and their rounds."""
    search, least_steps = config.search, _least_round(config)

    def rounds_of(steps: int) -> int:
        return max(1, min(search.rounds or steps * search.windows // ROUND_WINDOWS, steps // least_steps))

    def cost(steps: int) -> int:  # more steps never cost less
        return steps * step_sequences + rounds_of(steps) * probe_sequences

    fits = bisect_right(range(limit // step_sequences + 1), limit, lo=least_steps, key=cost) - 1
    return (fits, rounds_of(fits)) if fits >= least_steps else (0, 0)


def _least_round(config: RunConfig) -> int:
    """Steps of the shortest round: the posterior takes a variance over the groups of masks in it."""
    return 2 if method_of(config) == "posterior" and design_of(config).groups == 1 else 1


def default_sequences(num_units: int) -> int:
    """A sensible number of windows to run forward for so many units."""
    return min(MOST_SEQUENCES, max(LEAST_SEQUENCES, SEQUENCES_PER_UNIT * num_units))


def fitting_windows(architecture: Architecture, window: int, tokens: int = FITTING_TOKENS) -> int:
    """Calibration windows to fit weights on, by default: so many tokens for each input of the widest matrix."""
    shapes = architecture.layers
    widest = max(max(shape.channels, shape.query_heads * architecture.head_dim) for shape in shapes)
    return max(FITTING_WINDOWS, needed_windows(max(widest, architecture.hidden_size), window, tokens))


def repair_windows(config: RunConfig, architecture: Architecture) -> int:
    """Calibration windows to repair on."""
    return config.repair.windows or fitting_windows(architecture, config.data.window)


def finalist_windows(architecture: Architecture, window: int, fitted: int) -> int:
    """Calibration windows to repair finalists on, of those that the repair itself is fitted on."""
    return min(fitted, fitting_windows(architecture, window, FINALIST_TOKENS))


def judging_windows(fitted: int) -> int:
    """Windows that judge repairs which are fitted on so many."""
    return min(max(LEAST_JUDGING, fitted), MOST_JUDGING)


def make_budget(config: RunConfig, space: UnitSpace, sparsity: float | None = None) -> Budget:
    """A run's budget, or one like it for another sparsity. Raises ``BudgetError`` if units and pools do not fit."""
    given = config.budget
    share = given.sparsity if sparsity is None else sparsity
    return Budget(space, share, measure=given.measure, pools=given.pools, also=given.also)


def check_budget(config: RunConfig, budget: Budget, limits: Limits) -> None:
    """Raises ``BudgetError`` if no selection can be on it, or no policy between the run's floor and ceiling.

    A policy is asked for at the run's own sparsity, and under caps, which would turn a selection into one of another.
    """
    probs_U = torch.full((budget.space.size,), 0.5, dtype=torch.float64)
    select(probs_U, budget, limits=limits)
    if not budget.caps and budget.sparsity != config.budget.sparsity:
        return
    project = budget.project if config.policy.projection == "cost-weighted" else budget.project_published
    project(probs_U, floor=config.policy.floor, ceiling=config.policy.ceiling)


def make_limits(config: RunConfig) -> Limits:
    """What every selection of a run leaves in each layer."""
    return Limits(config.budget.min_kv_groups, config.budget.min_channels, config.budget.channel_multiple)
