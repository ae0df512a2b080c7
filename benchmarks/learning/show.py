"""Make ``table.md`` and the pictures from the rows of ``results.jsonl`` and ``simulation.jsonl`` alone.

python benchmarks/learning/show.py
"""

import argparse
import io
import itertools
import json
import math
import statistics
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.learning.rows import ABLATED, SIMULATED, Row, overlap, read_rows
from benchmarks.learning.simulated import simulated_picture, simulated_table
from bernprune.errors import BernpruneError, DataError
from bernprune.evaluation.perplexity import perplexity
from bernprune.storage import write_bytes

HERE = Path(__file__).parent
SAME = 1e-3  # nats; by so much the loss of the same weights may differ between machines


@dataclass(frozen=True)
class Line:
    """The seeds of one method with the same settings and budget."""

    rows: list[Row]

    @property
    def method(self) -> str:
        return str(self.rows[0]["method"])

    @property
    def title(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.rows[0]["settings"].items())
        return f"`{self.method}`{f' {settings}' if settings else ''}"

    def mean(self, name: str) -> float:
        return statistics.fmean(row[name] for row in self.rows)

    @property
    def spread(self) -> float:
        """Standard deviation of the loss over seeds; 0 for one."""
        return statistics.stdev(row["loss"] for row in self.rows) if len(self.rows) > 1 else 0.0

    @property
    def agreement(self) -> float | None:
        """Mean over pairs of seeds of the share of removed units that they have in common; None for one seed."""
        pairs = list(itertools.combinations((row["removed"] for row in self.rows), 2))
        return statistics.fmean(overlap(*pair) for pair in pairs) if pairs else None


Place = tuple[str, float]  # a model at a sparsity


