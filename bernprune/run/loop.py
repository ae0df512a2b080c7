"""The search itself: for each step from the restored one, ask, evaluate, tell, log, maybe save.

Masks and windows are functions of (seed, step), so the state to save is small and a resumed run repeats an
uninterrupted one bit for bit (unless it is limited by time).
"""

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TextIO

import torch
from tqdm import tqdm

from bernprune.config import RunConfig
from bernprune.errors import ConfigError, LossError, RunError
from bernprune.objective import MaskedObjective, masked_objective
from bernprune.policy.baselines import make_baseline
from bernprune.policy.budget import Budget
from bernprune.policy.search import MaskSearch, StepStats
from bernprune.run.checkpoint import read_latest, write_checkpoint
from bernprune.run.folder import RunFolder, sync
from bernprune.run.stage import Stage

logger = logging.getLogger(__name__)

# The published budget for 7B models (15,000 steps of 2 masks on 8 windows), and the least that is worth a run.
MOST_SEQUENCES, LEAST_SEQUENCES, SEQUENCES_PER_UNIT = 240_000, 8_192, 2


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during the search, after its checkpoint was written."""


@dataclass
class Work:
    """How much was done; all of it is saved."""

    step: int = 0
    sequences: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Workload:
    """How much is to be done: steps of ``step_sequences`` windows, or as many as fit in ``seconds``."""

    steps: int | None
    seconds: float | None
    step_sequences: int
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


def plan_work(stage: Stage) -> Workload:
    """Turn the budget of sequences and seconds into steps.

    Raises:
        ConfigError: a budget smaller than one step.
    """
    search, baseline = stage.config.search, make_search_baseline(stage.config)
    extra = int(baseline.needs_reference) + int(search.objective == "kl")
    step_sequences = (search.masks + extra) * search.windows
    sequences = search.sequences
    if sequences is None and search.seconds is None:
        sequences = default_sequences(stage.view.space.size)
    if sequences is not None and 0 < sequences < step_sequences:
        raise ConfigError(
            f"setting 'search.sequences' must be 0 or at least one step of {step_sequences} sequences "
            f"(masks and reference passes times windows), but got {sequences}"
        )
    steps = None if sequences is None else sequences // step_sequences
    return Workload(steps, search.seconds, step_sequences, search.learning_rate)


def default_sequences(num_units: int) -> int:
    """A sensible number of windows to run forward for so many units."""
    return min(MOST_SEQUENCES, max(LEAST_SEQUENCES, SEQUENCES_PER_UNIT * num_units))


def make_search_baseline(config: RunConfig) -> Any:
    search = config.search
    return make_baseline(search.baseline, window=search.baseline_window, num_masks=search.masks)


def make_search(config: RunConfig, budget: Budget, probs_U: torch.Tensor) -> MaskSearch:
    """The search of a run, at its start."""
    search, policy = config.search, config.policy
    return MaskSearch(
        budget,
        probs_U,
        baseline=make_search_baseline(config),
        seed=config.seed,
        num_masks=search.masks,
        scaling=search.scaling,
        epsilon=search.epsilon,
        projection=policy.projection,
        floor=policy.floor,
        ceiling=policy.ceiling,
    )


def run_search(
    stage: Stage, folder: RunFolder, search: MaskSearch, reference_U: torch.Tensor, *, progress: bool | None = None
) -> Work:
    """Run or continue the search in its folder, up to its budget; ``search`` holds the result.

    Args:
        reference_U: the fixed mask of the baseline ``matched``.
        progress: None shows a bar on a terminal only.

    Raises:
        LossError: a loss that is not finite, where those are errors.
        RunError: the checkpoint belongs to other text or units.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    workload = plan_work(stage)
    work = _restore(folder, search, stage.text_sha256)
    loop = _Loop(stage, folder, search, reference_U, workload, work)
    settings = stage.config.search
    hidden = None if progress is None else not progress  # None: tqdm hides itself where there is no terminal
    with (
        tqdm(total=workload.steps, initial=work.step, unit="step", desc="search", disable=hidden) as bar,
        folder.open_metrics(work.step) as metrics,
        masked_objective(
            stage.view, stage.ops, kind=settings.objective, rows_per_forward=settings.rows_per_forward
        ) as objective,
        _signals() as stopping,
    ):
        while workload.progress(work) < 1:
            stats = loop.step(objective, metrics)
            bar.update()
            bar.set_postfix(loss=f"{stats.loss:.4f}", sparsity=f"{stats.expected_sparsity:.3f}", refresh=False)
            if stopping.is_set():
                loop.save(metrics)
                raise Interrupted
            if loop.save_is_due():
                loop.save(metrics)
        loop.save(metrics)
    return work


