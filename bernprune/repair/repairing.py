"""Repair of a dense model for a plan, in place: what is left of it makes up for what will be cut, without training.

Layer by layer, a stream of text through the dense model says what a projection should give, one through the model
repaired so far what it takes in. The last projection of each branch no longer reads what the plan removes,
so that the model computes what it will when it is sliced.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bernprune.errors import BernpruneError, ConfigError
from bernprune.models.hooks import evaluating
from bernprune.models.view import ModelView
from bernprune.names import RIDGES, RepairName, TargetName, check_name
from bernprune.progress import followed
from bernprune.repair.fitting import Fitter
from bernprune.repair.needs import CHECKED, check_biases, check_tokens
from bernprune.repair.pairs import Pair
from bernprune.repair.places import Place, check_places, places
from bernprune.repair.weights import Weights, put
from bernprune.units import KeepPlan

logger = logging.getLogger(__name__)


@dataclass
class Repair:
    """What was done to a model.

    Attributes:
        layers: for each layer and branch, what was chosen for its last projection, and under ``first`` for those before
            it if they were refitted, as in ``fitting.Choice``; None where the whole branch goes.
        originals: weights and biases as they were, of all that was changed.
    """

    method: RepairName
    layers: list[dict[str, Any]] = field(default_factory=list)
    originals: Weights = field(default_factory=Weights)

    def undo(self) -> None:
        """Give the model back the weights that it had, to the bit."""
        self.originals.put_back()


@dataclass(frozen=True)
class Repairer:
    """Repairs of one model on the same text.

    Args:
        windows_WT: calibration text, int64; every fourth window chooses between what is fitted on the others.
        target: what a projection's outputs are fitted to; see ``Pair.last``. ``bias`` and ``scale`` go by ``own``.
        ridges: to choose from, relative to the mean square of an input.
        biases: whether projections may get a bias that the family does not know.
        rows_per_forward: windows that are run at once.
    """

    view: ModelView
    windows_WT: torch.Tensor
    target: TargetName = "residual"
    ridges: Sequence[float] = RIDGES
    biases: bool = False
    rows_per_forward: int = 64

    def repair(self, plan: KeepPlan, method: RepairName) -> Repair:
        """Change the weights of the live model for what ``plan`` keeps, and say what was done.

        On an error, and on Ctrl-C, the model is what it was before.

        Raises:
            ConfigError: a method that is unknown or is none, or that needs a bias where there may be none; a target,
                ridges or windows that cannot be.
            DataError: text that is too short, with how much is needed.
            ModelError: a plan of another model, quantised weights, or activations that are not finite.
        """
        self._check(plan, method)
        done = Repair(method)
        with evaluating(self.view.model), done.originals.put_back_on_error():
            self._run(plan, method, done)
        return done

    def best(
        self, plan: KeepPlan, methods: Sequence[RepairName], judge: Callable[[], torch.Tensor]
    ) -> tuple[Repair | None, dict[str, float]]:
        """Try several methods and leave the model with the one that ``judge`` prefers; None leaves it as it was.

        Args:
            judge: losses of the pruned model as it is now, on windows that are not those of the repair, ``[W]``. No
                repair at all must be clearly worse.

        Returns the repair, and the mean loss of each method that could be tried, nats per token, ``none`` among them.
        """
        losses_W = judge()
        best = None
        repaired = Weights()
        found = {"none": losses_W.mean().item()}
        for method in methods:
            try:
                done = self.repair(plan, method)
            except (BernpruneError, torch.OutOfMemoryError) as error:
                logger.warning("repair %r was not tried: %s", method, error)
                continue
            with done.originals.put_back_on_error():
                repaired_W = judge()
                found[method] = repaired_W.mean().item()
                if clearly_better(repaired_W, losses_W) and (best is None or found[method] < found[best.method]):
                    best, repaired = done, Weights()
                    done.originals.exchange(repaired)
                else:
                    done.undo()
        if best is not None:
            with best.originals.put_back_on_error():
                repaired.exchange(best.originals)
        return best, found

    def _check(self, plan: KeepPlan, method: RepairName) -> None:
        check_name("repair", method, RepairName)
        if method in ("none", "auto"):
            raise ConfigError(f"repair {method!r} is no method; take one of bias, ridge, two-step, scale, admm")
        check_name("repair target", self.target, TargetName)
        if not self.ridges or not all(0 < ridge < math.inf for ridge in self.ridges):
            raise ConfigError(f"ridges must be one or more numbers above 0, but are {list(self.ridges)}")
        if self.rows_per_forward < 1:
            raise ConfigError(f"rows_per_forward must be 1 or more, but is {self.rows_per_forward}")
        self.view.check_windows(self.windows_WT)
        check_places(self.view, plan)
        if method == "bias" and not self.biases:
            check_biases(self.view)
        check_tokens(plan.architecture, self.windows_WT.shape, method, plan.layers)

    def _run(self, plan: KeepPlan, method: RepairName, done: Repair) -> None:
        checking_W = torch.arange(len(self.windows_WT)) % CHECKED == CHECKED - 1
        checking_W[-1] |= not checking_W.any()
        fit, check = (
            Pair(self.view, self.windows_WT[chosen_W], rows_per_forward=self.rows_per_forward)
            for chosen_W in (~checking_W, checking_W)
        )
        fitter = Fitter(fit, check, method, self.target, tuple(self.ridges), self.biases)
        for layer in followed(range(len(self.view.layers)), f"repair {method}", unit="layer"):
            branches = places(self.view, plan, layer)
            for pair in (fit, check):
                pair.enter(branches)
            done.layers.append({place.branch: _repaired(fitter, place, done.originals) for place in branches})
            for pair in (fit, check):
                pair.leave()


def clearly_better(losses_W: torch.Tensor, others_W: torch.Tensor) -> bool:
    """Whether losses on the same windows, two or more, are lower by more than a standard error of the mean difference.

    Losses that are finite are better than ones that are not.
    """
    if not losses_W.isfinite().all() or not others_W.isfinite().all():
        return bool(losses_W.isfinite().all())
    gains_W = others_W - losses_W
    return bool(gains_W.mean() > gains_W.std() / len(gains_W) ** 0.5)


def _repaired(fitter: Fitter, place: Place, originals: Weights) -> dict[str, Any] | None:
    originals.keep(place.last)
    if not place.units:
        put(place.last, torch.zeros_like(place.last.weight), None if place.last.bias is None else 0 * place.last.bias)
        return None
    record = {}
    if fitter.method == "two-step":
        originals.keep(*(projection for projection, _ in place.first))
        record["first"] = asdict(fitter.first(place))
    return asdict(fitter.last(place)) | record
