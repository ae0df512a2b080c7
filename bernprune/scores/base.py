"""From scores of columns to scores of units, with text run through a dense or an already pruned model.

A unit's importance shows at the projection that reads it: kv groups at the attention output projection, channels at
the FFN down projection. A metric scores the columns of such a weight; units follow by averaging.

Letters: D, E output and input width of a projection, U units, W windows, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bernprune.backends import MaskedOps
from bernprune.errors import ConfigError
from bernprune.models.linear import weight_of
from bernprune.models.masking import masked
from bernprune.models.statistics import POINTS, InputStatistics, input_statistics, run_windows, watching
from bernprune.models.view import ModelView
from bernprune.names import Kind


@dataclass(frozen=True)
class Projection:
    """What a metric may look at.

    Attributes:
        weight_DE: float32 weight of the attention output (``kind`` kv_group) or FFN down projection (channel).
        inputs: moments of its input over the calibration text.
        seed: for metrics that draw numbers.
    """

    weight_DE: torch.Tensor
    inputs: InputStatistics
    kind: Kind
    layer: int
    seed: int


Score = Callable[[Projection], torch.Tensor]

_KINDS: dict[str, Kind] = {"output": "kv_group", "down": "channel"}


def initial_scores(
    view: ModelView,
    windows_WT: torch.Tensor,
    score: Score,
    *,
    seed: int = 0,
    pruned_inputs: tuple[MaskedOps, float] | None = None,
    rows_per_forward: int = 16,
) -> torch.Tensor:
    """Scores of all units, float64 ``[U]``, larger is kept.

    Args:
        windows_WT: calibration text, int64.
        pruned_inputs: None to score every layer on the dense model's activations in one pass. With (operations,
            sparsity), as Wanda-sp does, each layer sees what the already pruned earlier layers hand on, every kind in
            every layer losing that share of its units; this takes one partial pass a layer.

    Raises:
        ConfigError: no text, a model that is under masks, or a score that is not a function.
    """
    if not callable(score):
        raise ConfigError(f"a score must be a function, such as SCORES['wanda-sp'], but is {score!r}")
    if windows_WT.ndim != 2 or not windows_WT.numel():
        raise ConfigError(f"calibration windows must be [W, T] of a token or more, but are {list(windows_WT.shape)}")
    if pruned_inputs is None:
        statistics = input_statistics(view, windows_WT, rows_per_forward=rows_per_forward)
        columns = [_columns(view, layer, statistics[layer], score, seed) for layer in range(len(view.layers))]
        return unit_scores(view, columns)
    ops, sparsity = pruned_inputs
    return _scores_in_turn(view, windows_WT, score, ops, sparsity, seed, rows_per_forward)


def _scores_in_turn(
    view: ModelView,
    windows_WT: torch.Tensor,
    score: Score,
    ops: MaskedOps,
    sparsity: float,
    seed: int,
    rows_per_forward: int,
) -> torch.Tensor:
    mask_U = torch.ones(view.space.size, dtype=torch.bool)
    columns: list[dict[str, torch.Tensor]] = []
    for index, layer in enumerate(view.layers):
        with watching([layer], stop=True) as gathered, masked(view, ops, layers=range(index)) as live:
            live.set(mask_U[None])
            run_windows(view, windows_WT, rows_per_forward=rows_per_forward)
        columns.append(_columns(view, index, gathered[0], score, seed))
        scores_U = unit_scores(view, columns)
        for kind in ("kv_group", "channel"):
            span = view.space.span(kind, index)
            if span is not None:
                order = scores_U[span].argsort(stable=True)
                mask_U[span.start + order[: int(sparsity * len(order))]] = False
    return unit_scores(view, columns)


def _columns(
    view: ModelView, layer: int, statistics: dict[str, InputStatistics], score: Score, seed: int
) -> dict[str, torch.Tensor]:
    scored = {}
    for point in POINTS:
        if not statistics[point].count:
            raise ConfigError(
                f"no calibration text reached layer {layer}: scores cannot be taken while the model is under masks"
            )
        weight_DE = weight_of(getattr(view.layers[layer], point), view.model.dtype).float().cpu()
        scored[point] = score(Projection(weight_DE, statistics[point], _KINDS[point], layer, seed)).double()
    return scored


def unit_scores(view: ModelView, columns: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Scores of units from those of columns: a kv group has its columns' mean, a block or layer its columns' sum.

    Layers beyond the end of ``columns`` score 0.
    """
    scores_U = torch.zeros(view.space.size, dtype=torch.float64)
    for layer, scored in enumerate(columns):
        output, down = scored["output"], scored["down"]
        by_kind = {
            "kv_group": output.view(view.layers[layer].shape.kv_groups, -1).mean(1),
            "channel": down,
            "attention": output.sum(),
            "ffn": down.sum(),
            "layer": output.sum() + down.sum(),
        }
        for kind in view.space.kinds:
            span = view.space.span(kind, layer)
            if span is not None:
                scores_U[span] = by_kind[kind]
    return scores_U
