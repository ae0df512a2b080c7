"""Repair as part of a run: on which text, by which method, and what the report says of it.

The windows are the first that the search reads. The last of them are not fitted on: they judge. None is of the text
that the run is evaluated on.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bernprune.backends import MaskedOps, load_backend
from bernprune.config import RunConfig
from bernprune.data import TokenWindows, tokenize
from bernprune.errors import DataError
from bernprune.evaluation.perplexity import check_window
from bernprune.models.view import ModelView, describe
from bernprune.names import RepairName
from bernprune.objective import masked_objective
from bernprune.repair import Repair, Repairer
from bernprune.repair.needs import check_biases, check_tokens, needed_windows
from bernprune.run.stage import Stage, rows_per_forward
from bernprune.text import load_documents
from bernprune.units import KeepPlan

logger = logging.getLogger(__name__)

_WINDOWS = 128
_JUDGED = 4  # of so many windows, one judges
_AUTO: tuple[RepairName, ...] = ("ridge", "two-step")
_LESS: tuple[RepairName, ...] = ("scale",)  # where the text is too short for either


@dataclass(frozen=True)
class Workshop:
    """What a run repairs with, and the windows by which it judges."""

    method: RepairName
    repairer: Repairer
    judging_WT: torch.Tensor
    ops: MaskedOps

    @classmethod
    def of(cls, config: RunConfig, view: ModelView, train: TokenWindows, ops: MaskedOps, rows: int) -> "Workshop":
        """Raises ``DataError`` or ``ConfigError`` if the method asked for may be impossible for what will be kept."""
        settings, window = config.repair, train.window
        widest = max(max(layer.output.in_features, layer.down.in_features) for layer in view.layers)
        fitted = settings.windows or max(_WINDOWS, needed_windows(widest, window))
        judging = -(-fitted // (_JUDGED - 1))
        if fitted + judging > train.num_windows:
            judging = max(1, train.num_windows // _JUDGED)
        count = min(fitted + judging, train.num_windows)
        if count < 3:
            raise DataError(
                f"repair needs at least 3 windows of {window} tokens of calibration text, but there are "
                f"{train.num_windows}; give more text, or repair.method 'none'"
            )
        windows_WT = train.windows(0, count)
        repairer = Repairer(
            view,
            windows_WT[:-judging],
            target=settings.target,
            ridges=settings.ridges,
            biases=settings.biases == "always" or (settings.biases == "auto" and settings.method == "bias"),
            rows_per_forward=rows,
        )
        if settings.method == "bias" and not repairer.biases:
            check_biases(view)
        if settings.method not in ("auto", "none"):
            check_tokens(view.architecture, repairer.windows_WT.shape, settings.method)
        return cls(settings.method, repairer, windows_WT[-judging:], ops)

    @classmethod
    def of_stage(cls, stage: Stage) -> "Workshop | None":
        """None where nothing is to be repaired."""
        if stage.config.repair.method == "none":
            return None
        return cls.of(stage.config, stage.view, stage.train, stage.ops, stage.rows)

    @classmethod
    def of_model(cls, config: RunConfig, model: Any, tokenizer: Any) -> "Workshop | None":
        """Without a run: on the whole text, in windows as a run would read them."""
        if config.repair.method == "none":
            return None
        check_window(model.config, config.data.window)
        documents = load_documents(config.data.text, split="train", max_characters=config.data.max_characters)
        stream_N = tokenize(tokenizer, documents, vocab_size=model.config.vocab_size)
        view, ops = describe(model), load_backend(config.backend, model.device)
        train = TokenWindows(stream_N, window=config.data.window, seed=config.seed)
        return cls.of(config, view, train, ops, rows_per_forward(config, view))

    def losses(self, plan: KeepPlan) -> torch.Tensor:
        """Of what a plan leaves of the model as it is now, on the judging windows, float64 ``[W]``."""
        view = self.repairer.view
        with masked_objective(view, self.ops, rows_per_forward=self.repairer.rows_per_forward) as objective:
            return objective.window_losses(view.space.mask(plan)[None], self.judging_WT)[0]

    def prefer(self, plans: Mapping[str, KeepPlan]) -> tuple[str, dict[str, float | None]]:
        """Which of several plans is the best once it is repaired, and the mean loss of each then.

        The first must be beaten by a standard error of the mean difference. The model is left as it was.
        """
        best, first_W, losses = next(iter(plans)), torch.empty(0), dict[str, float]()
        for name, plan in plans.items():
            done, _ = self._repair(plan)
            try:
                losses_W = self.losses(plan)
            finally:
                if done is not None:
                    done.undo()
            losses[name] = losses_W.mean().item()
            first_W = first_W if len(first_W) else losses_W
            gains_W = first_W - losses_W
            if gains_W.mean() > gains_W.std() / len(gains_W) ** 0.5 and losses[name] < losses[best]:
                best = name
        return best, _finite(losses)

    def repair(self, plan: KeepPlan) -> dict[str, Any]:
        """Repair the live model for a plan; what the report says of it."""
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
            return self.repairer.best(plan, self._possible(plan), lambda: self.losses(plan))
        before = self.losses(plan).mean().item()
        done = self.repairer.repair(plan, self.method)
        with done.originals.put_back_on_error():
            return done, {"none": before, self.method: self.losses(plan).mean().item()}

    def _possible(self, plan: KeepPlan) -> tuple[RepairName, ...]:
        """Of the methods that ``auto`` tries, those for which there is text enough."""
        return tuple(filter(lambda method: self._fits(plan, method), _AUTO)) or _LESS

    def _fits(self, plan: KeepPlan, method: RepairName) -> bool:
        try:
            check_tokens(plan.architecture, self.repairer.windows_WT.shape, method, plan.layers)
        except DataError as error:
            logger.warning("%s", error)
            return False
        return True

    def _record(self, done: Repair | None, losses: Mapping[str, float]) -> dict[str, Any]:
        chosen = "none" if done is None else done.method
        return {
            "method": self.method,
            "chosen": chosen,
            "losses": _finite(losses),
            "windows": len(self.repairer.windows_WT),
            "judging_windows": len(self.judging_WT),
            "target": self.repairer.target,
            "layers": [] if done is None else done.layers,
        }


def _finite(losses: Mapping[str, float]) -> dict[str, float | None]:
    """As JSON can hold them."""
    return {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}
