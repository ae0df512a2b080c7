"""Metrics, and what one found, as tables for people."""

from collections.abc import Iterable
from typing import Any

from bernprune.scores import Metric, Options
from bernprune.units import KINDS

_LAYERS = 32
_POWERS = {0.0: "no", 0.5: "its root", 1.0: "yes"}


def metrics_table(metrics: Iterable[Metric]) -> str:
    """The name, cost, usual allocation and division, units and source of each metric, and what it says of a unit."""
    lines = [
        f"{'metric':<18}{'passes':>8}  {'allocation':<17}{'per cost':<10}{'units':<24}source",
    ]
    for metric in metrics:
        units = "all" if metric.kinds == KINDS else ", ".join(metric.kinds)
        power = _POWERS.get(metric.cost_power, f"^{metric.cost_power:g}")
        lines.append(
            f"{metric.name:<18}{_cost(metric):>8}  {metric.allocation:<17}{power:<10}{units:<24}{metric.source}"
        )
        lines.append(f"    {metric.about}")
    return "\n".join(
        [
            *lines,
            "",
            f"passes       over the calibration text (initial.windows), of a model of {_LAYERS} layers, in blocks of "
            "attention and FFN; g: with gradients, which cost three more",
            "allocation   how many units each layer keeps, unless initial.allocation says otherwise",
            "per cost     whether scores are divided by a unit's parameters, unless initial.cost_power says otherwise",
        ]
    )


def _cost(metric: Metric) -> str:
    return f"{metric.passes(_LAYERS, Options(kinds=('attention', 'ffn'))):,.0f}{' g' if metric.gradients else ''}"


def scores_table(found: dict[str, Any]) -> str:
    """A table of what ``score_model`` returns: median and largest score of each kind in each layer, and its notes."""
    kinds = [kind for kind in KINDS if any(group["kind"] == kind for group in found["groups"])]
    shown = {
        (group["layer"], group["kind"]): f"{group['median']:>14.4g}{group['largest']:>11.4g}"
        for group in found["groups"]
    }
    layers = sorted({layer for layer, _ in shown})
    lines = [f"{'layer':<8}" + "".join(f"{kind:>14}{'largest':>11}" for kind in kinds)]
    lines += [
        f"{layer:<8}" + "".join(shown.get((layer, kind), f"{'-':>14}{'-':>11}") for kind in kinds) for layer in layers
    ]
    notes = [f"{name:<24} {value:.4g}" for name, value in found["notes"].items()]
    return "\n".join(
        [
            *lines,
            "",
            "shown        median and largest score of each kind in each layer",
            *notes,
            f"scored       {found['units']:,} units by {found['score']} in {found['seconds']:.1f} s",
        ]
    )
