"""Repair as part of a run: on which text, by which method, and what the report says of it.

Weights are fitted on the first windows that the search reads. Other windows judge: of the text that is kept back from
the search, if some is; otherwise those that come after what the search reads or, if there are none, after the fitted
ones. None is of the text that the run is evaluated on.
"""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bernprune.backends import MaskedOps
from bernprune.config import RunConfig
from bernprune.data import TokenWindows, text_fingerprint
from bernprune.errors import BernpruneError, ConfigError, DataError
from bernprune.evaluation.perplexity import check_window
from bernprune.models.masking import choose_ops
from bernprune.models.slicing import plan_hash
from bernprune.models.view import ModelView, describe
from bernprune.names import AUTO_REPAIRS, RepairName
from bernprune.objective import masked_objective
from bernprune.repair import ExpectedWeights, Repair, Repairer
from bernprune.repair.needs import check_biases, check_tokens
from bernprune.run.stage import Stage, read_texts, rows_per_forward
from bernprune.run.workload import (
    LEAST_JUDGING,
    finalist_windows,
    fitting_windows,
    judging_windows,
    repair_windows,
)
from bernprune.storage import write_json
from bernprune.units import KeepPlan

logger = logging.getLogger(__name__)

_LEAST_FITTING = 2  # one to fit on and one to check
_LESS: tuple[RepairName, ...] = ("scale",)  # where the text is too short for either


