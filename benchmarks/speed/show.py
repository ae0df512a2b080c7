"""Make ``table.md`` and ``picture.png`` from the rows of ``results.jsonl`` alone; of runs of the same thing the last.

python benchmarks/speed/show.py
"""

import argparse
import io
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.learning.rows import Row, read_rows
from benchmarks.speed.providers import NAMES
from bernprune.storage import write_bytes

HERE = Path(__file__).parent
KEY = ("machine", "model", "layers", "dtype", "tokens", "masks_per", "density", "provider")
_OF_A_TABLE = ("machine", "model", "layers", "dtype")


def latest(rows: list[Row]) -> list[Row]:
    """Of rows with the same key the last, in the order of their keys, providers as they are listed."""
    known = {tuple(row[name] for name in KEY): row for row in rows}
    order = {name: number for number, name in enumerate(NAMES)}
    return sorted(known.values(), key=lambda row: (*(row[name] for name in KEY[:-1]), order[row["provider"]]))


def table(rows: list[Row]) -> str:
    """Markdown: for each machine and model, every step by every provider."""
    parts = ["# Speed of evaluating masks\n\nMade by `show.py` from `results.jsonl`; README.md beside this says how.\n"]
    for head, group in itertools.groupby(latest(rows), key=lambda row: tuple(row[name] for name in _OF_A_TABLE)):
        machine, model, layers, dtype = head
        parts.append(
            f"\n## {model}, {layers} layers, {dtype}, on {machine}\n\n"
            "| tokens | masks per | kept | provider | ms (20 to 80 %) | tokens/s | to published | to batched "
            "| kept FLOP of the ceiling | kept bytes of the bandwidth | peak GiB beside weights | commit |\n"
            + 12 * "|---"
            + "|\n"
        )
        steps = itertools.groupby(group, key=lambda row: (row["tokens"], row["masks_per"], row["density"]))
        for _, step in steps:
            parts += _lines(list(step))
    return "".join(parts)


def _lines(step: list[Row]) -> list[str]:
    medians = {row["provider"]: row["median"] for row in step}
    return [
        f"| {row['tokens']:,} | {row['masks_per']} | {row['density']:.0%} | {row['provider']} "
        f"| {1e3 * row['median']:.1f} ({1e3 * row['low']:.1f} to {1e3 * row['high']:.1f}) "
        f"| {row['tokens_per_second']:,.0f} | {_ratio(medians, 'published', row)} | {_ratio(medians, 'batched', row)} "
        f"| {row['of_ceiling']:.0%} | {_share(row.get('of_bandwidth'))} | {_beside(row)} "
        f"| {row['commit']} |\n"
        for row in step
    ]


def _share(number: float | None) -> str:
    return "-" if number is None else f"{number:.0%}"  # rows of before it was measured have none


def _beside(row: Row) -> str:
    """Memory of a GPU that a step takes beside the weights."""
    return "" if row["peak_bytes"] is None else f"{(row['peak_bytes'] - row['weight_bytes']) / 2**30:.2f}"


def _ratio(medians: dict[str, float], name: str, row: Row) -> str:
    return f"{medians[name] / row['median']:.2f}" if name in medians else ""


def picture(rows: list[Row]) -> bytes:
    """PNG: tokens a second against what masks keep: a panel for each model, machine and kind of masks.

    Each is of the size of a step that was timed with the most densities, and of several the largest; others have none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes: dict[tuple[str, ...], dict[int, list[Row]]] = {}
    for row in latest(rows):
        sizes.setdefault((row["machine"], row["model"], row["masks_per"]), {}).setdefault(row["tokens"], []).append(row)
    panels = {}
    for key, steps in sizes.items():
        densities, tokens = max((len({row["density"] for row in step}), tokens) for tokens, step in steps.items())
        if densities > 1:
            panels[key] = steps[tokens]
    figure = Figure(figsize=(4.5 * max(1, (len(panels) + 1) // 2), 7), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(2, max(1, (len(panels) + 1) // 2), squeeze=False).flatten()
    for axes, ((machine, model, per), group) in itertools.zip_longest(
        all_axes, panels.items(), fillvalue=(("", "", ""), [])
    ):
        axes.set_visible(bool(group))
        for name in NAMES:
            points = [(row["density"], row["tokens_per_second"]) for row in group if row["provider"] == name]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=name)
        if group:
            axes.set(
                title=f"{model}, masks per {per},\n{machine.split(',')[0]}",
                xlabel="kept",
                ylabel="tokens / s",
                ylim=(0, None),
            )
            axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=80)
    return drawn.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="where results.jsonl lies")
    folder = parser.parse_args().folder
    rows = read_rows(folder / "results.jsonl", KEY)
    if not rows:
        sys.exit(f"{folder / 'results.jsonl'} has no rows; run.py makes some")
    write_bytes(folder / "table.md", table(rows).encode())
    write_bytes(folder / "picture.png", picture(rows))


if __name__ == "__main__":
    main()