@dataclass
class _Loop:
    stage: Stage
    folder: RunFolder
    search: MaskSearch
    reference_U: torch.Tensor
    workload: Workload
    work: Work
    saved_at: float = field(default_factory=time.monotonic)

    def step(self, objective: MaskedObjective, metrics: TextIO) -> StepStats:
        """One round of ask, evaluate, tell; the work done is counted here and nowhere else."""
        started, step = time.monotonic(), self.work.step
        learning_rate = self.workload.learning_rate_at(self.work)
        masks_KU = self.search.ask(step)
        tokens_BT = self.stage.train.batch(step, self.stage.config.search.windows)
        losses_K, reference = self._losses(objective, masks_KU, tokens_BT)
        finite_K = self._finite(losses_K, reference, step)
        stats = self.search.tell(
            masks_KU[finite_K], losses_K[finite_K], learning_rate=learning_rate, reference=reference
        )
        self.work.step += 1
        self.work.sequences += self.workload.step_sequences
        self.work.seconds += time.monotonic() - started
        self._log(metrics, step, learning_rate, stats, int((~finite_K).sum()))
        return stats

    def _losses(
        self, objective: MaskedObjective, masks_KU: torch.Tensor, tokens_BT: torch.Tensor
    ) -> tuple[torch.Tensor, float | None]:
        if not self.search.baseline.needs_reference:
            return objective.losses(masks_KU, tokens_BT), None
        losses = objective.losses(torch.cat([masks_KU, self.reference_U[None]]), tokens_BT)
        return losses[:-1], losses[-1].item()

    def _finite(self, losses_K: torch.Tensor, reference: float | None, step: int) -> torch.Tensor:
        finite_K = losses_K.isfinite()
        if finite_K.all() and (reference is None or math.isfinite(reference)):
            return finite_K
        settings = self.stage.config.search
        if settings.non_finite == "drop" and finite_K.any() and (reference is None or math.isfinite(reference)):
            return finite_K
        raise LossError(
            f"{int((~finite_K).sum())} of {len(finite_K)} losses of step {step} are not finite"
            + ("" if settings.non_finite == "drop" else "; search.non_finite=drop leaves such masks out")
        )

    def _log(self, metrics: TextIO, step: int, learning_rate: float, stats: StepStats, dropped: int) -> None:
        record = {
            "step": step,
            "sequences": self.work.sequences,
            "seconds": round(self.work.seconds, 3),
            "learning_rate": learning_rate,
            **stats.to_dict(),
            "dropped": dropped,
        }
        metrics.write(json.dumps(record) + "\n")

    def save_is_due(self) -> bool:
        settings = self.stage.config.search
        by_step = settings.checkpoint_steps is not None and self.work.step % settings.checkpoint_steps == 0
        return by_step or time.monotonic() - self.saved_at >= settings.checkpoint_seconds

    def save(self, metrics: TextIO) -> None:
        """A checkpoint, after the metrics it vouches for are safe."""
        state = {
            "step": self.work.step,
            "sequences": self.work.sequences,
            "seconds": self.work.seconds,
            "text_sha256": self.stage.text_sha256,
            "search": self.search.state_dict(),
        }
        sync(metrics)
        write_checkpoint(self.folder.checkpoints, self.work.step, state)
        self.saved_at = time.monotonic()


def _restore(folder: RunFolder, search: MaskSearch, text_sha256: str) -> Work:
    state = read_latest(folder.checkpoints)
    if state is None:
        return Work()
    if state["text_sha256"] != text_sha256:
        raise RunError(f"the training text is not the one that the checkpoints in {folder.path} were made with")
    search.load_state_dict(state["search"])
    logger.info("continuing at step %d", state["step"])
    return Work(state["step"], state["sequences"], state["seconds"])


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into a flag, so that a step is never cut in half; the second acts at once."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
