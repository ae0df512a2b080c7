"""What the rows of ``simulation.jsonl`` say, as a table and as a picture."""

import io
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from benchmarks.learning.rows import Row

_LOWEST = -0.2  # shown: worse than the score alone is no matter of how much


def simulated_table(rows: Sequence[Row]) -> str:
    """What was recovered at the end of each search, in Markdown; a column a method, mean over seeds."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found: dict[tuple[int, int, str], list[float]] = defaultdict(list)
    levels: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for row in rows:
        found[row["units"], row["sequences"], row["method"]].append(row["recovered"][-1])
        if "levels" in row:  # rows of before know nothing of them
            levels[row["units"], row["sequences"]][row["seed"]] = row["levels"]
    parts = [
        "## Large models, simulated\n\nShare of the possible gain over the score's own uniform selection that was "
        "recovered; below 0 is worse than the score (`simulate.py`, 30% removed). *Levels*: by a selection that knows "
        "all there is to know but for what sets units of a layer apart. Mean over seeds, whose number stands in "
        f"brackets.\n\n| units | sequences | {' | '.join(methods)} | levels |\n"
        f"| ---: | ---: |{' ---: |' * (len(methods) + 1)}\n"
    ]
    for units, sequences in sorted({(row["units"], row["sequences"]) for row in rows}):
        cells = [found[units, sequences, method] for method in methods] + [[*levels[units, sequences].values()]]
        written = [f"{statistics.fmean(cell):.2f} ({len(cell)})" if cell else "-" for cell in cells]
        parts.append(f"| {units:,} | {sequences:,} | {' | '.join(written)} |\n")
    return "".join(parts)


def simulated_picture(rows: Sequence[Row]) -> bytes:
    """A PNG of what was recovered against sequences run forward: a panel a size and budget, a line a method, means over
    seeds; dotted what is recovered by who knows all but what sets units of a layer apart."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels: dict[tuple[int, int], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        panels[row["units"], row["sequences"]][row["method"]].append(row)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours = dict(zip(methods, 0.8 * colormaps["turbo"](np.linspace(0.05, 0.95, len(methods)))[:, :3], strict=True))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3.6 * lines), layout="constrained")
    every = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    for axes, ((units, sequences), found) in zip(every, sorted(panels.items()), strict=False):
        for method, seeds in found.items():
            recovered = np.mean([row["recovered"] for row in seeds], axis=0)
            axes.plot(seeds[0]["used"], recovered, color=colours[method], marker="o", ms=3, label=method)
        levels = [row["levels"] for seeds in found.values() for row in seeds if "levels" in row]
        if levels:
            axes.axhline(statistics.fmean(levels), color="#999999", linewidth=0.8, linestyle=":")
        axes.axhline(0.0, color="#999999", linewidth=0.8)
        axes.set_ylim(_LOWEST, 1.0)
        axes.set_title(f"{units:,} units, {sequences:,} sequences", fontsize=10)
        axes.set(xlabel="sequences run forward", ylabel="share of the possible gain")
    every[0].legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()
