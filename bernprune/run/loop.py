"""The search itself: for each step from the restored one, ask, evaluate, tell, log, maybe save.

Masks and windows are functions of (seed, step), so the state to save is small and a resumed run repeats an
uninterrupted one bit for bit (unless it is limited by time, or told to finish).
"""

import json
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TextIO

import torch

from bernprune.errors import ConfigError, LossError
from bernprune.names import ReferenceName
from bernprune.objective import MaskedObjective
from bernprune.policy.masks import some_rows, with_reference
from bernprune.policy.posterior import PosteriorStats
from bernprune.policy.search import MaskSearch, Reading, StepStats
from bernprune.policy.selection import Limits, select
from bernprune.progress import bar
from bernprune.repair import ExpectedWeights
from bernprune.run.checkpoint import read_checkpoint, write_checkpoint
from bernprune.run.folder import RunFolder
from bernprune.run.methods import METHODS, loss_of
from bernprune.run.signals import signals
from bernprune.run.stage import Stage
from bernprune.run.workload import Work
from bernprune.storage import sync_stream
from bernprune.units import MaskRows

logger = logging.getLogger(__name__)


def run_search(
    stage: Stage,
    folder: RunFolder,
    search: MaskSearch,
    graded_U: torch.Tensor,
    initial_U: torch.Tensor,
    weights: ExpectedWeights | None = None,
    *,
    finish: bool = False,
) -> tuple[Work, bool]:
    """Run or continue the search in its folder, up to its budget; ``search`` holds the result.

    Returns what was done, and whether it was ``finish`` that ended it just now.

    Args:
        graded_U: what the metric says of units, which breaks ties and to which what is learned is compared.
        initial_U: the selection at the start.
        weights: if given, masks are run on weights that are fitted to the policy as it changes.
        finish: take one more step, unless the search is over, and conclude it there.

    Raises:
        LossError: a loss that is not finite, where those are errors.
        RunError: the checkpoint belongs to other text or units.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    work, fitted_U = _restore(folder, search, stage.text_sha256)
    loop, workload = _Loop(stage, folder, search, graded_U, initial_U, work, weights), stage.workload
    finish = finish and workload.progress(work) < 1
    if finish:
        work.last = work.step + 1
    loop.fit(search.probs_U if fitted_U is None else fitted_U)
    if workload.progress(work) < 1:
        folder.forget_choice()
    logger.info("searching")
    with (
        bar("search", total=workload.steps, unit="step", done=work.step) as shown,
        folder.open_metrics(work.step) as metrics,
        stage.objective(loss_of(stage.config.search)) as objective,
        signals() as stopping,
    ):
        while workload.progress(work) < 1 and not stopping.is_set():
            stats = loop.step(objective, metrics)
            shown.update()
            shown.set_postfix(loss=f"{stats.loss:.4f}", sparsity=f"{stats.expected_sparsity:.3f}", refresh=False)
            if loop.save_is_due():
                loop.save(metrics)
        loop.save(metrics)
    return work, finish


def evaluate_step(
    objective: MaskedObjective,
    search: MaskSearch,
    masks_BKCU: MaskRows,
    tokens_BT: torch.Tensor,
    reference_U: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, Reading | None]:
    """What ``search.tell`` is told of masks that it was asked for, on windows of text ``[B, T]``.

    Returns losses ``[B, K, C]``, the losses ``[B, C]`` of the reference or None, and a ``Reading`` or None, as the
    search needs them.

    Args:
        reference_U: the mask, or gates, that others are compared with; for a reading, what would be selected now.
    """
    design = search.design
    if search.needs_reading:
        losses_BKT = objective.token_shares(masks_BKCU, tokens_BT)
        reading = Reading(losses_BKT, partial(objective.look, reference_U, tokens_BT))
        return losses_BKT.unflatten(2, (design.chunks, -1)).sum(-1), None, reading
    if search.needs_reference:
        masks_BKCU = with_reference(masks_BKCU, reference_U)
    if design.groups == design.chunks == 1:
        losses_BKC = objective.losses(masks_BKCU.flatten(0, 2), tokens_BT)[None, :, None]
    else:
        losses_BKC = objective.chunk_shares(masks_BKCU, tokens_BT)
    if not search.needs_reference:
        return losses_BKC, None, None
    return losses_BKC[:, :-1], losses_BKC[:, -1], None


def current_selection(search: MaskSearch, graded_U: torch.Tensor, limits: Limits) -> torch.Tensor:
    """What would be kept if the search ended now, bool ``[U]``; scores break ties."""
    return select(search.priorities_U, search.budget, limits=limits, tie_break_U=graded_U)


def reference(
    name: ReferenceName, search: MaskSearch, initial_U: torch.Tensor, graded_U: torch.Tensor, limits: Limits
) -> torch.Tensor:
    """What the masks of the next step are compared with, ``[U]``: a mask, or gates in float32.

    It follows from earlier steps alone, so it does not bias the gradient.
    """
    if name == "dense":
        return torch.ones_like(initial_U)
    if name == "current":
        return current_selection(search, graded_U, limits)
    if name == "mean-field":
        return search.probs_U.float()
    return initial_U


@dataclass
class _Loop:
    stage: Stage
    folder: RunFolder
    search: MaskSearch
    graded_U: torch.Tensor
    initial_U: torch.Tensor
    work: Work
    weights: ExpectedWeights | None = None
    fitted_U: torch.Tensor | None = None  # keep probabilities that the weights were last fitted to
    saved_at: float = field(default_factory=time.monotonic)
    selected: tuple[torch.Tensor, torch.Tensor] | None = None  # the last priorities asked about, and what they keep

    def step(self, objective: MaskedObjective, metrics: TextIO) -> StepStats:
        """Ask, evaluate, tell; the work done is counted here and nowhere else."""
        started = time.monotonic()
        step = self.work.step
        settings = self.stage.config.search
        learning_rate = self.stage.workload.learning_rate_at(self.work)
        masks_BKCU = self.search.ask(step).to(objective.device)
        tokens_BT = self.stage.train.batch(step, settings.windows)
        if self.search.needs_reading:
            reference_U = self._selected()
        else:
            reference_U = reference(settings.reference, self.search, self.initial_U, self.graded_U, self.stage.limits)
        losses_BKC, reference_BC, reading = evaluate_step(objective, self.search, masks_BKCU, tokens_BT, reference_U)
        finite, dropped = self._finite(losses_BKC, reference_BC, step)
        if dropped:
            masks_BKCU, losses_BKC = some_rows(masks_BKCU, finite), losses_BKC[finite]
            reference_BC = None if reference_BC is None else reference_BC[finite[0]]
            look = partial(objective.look, reference_U, tokens_BT[finite[0]])
            reading = reading and Reading(reading.losses_BKT[finite], look)
        stats = self.search.tell(
            masks_BKCU, losses_BKC, learning_rate=learning_rate, reference_BC=reference_BC, reading=reading
        )
        if not isinstance(stats, StepStats):
            raise ConfigError(
                f"search {self.stage.config.search.method} must give a StepStats in tell, but gave {stats!r:.100}"
            )
        self._check_policy(step)
        self._check_read(stats, step)
        self.work.step += 1
        self.work.sequences += self.stage.workload.step_sequences
        self.work.seconds += time.monotonic() - started
        started, workload = time.monotonic(), self.stage.workload
        over = workload.progress(self.work) >= 1
        ends = workload.round_ends(step)
        if over and not ends:  # conclude ends a round early
            ends = self.search.conclude() or self.work.asked_to_finish
        ended = self._probe(objective, tokens_BT, stats) if ends else {}
        if workload.fits(step) or self.search.drew_in:
            self.fit(self.search.probs_U)
        regret = ended.get("round", {}).get("regret", math.inf)
        self.work.settled = workload.regret is not None and regret < workload.regret
        if ends or self.search.drew_in:  # else time might end a round here that was not concluded
            self.work.seconds += time.monotonic() - started
        self._log(metrics, step, learning_rate, stats, dropped, ended)
        return stats

    def fit(self, probs_U: torch.Tensor) -> None:
        """Fit the weights to a policy, if they are to be."""
        if self.weights is not None:
            self.fitted_U = probs_U.clone()
            self.weights.fit(self.fitted_U)

    def _probe(self, objective: MaskedObjective, tokens_BT: torch.Tensor, stats: StepStats) -> dict[str, Any]:
        """What is known at the end of a round; and the loss of what would be selected now, on the text of the step."""
        found = self.search.diagnose(self.graded_U)
        if not isinstance(found, dict):
            raise ConfigError(
                f"search {self.stage.config.search.method} must give a dictionary in diagnose, but gave {found!r:.100}"
            )
        if self.stage.config.search.method not in METHODS:
            _check_known(self.stage.config.search.method, found)
        if self.stage.workload.probe_sequences:
            loss = objective.losses(self._selected()[None], tokens_BT).item()
            self.work.sequences += self.stage.workload.probe_sequences
            if math.isfinite(loss):  # JSON knows no other numbers
                found |= {"selected_loss": loss, "gap": stats.loss - loss}
        return {"round": found}

    def _selected(self) -> torch.Tensor:
        """What would be kept if the search ended now; cached, as built-in searches change it with rounds."""
        priorities_U = self.search.priorities_U
        if self.selected is None or not torch.equal(priorities_U, self.selected[0]):
            self.selected = priorities_U.clone(), current_selection(self.search, self.graded_U, self.stage.limits)
        return self.selected[1]

    def _check_policy(self, step: int) -> None:
        """Before anything is saved of it: a custom search that is mended goes on from what was."""
        probs_U, size = self.search.probs_U, self.stage.view.space.size
        fits = isinstance(probs_U, torch.Tensor) and probs_U.shape == (size,)
        if not fits or not bool(((probs_U >= 0) & (probs_U <= 1)).all()):
            left = f"{probs_U.min():g} to {probs_U.max():g}" if fits else f"{getattr(probs_U, 'shape', probs_U)!r:.100}"
            raise ConfigError(
                f"search {self.stage.config.search.method} must leave probs_U [{size}] in [0, 1], but left {left} in "
                f"step {step}"
            )

    def _check_read(self, stats: StepStats, step: int) -> None:
        """Activities that are not finite are as bad as losses; if they may be dropped, they were left out."""
        unread = stats.unread if isinstance(stats, PosteriorStats) else 0
        if unread and self.stage.config.search.non_finite == "error":
            raise LossError(
                f"activities in {unread} of {self.stage.config.search.windows} windows of step {step} are not finite; "
                "continued with search.non_finite=drop, the run leaves them out"
            )

    def _finite(
        self, losses_BKC: torch.Tensor, reference_BC: torch.Tensor | None, step: int
    ) -> tuple[tuple[Any, ...], int]:
        """Index of what may be learned from, and how many losses it leaves out."""
        finite_BK = losses_BKC.isfinite().all(-1)
        if reference_BC is not None:
            finite_BK = finite_BK & reference_BC.isfinite().all(-1)[:, None]
        settings = self.stage.config.search
        # Of one group of masks the others can stay; of several, the whole group goes, so that all have equally many.
        keep: tuple[Any, ...] = (slice(None), finite_BK[0]) if len(finite_BK) == 1 else (finite_BK.all(1), slice(None))
        dropped = losses_BKC[..., 0].numel() - losses_BKC[keep][..., 0].numel()
        if dropped and (settings.non_finite != "drop" or not losses_BKC[keep].numel()):
            # Antithetic masks on one text are told all together.
            possible = settings.non_finite == "error" and (len(finite_BK) > 1 or settings.sampling != "antithetic")
            raise LossError(
                f"{int((~finite_BK).sum())} of {finite_BK.numel()} losses of step {step} are not finite"
                + ("; continued with search.non_finite=drop, the run leaves such masks out" if possible else "")
            )
        return keep, dropped

    def _log(
        self,
        metrics: TextIO,
        step: int,
        learning_rate: float,
        stats: StepStats,
        dropped: int,
        ended: dict[str, Any],
    ) -> None:
        record = {
            "step": step,
            "sequences": self.work.sequences,
            "seconds": round(self.work.seconds, 3),
            **({} if self.stage.config.search.method == "posterior" else {"learning_rate": learning_rate}),
            **stats.to_dict(),
            "dropped": dropped,
            **ended,
        }
        metrics.write(json.dumps(record) + "\n")

    def save_is_due(self) -> bool:
        settings = self.stage.config.search
        by_step = settings.checkpoint_steps is not None and self.work.step % settings.checkpoint_steps == 0
        return by_step or time.monotonic() - self.saved_at >= settings.checkpoint_seconds

    def save(self, metrics: TextIO) -> None:
        """Write a checkpoint, after the metrics it vouches for are safe."""
        state = {
            "work": asdict(self.work),
            "text_sha256": self.stage.text_sha256,
            "search": self.search.state_dict(),
            "fitted_U": self.fitted_U,
        }
        sync_stream(metrics)
        write_checkpoint(self.folder.checkpoints, self.work.step, state)
        self.saved_at = time.monotonic()


def _check_known(method: str, found: dict[str, Any]) -> None:
    """Raises ``ConfigError`` if a custom search's diagnostics are not JSON, or one has the name of a built-in one and
    another type."""
    try:
        json.dumps(found, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"search {method} must give plain data in diagnose, but {error}") from None
    for name, value in found.items():
        by_kind = isinstance(value, dict) and all(isinstance(number, int | float) for number in value.values())
        if name in ("signal_to_noise", "agreement") and not by_kind:
            raise ConfigError(f"search {method} must give {name} in diagnose for each kind, but gave {value!r:.100}")
        if name in ("regret", "gap") and not isinstance(value, int | float):
            raise ConfigError(f"search {method} must give a number as {name} in diagnose, but gave {value!r:.100}")


def _restore(folder: RunFolder, search: MaskSearch, text_sha256: str) -> tuple[Work, torch.Tensor | None]:
    """What was done, and the keep probabilities that weights were fitted to."""
    state = read_checkpoint(folder.checkpoints, ("work", "text_sha256", "search", "fitted_U"), text_sha256)
    if state is None:
        return Work(), None
    search.load_state_dict(state["search"])
    work = Work(**state["work"])
    logger.info("continuing at step %d", work.step)
    return work, state["fitted_U"]
