"""What a metric is, and what it is given: a model, text, and a few settings in; a score a unit out.

Letters: U units, W windows, T tokens.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bernprune.backends import MaskedOps
from bernprune.errors import ConfigError, ModelError
from bernprune.models.view import ModelView
from bernprune.names import Allocation, Kind, check_name
from bernprune.units import KINDS

logger = logging.getLogger(__name__)

PARTS: tuple[Kind, ...] = ("kv_group", "channel")
BLOCKS: tuple[Kind, ...] = ("layer", "attention", "ffn")


@dataclass(frozen=True)
class Options:
    """What else a metric may be told.

    Attributes:
        sparsity: share of units that it is to suppose removed, where it supposes some to be.
        pruned_inputs: whether a metric that goes layer by layer scores each on what the already pruned earlier ones
            hand on, every kind in every layer losing that share of its units (Wanda-sp as published).
        pairs: differences of losses that are taken of each window, where a gradient is estimated from some.
        step: how far to either side they are taken; by default the metric's own.
        cost_power: scores are divided by this power of what a unit costs, in parameters; by default the metric's own.
        members: metrics that a fusion fuses; by default its own.
        kinds: of the units that are scored, where the cost depends on them.
    """

    sparsity: float = 0.3
    pruned_inputs: bool = False
    pairs: int = 8
    step: float | None = None
    cost_power: float | None = None
    members: tuple["Metric", ...] = ()
    kinds: tuple[Kind, ...] = KINDS

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"the share of units to suppose removed must be 0 or more, and below 1: {self.sparsity}")
        if self.pairs < 1:
            raise ConfigError(f"at least one difference must be taken of each window, but pairs is {self.pairs}")
        if self.step is not None and not self.step > 0:
            raise ConfigError(f"the step of differences must be above 0, but is {self.step}")


@dataclass(frozen=True)
class Context:
    """What a metric is given.

    Attributes:
        windows_WT: calibration text, int64.
        seed: that of all that is drawn.
        rows_per_forward: windows that are run at once.
        notes: figures that it leaves along with its scores, such as how sure they are.
    """

    view: ModelView
    windows_WT: torch.Tensor
    seed: int
    ops: MaskedOps
    rows_per_forward: int
    options: Options
    notes: dict[str, float] = field(default_factory=dict)


def _any_model(view: ModelView, windows_WT: torch.Tensor) -> None:
    pass


def _one_pass(layers: int, options: Options) -> float:
    return 1.0


@dataclass(frozen=True)
class Metric:
    """A way to score units, larger is kept, by its name.

    Attributes:
        about: what it says of a unit, in one line.
        source: author and year.
        run: scores of all units, ``[U]``; those of kinds that it does not know may be anything, and become 0.
        kinds: those that it can score.
        allocation: how many units each layer keeps if nothing else is said. It follows from how far the values compare:
            within a layer and kind (``uniform``), a kind (``global``), or all over the model (``pooled``).
        passes: how often the calibration text is run forward, by the number of layers.
        gradients: whether it back-propagates, layer by layer, which costs as much as three passes more.
        plain: whether it needs weights that can be moved or differentiated by, which quantised ones cannot.
        reads: fields of ``Options`` that it looks at, and only some metrics do.
        layerwise: whether it goes layer by layer, so that inputs of pruned layers have a meaning for it.
        cost_power: see ``Options``.
        standardised: whether it says how far a unit is from the others and not what it is worth, which could be divided
            by what it costs.
        needs: raises ``ConfigError`` or ``ModelError`` if it cannot score a model, or not on so little text.
    """

    name: str
    about: str
    source: str
    run: Callable[[Context], torch.Tensor]
    kinds: tuple[Kind, ...] = KINDS
    allocation: Allocation = "uniform"
    passes: Callable[[int, Options], float] = _one_pass
    gradients: bool = False
    plain: bool = False
    reads: tuple[str, ...] = ()
    layerwise: bool = False
    cost_power: float = 0.0
    standardised: bool = False
    needs: Callable[[ModelView, torch.Tensor], None] = _any_model

    def __post_init__(self) -> None:
        check_name("allocation", self.allocation, Allocation)

    def forwards(self, layers: int, options: Options) -> float:
        """What it costs, in forward passes over the calibration text; layers that are pruned in turn run twice."""
        passes = self.passes(layers, options)
        return passes * (2 if options.pruned_inputs else 4 if self.gradients else 1)

    def check(self, kinds: tuple[Kind, ...], options: Options) -> None:
        """Raises ``ConfigError`` if it cannot score the kinds, or not with these options."""
        unknown = [kind for kind in kinds if kind not in self.kinds]
        if unknown:
            raise ConfigError(
                f"score {self.name!r} cannot rank units of kind {', '.join(unknown)}, only {', '.join(self.kinds)}; "
                "change the granularity, or take another score"
            )
        if options.pruned_inputs and not self.layerwise:
            raise ConfigError(
                f"score {self.name!r} does not go layer by layer, so inputs of pruned layers mean nothing to it; "
                "use inputs 'dense', or another score"
            )
        if options.cost_power and self.standardised:
            raise ConfigError(
                f"score {self.name!r} is standardised, so about half of its values are negative, and cannot be divided "
                "by costs; leave initial.cost_power out, or take another score"
            )

    def check_model(self, view: ModelView, windows_WT: torch.Tensor) -> None:
        """Raises ``ModelError`` or ``ConfigError`` if it cannot score the model on the text ``[W, T]``."""
        if view.opaque is not None and (self.plain or self.gradients):
            raise ModelError(
                f"score {self.name!r} needs plain weights, but {view.opaque}; take another score, or search.dtype "
                "'same'"
            )
        self.needs(view, windows_WT)


def run_metric(metric: Metric, context: Context) -> torch.Tensor:
    """As ``checked_scores``, and divided by a power of costs; what the metric has noted is checked, too."""
    scores_U = checked_scores(metric, context)
    for name, value in context.notes.items():
        context.notes[name] = _checked_note(metric, name, value)
        logger.info("score %s: %s %.4g", metric.name, name, context.notes[name])
    power = metric.cost_power if context.options.cost_power is None else context.options.cost_power
    return scores_U / context.view.space.within_U**power if power else scores_U


def _checked_note(metric: Metric, name: str, value: Any) -> float:
    """A note as a plain number, as reports are written long after the metric has run. Raises ``ConfigError``."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"score {metric.name!r} must note finite numbers, but notes as {name!r} {value!r:.100}")
    return number


def checked_scores(metric: Metric, context: Context) -> torch.Tensor:
    """What a metric gives, float64 ``[U]``; 0 for kinds that it does not know, so that it says nothing of them.

    Raises:
        ConfigError: not one number a unit.
        ModelError: a number that is not finite.
    """
    space, scores_U = context.view.space, metric.run(context).detach().double().cpu()
    if scores_U.shape != (space.size,):
        raise ConfigError(
            f"score {metric.name!r} must give {space.size} numbers, one a unit, but gave {list(scores_U.shape)}"
        )
    for kind in set(space.kinds) - set(metric.kinds):
        scores_U[space.of_kind(kind)] = 0.0
    if not scores_U.isfinite().all():
        group = space.groups[int(space.group_U[~scores_U.isfinite()][0])]
        raise ModelError(
            f"score {metric.name!r} is not finite in layer {group.layer} for a {group.kind}, or leaves it out"
        )
    return scores_U


def not_finite(layer: int) -> ModelError:
    """That a layer has activations by which nothing can be scored."""
    return ModelError(
        f"the activations of layer {layer} are not finite on the calibration text, so it cannot be scored"
    )
