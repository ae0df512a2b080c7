"""Metrics that can start the policy, be used alone, or be fused. One short file each.

To add one, write a function and give it a ``Metric`` that says what it is, where it comes from and what it costs:

- of the columns of one projection, ``def my_score(projection: Projection) -> torch.Tensor``, lifted by ``by_column``;
- of one layer, ``def my_score(at: LayerPass) -> Scores``, lifted by ``by_layer``: hook what you like, ``at.run()``;
- of the whole model, ``def my_score(context: Context) -> torch.Tensor``.

``initial_scores`` takes a ``Metric`` or a function of columns as it is, and a configuration the place where it stands,
``initial.score: path/to/file.py:my_score``. To give one that comes along a name of its own, list the ``Metric`` in
``SCORES`` and the name in ``bernprune.names.ScoreName``.
"""

import os
from pathlib import Path

import torch

from bernprune.backends import MaskedOps
from bernprune.errors import ConfigError
from bernprune.models.hooks import evaluating
from bernprune.models.masking import choose_ops
from bernprune.models.view import ModelView
from bernprune.names import place_of, unknown
from bernprune.scores.base import Context, Metric, Options, run_metric
from bernprune.scores.block_influence import BLOCK_INFLUENCE
from bernprune.scores.block_perplexity import BLOCK_PERPLEXITY
from bernprune.scores.cfsp import CFSP, CFSP_RELEASED
from bernprune.scores.custom import as_metric, metric_at
from bernprune.scores.files import SUFFIX, holds_scores, metric_of_file, read_scores, write_scores
from bernprune.scores.flap import FLAP, FLAP_IFV, FLAP_WIFN
from bernprune.scores.fusion import FUSED, RANK_AVERAGE
from bernprune.scores.goa import GOA, GOA_MOMENT
from bernprune.scores.hywia import HYWIA
from bernprune.scores.ifso import IFSO
from bernprune.scores.ifso_repaired import IFSO_HALFWAY, IFSO_REPAIRED
from bernprune.scores.magnitude import MAGNITUDE
from bernprune.scores.mini_llm import MINI_LLM, MINI_LLM_WEIGHTS
from bernprune.scores.random_score import RANDOM
from bernprune.scores.stream import LayerPass, Projection, Score, Scores, by_column, by_layer
from bernprune.scores.taylor import TAYLOR_ELEMENT, TAYLOR_SECOND, TAYLOR_VECTOR
from bernprune.scores.wanda_sp import WANDA_SP

SCORES: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        WANDA_SP,
        FLAP,
        FLAP_WIFN,
        FLAP_IFV,
        GOA,
        GOA_MOMENT,
        CFSP,
        CFSP_RELEASED,
        BLOCK_INFLUENCE,
        BLOCK_PERPLEXITY,
        MINI_LLM,
        MINI_LLM_WEIGHTS,
        TAYLOR_VECTOR,
        TAYLOR_ELEMENT,
        TAYLOR_SECOND,
        HYWIA,
        IFSO,
        IFSO_REPAIRED,
        IFSO_HALFWAY,
        RANK_AVERAGE,
        FUSED,
        MAGNITUDE,
        RANDOM,
    )
}

__all__ = [
    "SCORES",
    "Context",
    "LayerPass",
    "Metric",
    "Options",
    "Projection",
    "Score",
    "Scores",
    "by_column",
    "by_layer",
    "holds_scores",
    "initial_scores",
    "metric_named",
    "read_scores",
    "write_scores",
]


def metric_named(name: str) -> Metric:
    """One of ``SCORES``, a custom one as ``path/to/file.py:name``, or that which a file of scores is.

    Raises:
        ConfigError: a name that is unknown, a place at which there is no metric, or no such file.
    """
    if name in SCORES:
        return SCORES[name]
    if place := place_of(name):
        return metric_at(*place)
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return metric_of_file(path)
    if path.is_dir():
        raise ConfigError(f"score {name} is a folder; give a file of scores")
    if path.suffix == SUFFIX:
        raise ConfigError(f"score file {name} does not exist")
    raise ConfigError(unknown("score", name, SCORES))


def initial_scores(
    view: ModelView,
    windows_WT: torch.Tensor,
    score: Metric | Score,
    *,
    seed: int = 0,
    ops: MaskedOps | None = None,
    rows_per_forward: int = 16,
    options: Options | None = None,
    notes: dict[str, float] | None = None,
) -> torch.Tensor:
    """Scores of all units, float64 ``[U]``, larger is kept.

    Args:
        windows_WT: calibration text, int64.
        score: one of ``SCORES``, or a function of columns, see ``bernprune.scores``.
        ops: what runs masks, for metrics that try some; by default those of backend ``auto``.
        options: what else it is told, such as whether each layer sees what pruned ones before it hand on.
        notes: takes the figures that a metric leaves along with its scores.

    Raises:
        ConfigError: windows that the model cannot read, too few of them, a model that is under masks, a score that is
            not a function, or one that cannot rank these units.
        ModelError: activations, or scores, that are not finite.
    """
    if not callable(score) and not isinstance(score, Metric):
        raise ConfigError(f"a score must be a function, or such as SCORES['wanda-sp'], but is {score!r}")
    view.check_windows(windows_WT)
    metric, options = as_metric(score), options or Options()
    metric.check(view.space.finest, options)
    metric.check_model(view, windows_WT)
    if rows_per_forward < 1:
        raise ConfigError(f"rows_per_forward must be 1 or more, but is {rows_per_forward}")
    ops = ops or choose_ops("auto", view)
    # Out of inference mode gradients can be taken, as some metrics do, whatever the caller's mode is.
    with evaluating(view.model), torch.inference_mode(False), torch.autocast(view.device.type, enabled=False):
        windows_WT = windows_WT.clone()  # which may have been made in inference mode
        context = Context(view, windows_WT, seed, ops, rows_per_forward, options, {} if notes is None else notes)
        return run_metric(metric, context)
