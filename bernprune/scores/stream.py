"""Metrics that go layer by layer: what is gathered of a layer is used, and dropped, before the next one runs.

A unit's importance shows at the projection that reads it: kv groups at the attention output projection, channels at
the FFN down projection. A metric may score the columns of such a weight; units follow by averaging.

Letters: D, E output and input width of a projection, U units.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bernprune.errors import ConfigError
from bernprune.models.linear import weight_of
from bernprune.models.masking import masked
from bernprune.models.statistics import POINTS, RunningMoments, moments
from bernprune.models.streaming import LayerStream
from bernprune.models.view import LayerView, ModelView
from bernprune.names import Kind
from bernprune.progress import followed
from bernprune.scores.base import Context, not_finite
from bernprune.units import UnitSpace

COUPLED: dict[Kind, tuple[str, ...]] = {  # projections that hold a unit: columns of the last, rows of others
    "kv_group": ("query", "key", "value", "output"),
    "channel": ("gate", "up", "down"),
}
_KINDS: dict[str, Kind] = {"output": "kv_group", "down": "channel"}


@dataclass(frozen=True)
class Projection:
    """What a metric of columns may look at.

    Attributes:
        weight_DE: float32 weight of the attention output (``kind`` kv_group) or FFN down projection (channel).
        inputs: moments of its input over the calibration text.
        seed: for metrics that draw numbers.
    """

    weight_DE: torch.Tensor
    inputs: RunningMoments
    kind: Kind
    layer: int
    seed: int


def projection_of(view: ModelView, layer: LayerView, name: str) -> nn.Linear:
    """A projection of a layer by its name in ``Family``; what is masked for the moment is shown as it is without."""
    block = layer.attention if name in ("query", "key", "value") else layer.ffn
    return getattr(layer, name) if name in POINTS else getattr(block, getattr(view.family, name))


@dataclass(frozen=True)
class LayerPass:
    """What a metric of layers is given for each: it hooks what it likes, and then calls ``run``, once.

    Attributes:
        run: sends all windows through the layer.
    """

    context: Context
    index: int
    run: Callable[[], None]

    @property
    def view(self) -> ModelView:
        return self.context.view

    @property
    def layer(self) -> LayerView:
        return self.view.layers[self.index]

    def moments(self, inputs: tuple[str, ...], outputs: tuple[str, ...] = ()) -> dict[str, RunningMoments]:
        """Run the layer; returns moments of what enters and leaves projections, by their names in ``Family``.

        Raises:
            ConfigError: nothing came by.
            ModelError: something was not finite.
        """
        with moments(
            {name: self.projection(name) for name in inputs}, {n: self.projection(n) for n in outputs}
        ) as seen:
            self.run()
        for statistics in seen.values():
            self.check(statistics)
        return seen

    def projection(self, name: str) -> nn.Linear:
        """The projection ``query``, ``key``, ``value``, ``output``, ``gate``, ``up`` or ``down``."""
        return projection_of(self.view, self.layer, name)

    def weight(self, name: str) -> torch.Tensor:
        """Weight of a projection, float64 ``[D, E]`` on the model's device; also of a quantised one."""
        return weight_of(self.projection(name), self.view.model.dtype).double()

    def check(self, statistics: RunningMoments) -> None:
        """Raises unless there is something to score on."""
        if not statistics.count:
            raise ConfigError(
                f"no calibration text reached layer {self.index}: scores cannot be taken while the model is under masks"
            )
        if not statistics.second_moment_E.isfinite().all():
            raise not_finite(self.index)


Scores = Mapping[Kind, torch.Tensor]  # by kind, of the units of one layer
Score = Callable[[Projection], torch.Tensor]  # of the columns of one projection, [E]
LayerScore = Callable[[LayerPass], Scores]


def by_layer(score: LayerScore) -> Callable[[Context], torch.Tensor]:
    """A metric that goes layer by layer, in one pass over the text, or in two if each layer is pruned meanwhile."""

    def run(context: Context) -> torch.Tensor:
        view, rows = context.view, context.rows_per_forward
        stream = LayerStream(view, context.windows_WT, rows_per_forward=rows)
        scores_U = torch.full((view.space.size,), math.nan, dtype=torch.float64)  # what is left out is found out
        pruned = context.options.pruned_inputs

        def go_through(index: int) -> None:
            if stream.index != index:
                raise ConfigError("a metric of layers runs each once: hook all that it looks at, and then run it")
            stream.advance()

        for index in followed(range(len(view.layers)), "score", unit="layer"):
            at = LayerPass(context, index, stream.run if pruned else functools.partial(go_through, index))
            fill(view, index, score(at), scores_U)
            if pruned:
                _advance_pruned(context, stream, scores_U)
            elif stream.index == index:  # it looked at no activations
                stream.advance()
        return scores_U

    return run