def lines_of(rows: Sequence[Row]) -> dict[Place, list[Line]]:
    """Of every place, the best method first. Raises ``DataError`` where losses are of other texts or other weights."""
    places: dict[Place, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        same = json.dumps([row["method"], row["settings"], row["sequences"]], sort_keys=True)
        places[row["model"], row["sparsity"]][same].append(row)
    for (model, sparsity), found in places.items():
        protocols = {json.dumps(row["protocol"], sort_keys=True) for seeds in found.values() for row in seeds}
        if len(protocols) > 1:
            raise DataError(f"the losses of {model} at sparsity {sparsity} were taken by {len(protocols)} protocols")
        dense = [row["dense_loss"] for seeds in found.values() for row in seeds]
        if max(dense) - min(dense) > SAME:
            raise DataError(f"the rows of {model} at sparsity {sparsity} are of models with other weights")
    return {
        place: sorted(map(Line, found.values()), key=lambda line: line.mean("loss"))
        for place, found in sorted(places.items())
    }


def table(places: dict[Place, list[Line]]) -> str:
    """All places in Markdown."""
    parts = ["# What learning buys\n\nMade by `show.py`; README.md says how to read it.\n"]
    for (model, sparsity), lines in places.items():
        row = lines[0].rows[0]
        protocol, dense, uniform = row["protocol"], row["dense_loss"], _uniform(lines)
        parts.append(
            f"## {model}, {sparsity:.0%} removed\n\n"
            f"Loss on {protocol['text']} text: {protocol['windows']:,} windows of {protocol['window']} tokens, "
            f"{protocol['tokens']:,} predictions, text {protocol['text_sha256']}. Dense {dense:.4f} nats; "
            f"uniform Wanda-sp {uniform:.4f}.\n\n"
            "| method | sequences | equivalent | loss | excess left | perplexity | removed | agreement | seeds "
            "| seconds |\n"
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
            + "".join(f"| {' | '.join(_cells(line, uniform))} |\n" for line in _rivals(lines))
        )
        ablations = _ablations(lines)
        if ablations:
            parts.append(
                f"### {model}, {sparsity:.0%} removed: `default` without one ingredient\n\n"
                "| without | sequences | loss less that of `default` | standard error | seeds |\n"
                "| --- | ---: | ---: | ---: | ---: |\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in ablations)
            )
    return "\n".join(parts)


def _rivals(lines: list[Line]) -> list[Line]:
    return [line for line in lines if not line.method.startswith(ABLATED)]


def _uniform(lines: list[Line]) -> float:
    return statistics.fmean(row["uniform_loss"] for line in lines for row in line.rows)


def _cells(line: Line, uniform: float) -> list[str]:
    agreement, dense = line.agreement, line.rows[0]["dense_loss"]
    return [
        line.title,
        f"{line.mean('used'):,.0f}",
        f"{line.mean('equivalent'):,.0f}",
        f"{line.mean('loss'):.4f}" + (f" ± {line.spread:.4f}" if len(line.rows) > 1 else ""),
        f"{(line.mean('loss') - dense) / (uniform - dense):.1%}",
        f"{perplexity(line.mean('loss')):.2f}",
        f"{line.mean('reached'):.1%}",
        "-" if agreement is None else f"{agreement:.2f}",
        f"{len(line.rows)}",
        f"{line.mean('seconds'):.0f}",
    ]


def _ablations(lines: list[Line]) -> list[list[str]]:
    """Differences to ``default`` with the same seeds and budget, the worst first."""
    shipped = {
        (row["sequences"], row["seed"]): row["loss"] for line in lines if line.method == "default" for row in line.rows
    }
    found = []
    for line in reversed(lines):
        if line.method.startswith(ABLATED):
            at = [(row["loss"], shipped.get((row["sequences"], row["seed"]))) for row in line.rows]
            worse = [loss - usual for loss, usual in at if usual is not None]
            error = statistics.stdev(worse) / math.sqrt(len(worse)) if len(worse) > 1 else math.nan
            if worse:
                name, sequences = line.method.removeprefix(ABLATED), line.rows[0]["sequences"]
                numbers = [f"{sequences:,}", f"{statistics.fmean(worse):+.4f}", f"{error:.4f}", f"{len(worse)}"]
                found.append([name, *numbers])
    return found


def picture(places: dict[Place, list[Line]]) -> bytes:
    """A PNG of loss against sequences, a panel a place: a method's budgets joined by a line, metrics as dots.

    A dotted line leads to what gradients cost on top. What has a quarter more excess than the uniform cut is named.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = min(3, len(places))
    panels = math.ceil(len(places) / columns), columns
    figure = Figure(figsize=(6.5 * panels[1], 5 * panels[0]), layout="constrained")
    names = sorted({line.method for lines in places.values() for line in _rivals(lines)})
    colours = dict(zip(names, 0.8 * colormaps["turbo"](np.linspace(0.05, 0.95, len(names)))[:, :3], strict=True))
    for axes, place in itertools.zip_longest(figure.subplots(*panels, squeeze=False).flat, places):
        if place is None:
            axes.set_axis_off()
        else:
            _draw_place(axes, place, places[place], colours)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_place(axes: Any, place: Place, lines: list[Line], colours: dict[str, Any]) -> None:
    dense, uniform = lines[0].rows[0]["dense_loss"], _uniform(lines)
    worst, beyond, ends = dense + 1.25 * (uniform - dense), [], []
    for name in sorted({line.method for line in _rivals(lines)}):
        own = sorted((line for line in lines if line.method == name), key=lambda line: line.mean("used"))
        shown = [line for line in own if line.mean("loss") <= worst]
        if len(shown) < len(own):
            beyond.append(name)
        if not shown:
            continue
        at, losses = [line.mean("used") for line in shown], [line.mean("loss") for line in shown]
        axes.errorbar(at, losses, [line.spread for line in shown], color=colours[name], marker="o", ms=4, capsize=2)
        for line in shown:
            cost, loss = line.mean("equivalent"), line.mean("loss")
            axes.plot([line.mean("used"), cost], [loss, loss], ":", color=colours[name], linewidth=0.8)
        ends.append((name, shown[-1].mean("equivalent"), losses[-1]))
    axes.axhline(uniform, color="#999999", linewidth=0.8, linestyle="--")
    note = textwrap.fill(f"worse: {', '.join(beyond)}", 90) if beyond else ""
    axes.set_title(f"{place[0]}, {place[1]:.0%} removed; dense {dense:.2f}, dashed: uniform Wanda-sp", fontsize=10)
    axes.set(xlabel=f"sequences run forward\n{note}", ylabel="nats per token", xscale="log")
    axes.xaxis.label.set_fontsize(8)
    _name(axes, ends, colours)


def _name(axes: Any, ends: list[tuple[str, float, float]], colours: dict[str, Any]) -> None:
    """Write each name right of where its line ends, above those below it that end nearby."""
    height = (axes.get_ylim()[1] - axes.get_ylim()[0]) / 36
    written: list[tuple[float, float]] = []
    for name, at, loss in sorted(ends, key=lambda end: end[2]):
        beside = [other for place, other in written if abs(math.log(place / at)) < math.log(3)]
        height_of_name = max([loss, *(other + height for other in beside)])
        written.append((at, height_of_name))
        axes.annotate(name, (1.15 * at, height_of_name), va="center", fontsize=7, color=colours[name])
    axes.set_xlim(right=4 * axes.get_xlim()[1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files beside the rows. Raises ``DataError`` if there are none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="where the files lie")
    folder: Path = parser.parse_args(arguments).folder
    rows = read_rows(folder / "results.jsonl")
    if not rows:
        raise DataError(f"{folder / 'results.jsonl'} holds no rows yet; run run.py first")
    places, simulated = lines_of(rows), read_rows(folder / "simulation.jsonl", SIMULATED)
    text = table(places)
    if simulated:
        text += "\n" + simulated_table(simulated)
        write_bytes(folder / "simulation.png", simulated_picture(simulated))
    write_bytes(folder / "table.md", text.encode())
    write_bytes(folder / "picture.png", picture(places))


if __name__ == "__main__":
    try:
        main()
    except BernpruneError as error:
        sys.exit(f"error: {error}")
