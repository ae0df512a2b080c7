"""One kind of picture for all tables of losses: a panel a place, a line a choice, a dot for each variant of it."""

import io
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

import numpy as np

Losses = dict[str, dict[str, list[float]]]  # of each line and series, those of all seeds


def dots(points: Iterable[tuple[str, str, str, float]], series: Sequence[str], label: str) -> bytes:
    """A PNG of the mean loss of every line and series, with its standard deviation, on a logarithmic axis.

    Args:
        points: of each seed its panel, line, series and loss. In a panel the line whose best series is the best stands
            at the top.
        series: all there are, in the order of the legend.
        label: of the axis of losses.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator

    panels: dict[str, Losses] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for title, line, name, loss in points:
        panels[title][line][name].append(loss)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    longest = max(map(len, panels.values()))
    figure = Figure(figsize=(6.5 * columns, rows * (1.5 + 0.2 * longest)), layout="constrained")
    colours = dict(zip(series, 0.8 * colormaps["turbo"](np.linspace(0.05, 0.95, len(series)))[:, :3], strict=True))
    every = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, panel) in zip(every, panels.items(), strict=False):
        lines = sorted(panel, key=lambda line: -min(map(fmean, panel[line].values())))
        for name in (name for name in series if any(name in found for found in panel.values())):
            at = [place for place, line in enumerate(lines) if name in panel[line]]
            losses = [panel[lines[place]][name] for place in at]
            spreads = [stdev(each) if len(each) > 1 else 0.0 for each in losses]
            axes.errorbar(
                list(map(fmean, losses)), at, xerr=spreads, fmt="o", ms=4, capsize=2, color=colours[name], label=name
            )
        axes.set_yticks(range(len(lines)), lines, fontsize=8)
        axes.set(xscale="log", xlabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(title, fontsize=10)
        axes.grid(axis="y", linewidth=0.3)
        axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()