@dataclass(frozen=True)
class Workshop:
    """What a run repairs with, and the windows by which it judges."""

    method: RepairName
    repairer: Repairer
    judging_WT: torch.Tensor
    ops: MaskedOps

    @classmethod
    def of(
        cls,
        config: RunConfig,
        view: ModelView,
        train: TokenWindows,
        ops: MaskedOps,
        rows: int,
        kept_back: TokenWindows | None = None,
        learned: int = 0,
    ) -> "Workshop":
        """Raises ``DataError`` or ``ConfigError`` if the method asked for may be impossible for what will be kept.

        Args:
            kept_back: windows that nothing was learned from, which judge, if there are any.
            learned: windows that were learned from, the first ones; others judge, if there are enough.
        """
        settings = config.repair
        fitting_WT, judging_WT = _shared_out(train, kept_back, repair_windows(config, view.architecture), learned)
        repairer = Repairer(
            view,
            fitting_WT,
            target=settings.target,
            ridges=settings.ridges,
            biases=settings.biases == "always" or (settings.biases == "auto" and settings.method == "bias"),
            rows_per_forward=rows,
        )
        if settings.method == "bias" and not repairer.biases:
            check_biases(view)
        if settings.method not in ("auto", "none"):
            check_tokens(view.architecture, repairer.windows_WT.shape, settings.method)
        return cls(settings.method, repairer, judging_WT, ops)

    @classmethod
    def of_stage(cls, stage: Stage, steps: int | None = None) -> "Workshop":
        """The workshop of a run. Raises as ``of`` does.

        Args:
            steps: that the search has taken; by default those that are planned, if any are.
        """
        taken = (stage.workload.steps or 0) if steps is None else steps
        learned = taken * stage.config.search.windows
        return cls.of(stage.config, stage.view, stage.train, stage.ops, stage.rows, stage.kept_back, learned)

    @classmethod
    def of_model(cls, config: RunConfig, model: Any, stream_N: torch.Tensor) -> "Workshop":
        """A workshop without a run, on the windows of ``repair_text`` that one with these settings would read first."""
        view = describe(model)
        ops = choose_ops(config.backend, view)
        train = TokenWindows(stream_N, window=config.data.window, seed=config.seed)
        return cls.of(config, view, train, ops, rows_per_forward(config, view))

    def losses(self, plan: KeepPlan) -> torch.Tensor:
        """Losses of what a plan leaves of the model as it is now, on the judging windows, float64 ``[W]``."""
        view = self.repairer.view
        with masked_objective(view, self.ops, rows_per_forward=self.repairer.rows_per_forward) as objective:
            return objective.window_losses(view.space.mask(plan)[None], self.judging_WT)[0]

    @property
    def quick(self) -> Repairer:
        """What repairs finalists, on less text, to judge them."""
        view, windows_WT = self.repairer.view, self.repairer.windows_WT
        count = finalist_windows(view.architecture, windows_WT.shape[1], len(windows_WT))
        return replace(self.repairer, windows_WT=windows_WT[:count])

    def prefer(self, plans: Mapping[str, KeepPlan], path: Path | None = None) -> tuple[str, dict[str, float | None]]:
        """Which of several plans has the least loss once it is repaired, and the mean loss of each then.

        For ``auto`` the plainest of what it tries decides; with ``none`` each is judged as it is. The model is left as
        it was.

        Args:
            path: of a JSON file that holds the losses so far, as each may take long.
        """
        known, losses = _read_losses(path, self._judges), dict[str, float]()
        for name, plan in plans.items():
            number = plan_hash(plan)
            if number in known:
                losses[name] = known[number]
                continue
            losses[name], repaired = self._loss_repaired(name, plan)
            if repaired and math.isfinite(losses[name]):  # with more memory, say, another could be repaired, too
                known[number] = losses[name]
                if path is not None:
                    write_json(path, {**self._judges, "losses": known})
        return min(losses, key=lambda name: losses[name] if math.isfinite(losses[name]) else math.inf), _finite(losses)

    @property
    def _judges(self) -> dict[str, Any]:
        """What decides about the loss of a finalist, beside its plan and the model."""
        quick = self.quick
        return {
            "method": self.method,
            "target": quick.target,
            "ridges": list(quick.ridges),
            "biases": quick.biases,
            "fitted": text_fingerprint(quick.windows_WT),
            "judged": text_fingerprint(self.judging_WT),
        }

    def _loss_repaired(self, name: str, plan: KeepPlan) -> tuple[float, bool]:
        """Mean loss of a finalist after its repair, and whether it was repaired. If it cannot be, ``auto`` would leave
        it as it is; by a method that was asked for it could not be had at all, and just loses."""
        if self.method == "none":
            return self.losses(plan).mean().item(), True
        logger.info("repairing the finalist %r, to judge it", name)
        done = None
        try:
            done = self.quick.repair(plan, self._possible(plan)[0] if self.method == "auto" else self.method)
        except (BernpruneError, torch.OutOfMemoryError) as error:
            judged = "is judged as it is" if self.method == "auto" else "loses"
            logger.warning("the finalist %r %s, as it cannot be repaired: %s", name, judged, error)
            if self.method != "auto":
                return math.inf, False
        try:  # out of the handler, in which an error holds on to what filled a GPU
            return self.losses(plan).mean().item(), done is not None
        finally:
            if done is not None:
                done.undo()

    def repair(self, plan: KeepPlan) -> dict[str, Any]:
        """Repair the live model for a plan; returns what the report says of it."""
        logger.info("repairing by %r what is kept", self.method)
        started = time.monotonic()
        done, losses = self._repair(plan)
        if self.method != "auto" and not losses[self.method] <= losses["none"]:
            logger.warning(
                "repair %r raised the loss from %.4f to %.4f on text that it was not fitted on",
                self.method,
                losses["none"],
                losses[self.method],
            )
        return {**self._record(done, losses), "seconds": round(time.monotonic() - started, 2)}

    def _repair(self, plan: KeepPlan) -> tuple[Repair | None, dict[str, float]]:
        """What was done, and the mean losses of what was tried."""
        if self.method == "auto":
            for error in self._impossible(plan).values():
                logger.warning("%s", error)
            return self.repairer.best(plan, self._possible(plan), lambda: self.losses(plan))
        before = self.losses(plan).mean().item()
        done = self.repairer.repair(plan, self.method)
        with done.originals.put_back_on_error():
            return done, {"none": before, self.method: self.losses(plan).mean().item()}

    def _possible(self, plan: KeepPlan) -> tuple[RepairName, ...]:
        """Those of the methods that ``auto`` tries for which there is text enough; if none, ``scale``."""
        return tuple(method for method in AUTO_REPAIRS if method not in self._impossible(plan)) or _LESS

    def _impossible(self, plan: KeepPlan) -> dict[RepairName, DataError]:
        """Those for which there is not text enough, and why."""
        errors: dict[RepairName, DataError] = {}
        for method in AUTO_REPAIRS:
            try:
                check_tokens(plan.architecture, self.repairer.windows_WT.shape, method, plan.layers)
            except DataError as error:
                errors[method] = error
        return errors

    def _record(self, done: Repair | None, losses: Mapping[str, float]) -> dict[str, Any]:
        chosen = "none" if done is None else done.method
        return {
            "method": self.method,
            "chosen": chosen,
            "losses": _finite(losses),
            "windows": len(self.repairer.windows_WT),
            "finalist_windows": len(self.quick.windows_WT),
            "judging_windows": len(self.judging_WT),
            "target": self.repairer.target,
            "layers": [] if done is None else done.layers,
        }


