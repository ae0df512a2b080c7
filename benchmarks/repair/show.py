"""Make ``table.md`` and ``picture.png`` from the rows of ``results.jsonl`` alone.

python benchmarks/repair/show.py
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.learning.rows import Row, read_rows
from benchmarks.memory import mean_peak
from benchmarks.picture import dots
from benchmarks.repair.run import HERE, KEY, REPAIRS
from bernprune.errors import BernpruneError, DataError
from bernprune.storage import write_bytes

AUTO = ("ridge", "two-step")  # what 'auto' tries
TITLES = {(method, target, biases): name for name, (method, target, biases) in REPAIRS.items()}


def title(row: Row) -> str:
    """The name of a row's repair."""
    return TITLES[row["repair"], row["target"], row["biases"]]


def unrepaired(rows: dict[str, Row]) -> float:
    """The loss of a plan as it is, which the rows of all its repairs name."""
    return float(next(iter(rows.values()))["unrepaired"])


def auto(rows: dict[str, Row]) -> tuple[str, float] | None:
    """What ``auto`` takes of the repairs of one plan, and its loss on held-out text; None if it was not all tried.

    That is what gained most on the judging windows, if more than the standard error of the gain.
    """
    if not all(name in rows for name in AUTO):
        return None
    clear = [rows[name] for name in AUTO if rows[name]["judged_gain"] > rows[name]["judged_error"]]
    best = max(clear, key=lambda row: row["judged_gain"], default=None)
    return ("none", unrepaired(rows)) if best is None else (title(best), best["loss"])


Plans = dict[str, dict[int, dict[str, Row]]]  # plan, seed, and repair


def places_of(rows: Sequence[Row]) -> dict[tuple[str, float], Plans]:
    """Rows by model and sparsity."""
    places: dict[tuple[str, float], Plans] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for row in rows:
        places[row["model"], row["sparsity"]][row["plan"]][row["seed"]][title(row)] = row
    return dict(sorted(places.items()))


def table(places: dict[tuple[str, float], Plans]) -> str:
    """All models and sparsities in Markdown. Raises ``DataError`` where losses were not taken alike."""
    parts = ["# What repair brings\n\nMade by `show.py`; README.md says how to read it.\n"]
    for (model, sparsity), plans in places.items():
        protocols = {
            str(row["protocol"]) for seeds in plans.values() for found in seeds.values() for row in found.values()
        }
        if len(protocols) > 1:
            raise DataError(f"the losses of {model} at sparsity {sparsity} were taken by {len(protocols)} protocols")
        lines = [f"| {' | '.join(cells)} |" for plan, seeds in plans.items() for cells in _cells(plan, seeds)]
        parts.append(
            f"## {model}, {sparsity:.0%} removed\n\n"
            "| plan | repair | loss | less than unrepaired | worst seed | regressions | seeds | seconds | peak MiB |\n"
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n" + "\n".join(lines) + "\n"
        )
    return "\n".join(parts)


def _cells(plan: str, seeds: dict[int, dict[str, Row]]) -> list[list[str]]:
    """A line for no repair, for each repair, and for ``auto``."""
    found: dict[str, list[tuple[float, float, list[Row]]]] = defaultdict(list)
    for rows in seeds.values():
        before = unrepaired(rows)
        found["none"].append((before, 0.0, []))
        for name, row in rows.items():
            found[name].append((row["loss"], before - row["loss"], [row]))
        if (chosen := auto(rows)) is not None:
            found["auto"].append((chosen[1], before - chosen[1], [rows[name] for name in AUTO]))
    return [
        [
            plan,
            f"`{name}`",
            f"{statistics.fmean(loss for loss, _, _ in each):.4f}",
            f"{statistics.fmean(gain for _, gain, _ in each):+.4f}",
            f"{min(gain for _, gain, _ in each):+.4f}",
            f"{sum(gain < 0 for _, gain, _ in each)}",
            f"{len(each)}",
            f"{statistics.fmean(sum(row['seconds'] for row in tried) for _, _, tried in each):.0f}",
            mean_peak([max(tried, key=lambda row: row.get("peak_mib", 0)) for _, _, tried in each if tried]),
        ]
        for name, each in ((name, found[name]) for name in ("none", "auto", *REPAIRS) if name in found)
    ]


def picture(places: dict[tuple[str, float], Plans]) -> bytes:
    """A PNG: a panel a model and sparsity, a line a plan, a colour a repair."""
    points = [
        (f"{model}, {sparsity:.0%} removed", plan, name, loss)
        for (model, sparsity), plans in places.items()
        for plan, seeds in plans.items()
        for rows in seeds.values()
        for name, loss in [("none", unrepaired(rows)), *((name, row["loss"]) for name, row in rows.items())]
    ]
    return dots(points, ["none", *REPAIRS], "held-out loss, nats per token")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write table and picture beside the rows. Raises ``DataError`` if there are none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="where the rows lie")
    folder: Path = parser.parse_args(arguments).folder
    rows = read_rows(folder / "results.jsonl", KEY)
    if not rows:
        raise DataError(f"{folder / 'results.jsonl'} holds no rows yet; run run.py first")
    places = places_of(rows)
    write_bytes(folder / "table.md", table(places).encode())
    write_bytes(folder / "picture.png", picture(places))


if __name__ == "__main__":
    try:
        main()
    except BernpruneError as error:
        sys.exit(f"error: {error}")
