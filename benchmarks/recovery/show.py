"""Make ``table.md`` from the rows of ``results.jsonl`` alone.

python benchmarks/recovery/show.py
"""

import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.learning.rows import Row, read_rows
from benchmarks.memory import mean_peak
from bernprune.errors import BernpruneError, DataError
from bernprune.storage import write_bytes

KEY = ("model", "plan", "sparsity", "seed", "way", "tokens", "learning_rate")


def show(folder: Path) -> None:
    """Write the table beside the rows. Raises ``DataError`` if there are none."""
    rows = read_rows(folder / "results.jsonl", KEY)
    if not rows:
        raise DataError(f"{folder / 'results.jsonl'} holds no rows yet; run run.py first")
    write_bytes(folder / "table.md", table(rows).encode())


def table(rows: list[Row]) -> str:
    """All models and sparsities in Markdown."""
    places: dict[tuple[str, float, int], dict[tuple[str, str, float], list[Row]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        place = places[row["model"], row["sparsity"], row["tokens"]]
        place[row["plan"], row["way"], row["learning_rate"]].append(row)
    parts = ["# What a little training brings\n\nMade by `show.py`; README.md says how to read it.\n"]
    for (model, sparsity, tokens), found in sorted(places.items()):
        if len({str(row["protocol"]) for each in found.values() for row in each}) > 1:
            raise DataError(f"the losses of {model} at sparsity {sparsity} were taken by several protocols")
        lines = [f"| {' | '.join(_cells(*key, each))} |" for key, each in sorted(found.items())]
        parts.append(
            f"## {model}, {sparsity:.0%} removed, {tokens:,} tokens\n\n"
            "| plan | recovery | learning rate | repaired | recovered | worst seed | seeds | seconds | peak MiB |\n"
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n" + "\n".join(lines) + "\n"
        )
    return "\n".join(parts)


def _cells(plan: str, way: str, rate: float, rows: list[Row]) -> list[str]:
    before, after = ([row["loss"][name] for row in rows] for name in ("before", "after"))
    spread = f" ± {statistics.stdev(after):.3f}" if len(after) > 1 else ""
    gains = [one - other for one, other in zip(before, after, strict=True)]
    return [
        f"`{plan}`",
        way,
        f"{rate:g}",
        f"{statistics.fmean(before):.3f}",
        f"{statistics.fmean(after):.3f}{spread}",
        f"{min(gains):+.3f}",
        f"{len(rows)}",
        f"{statistics.fmean(row['seconds'] for row in rows):.0f}",
        mean_peak(rows),
    ]


if __name__ == "__main__":
    try:
        show(Path(__file__).parent)
    except BernpruneError as error:
        sys.exit(f"error: {error}")