def by_column(score: Score) -> Callable[[Context], torch.Tensor]:
    """A metric of the columns that read a unit, lifted to units."""

    def of_layer(at: LayerPass) -> Scores:
        seen = at.moments(POINTS)
        return _of_projections(at.context, at.layer, at.index, score, seen)

    return by_layer(of_layer)


def by_weights(score: Score) -> Callable[[Context], torch.Tensor]:
    """As ``by_column``, for a metric that looks at no inputs: no text is run."""

    def run(context: Context) -> torch.Tensor:
        scores_U = torch.full((context.view.space.size,), math.nan, dtype=torch.float64)
        for index, layer in enumerate(context.view.layers):
            unseen = {point: RunningMoments(getattr(layer, point).in_features) for point in POINTS}
            fill(context.view, index, _of_projections(context, layer, index, score, unseen), scores_U)
        return scores_U

    return run


def _of_projections(
    context: Context, layer: LayerView, index: int, score: Score, seen: Mapping[str, RunningMoments]
) -> Scores:
    columns = {}
    for point in POINTS:
        weight_DE = weight_of(getattr(layer, point), context.view.model.dtype)
        weight_DE = weight_DE.to("cpu", torch.float32, copy=True)  # a metric may do with it what it likes
        columns[point] = score(Projection(weight_DE, seen[point], _KINDS[point], index, context.seed)).double()
    return of_columns(layer, columns["output"], columns["down"])


def _advance_pruned(context: Context, stream: LayerStream, scores_U: torch.Tensor) -> None:
    """Go on through the layer without the units that were scored worst."""
    with masked(context.view, context.ops, layers=[stream.index]) as live:
        live.set(without_worst(context.view.space, scores_U, context.options.sparsity)[None])
        stream.advance()


def without_worst(space: UnitSpace, scores_U: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The mask, bool ``[U]``, that removes this share of each group, to the nearest unit, but not the last one."""
    mask_U = torch.ones(space.size, dtype=torch.bool)
    for group, units in zip(space.groups, space.spans, strict=True):
        order = scores_U[units].argsort(stable=True)
        kept = max(1, round((1 - sparsity) * group.count))
        mask_U[units][order[: group.count - kept]] = False
    return mask_U


def of_columns(layer: LayerView, output_E: torch.Tensor, down_E: torch.Tensor) -> Scores:
    """Scores of units from those of columns: a kv group has its columns' mean, a block or layer its columns' sum."""
    return {**of_parts(output_E, down_E), "kv_group": output_E.view(layer.shape.kv_groups, -1).mean(1)}


def of_parts(kv_groups_N: torch.Tensor, channels_N: torch.Tensor) -> Scores:
    """Scores of one layer: a block, or the layer, has the sum of its kv groups and channels."""
    return {
        "kv_group": kv_groups_N,
        "channel": channels_N,
        "attention": kv_groups_N.sum(),
        "ffn": channels_N.sum(),
        "layer": kv_groups_N.sum() + channels_N.sum(),
    }


def of_units(saliences: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """Sums over what belongs to each of so many units, which lies side by side in each vector, float64 ``[N]``."""
    return torch.stack([salience_O.double().view(count, -1).sum(1).cpu() for salience_O in saliences]).sum(0)


def fill(view: ModelView, layer: int, scored: Scores, scores_U: torch.Tensor) -> None:
    """Write the scores of one layer's units to where they belong. Raises ``ConfigError`` if there are fewer or more."""
    for kind, values in scored.items():
        span = view.space.span(kind, layer)
        if span is not None:
            count = span.stop - span.start
            if values.numel() != count:
                raise ConfigError(
                    f"a score must give {count} numbers for {kind} in layer {layer}, but gave {list(values.shape)}"
                )
            scores_U[span] = values.double().cpu().flatten()