def policy_windows(stage: Stage) -> int:
    """Windows on which weights are fitted to a policy, the first ones; 0 where none are."""
    if not stage.config.fits_to_policy:
        return 0
    return min(fitting_windows(stage.view.architecture, stage.train.window), stage.train.num_windows)


@contextmanager
def expected_weights(stage: Stage) -> Iterator[ExpectedWeights | None]:
    """For the length of the block, weights of the live model that can be fitted to a policy; None if none are to be."""
    count = policy_windows(stage)
    if not count:
        yield None
        return
    weights = ExpectedWeights(stage.view, stage.train.windows(0, count), rows_per_forward=stage.rows)
    try:
        yield weights
    finally:
        weights.undo()


def repair_text(config: RunConfig, tokenizer: Any, model_config: Any) -> torch.Tensor:
    """What a run with these settings would learn from, int64 ``[N]``, for a repair without one.

    Raises:
        DataError: text that is missing, or windows that the model cannot take.
        ConfigError: finalists that are to be judged, as there are none.
    """
    if config.repair.judge_finalists:
        raise ConfigError("repair.judge_finalists has no meaning where a plan is applied, which has no rivals")
    check_window(model_config, config.data.window)
    return read_texts(config, tokenizer, model_config.vocab_size)[0]


def _shared_out(
    train: TokenWindows, kept_back: TokenWindows | None, fitted: int, learned: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to fit on, at most so many, and others to judge by; with little text, a third as many.

    Raises:
        DataError: there are not two of each.
    """
    judging, available = judging_windows(fitted), train.num_windows
    if kept_back is not None:
        judging, fitted = min(judging, kept_back.num_windows), min(fitted, available)
        return train.windows(0, fitted), kept_back.windows(0, judging)
    if fitted + judging > available:
        judging = min(judging, max(LEAST_JUDGING, available // 4))
    fitted = min(fitted, available - judging)
    if fitted < _LEAST_FITTING:
        raise DataError(
            f"repair needs at least {_LEAST_FITTING + LEAST_JUDGING} windows of {train.window} tokens of "
            f"calibration text, but there are {available}; give more text, or repair.method 'none'"
        )
    first = max(fitted, min(learned, available - judging))
    return train.windows(0, fitted), train.windows(first, judging)


def _read_losses(path: Path | None, judges: Mapping[str, Any]) -> dict[str, float]:
    """Losses by plans' hashes, as stored; none if others judged there, or the file is damaged."""
    try:
        stored = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
        if all(stored[name] == value for name, value in judges.items()):
            return {str(number): float(loss) for number, loss in stored["losses"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return {}


def _finite(losses: Mapping[str, float]) -> dict[str, float | None]:
    """Losses as JSON can hold them."""
    return {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}
