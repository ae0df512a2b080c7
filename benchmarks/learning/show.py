"""Make ``table.md`` and ``picture.png`` from the rows of ``results.jsonl`` alone.

python benchmarks/learning/show.py
"""

import argparse
import io
import itertools
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.learning.rows import Row, overlap, read_rows
from bernprune.errors import BernpruneError, DataError
from bernprune.evaluation.perplexity import perplexity
from bernprune.storage import write_bytes

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Line:
    """The seeds of one method with the same settings and budget."""

    rows: list[Row]

    @property
    def title(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.rows[0]["settings"].items())
        return f"`{self.rows[0]['method']}`{f' {settings}' if settings else ''}"

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
    """Of every place, the best method first. Raises ``DataError`` where losses were not taken alike."""
    places: dict[Place, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        same = json.dumps([row["method"], row["settings"], row["sequences"]], sort_keys=True)
        places[row["model"], row["sparsity"]][same].append(row)
    for (model, sparsity), found in places.items():
        protocols = {json.dumps(row["protocol"], sort_keys=True) for seeds in found.values() for row in seeds}
        if len(protocols) > 1:
            raise DataError(f"the losses of {model} at sparsity {sparsity} were taken by {len(protocols)} protocols")
    return {
        place: sorted(map(Line, found.values()), key=lambda line: line.mean("loss"))
        for place, found in sorted(places.items())
    }


def table(places: dict[Place, list[Line]]) -> str:
    """All places in Markdown."""
    parts = ["# What learning buys\n\nMade by `show.py`; README.md says how to read it.\n"]
    for (model, sparsity), lines in places.items():
        row = lines[0].rows[0]
        protocol = row["protocol"]
        uniform = statistics.fmean(row["uniform_loss"] for line in lines for row in line.rows)
        parts.append(
            f"## {model}, {sparsity:.0%} removed\n\n"
            f"Loss on {protocol['text']} text: {protocol['windows']:,} windows of {protocol['window']} tokens, "
            f"{protocol['tokens']:,} predictions, text {protocol['text_sha256']}. Dense {row['dense_loss']:.4f} nats; "
            f"uniform Wanda-sp {uniform:.4f}.\n\n"
            "| method | sequences | equivalent | loss | perplexity | removed | agreement | seeds | seconds |\n"
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
            + "".join(f"| {' | '.join(_cells(line))} |\n" for line in lines)
        )
    return "\n".join(parts)


def _cells(line: Line) -> list[str]:
    agreement = line.agreement
    return [
        line.title,
        f"{line.mean('used'):,.0f}",
        f"{line.mean('equivalent'):,.0f}",
        f"{line.mean('loss'):.4f}" + (f" ± {line.spread:.4f}" if len(line.rows) > 1 else ""),
        f"{perplexity(line.mean('loss')):.2f}",
        f"{line.mean('reached'):.1%}",
        "-" if agreement is None else f"{agreement:.2f}",
        f"{len(line.rows)}",
        f"{line.mean('seconds'):.0f}",
    ]


def picture(places: dict[Place, list[Line]]) -> bytes:
    """A PNG of loss against sequences, a panel a place; a thin line leads to what gradients cost on top."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = min(3, len(places))
    panels = math.ceil(len(places) / columns), columns
    figure = Figure(figsize=(6.5 * panels[1], 4.5 * panels[0]), layout="constrained")
    names = sorted({line.rows[0]["method"] for lines in places.values() for line in lines})
    colours = dict(zip(names, colormaps["turbo"](np.linspace(0.05, 0.95, len(names))), strict=True))
    all_axes = figure.subplots(*panels, squeeze=False).flat
    for axes, ((model, sparsity), lines) in zip(all_axes, places.items(), strict=False):
        axes.set(title=f"{model}, {sparsity:.0%} removed", xlabel="sequences run forward", ylabel="nats per token")
        axes.set_xscale("log")
        for line in lines:
            name, at, loss = line.rows[0]["method"], line.mean("used"), line.mean("loss")
            axes.plot([at, line.mean("equivalent")], [loss, loss], color=colours[name], linewidth=0.8)
            axes.errorbar(at, loss, line.spread, color=colours[name], marker="o", capsize=2)
            axes.annotate(name, (at, loss), xytext=(5, 3), textcoords="offset points", fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Write both files beside the rows. Raises ``DataError`` if there are none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="where the files lie")
    folder: Path = parser.parse_args(arguments).folder
    rows = read_rows(folder / "results.jsonl")
    if not rows:
        raise DataError(f"{folder / 'results.jsonl'} holds no rows yet; run run.py first")
    places = lines_of(rows)
    write_bytes(folder / "table.md", table(places).encode())
    write_bytes(folder / "picture.png", picture(places))


if __name__ == "__main__":
    try:
        main()
    except BernpruneError as error:
        sys.exit(str(error))
